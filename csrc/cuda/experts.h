// SPDX-License-Identifier: BSD-3-Clause
// The products and sums of a mixture of experts, all experts in one launch. The operators are in moe.cu.
#pragma once

#include <functional>

#include "launch.h"

namespace ffn_ops::cuda {

// Rows sorted by expert, and where they come from: gathered from tokens, or in order already (not routed). Only the
// device knows how many an expert has.
struct Experts {
  DType dtype;
  int64_t E, R;
  const int64_t* offsets;  // [E + 1]
  bool routed = false;
  Routes routes{};               // routed
  const void* weight = nullptr;  // of each row, of the arithmetic's dtype: routed
};

// A matrix of rows as a product reads it: element (row, column), rows gathered where they are tokens.
Operand token_rows(const Experts& c, const Tensor& t);
Operand dense_rows(const void* data, int64_t width);

// The same matrix with rows that kernels can copy by 16 bytes: itself, where it has them.
Tensor aligned_rows(const Call& call, const Tensor& t, DType dtype);

// Expert e's weights w[e], [N, K], as a product reads them; `transposed`: w[e] is [K, N]. From output column `col` on.
Operand expert_weights(const Tensor& w, DType dtype, bool transposed, int64_t col);

// One product, or a row's activation or gradient in its epilogue; see GroupedGemm.
GroupedGemm rows_product(const Experts& c, const Operand& rows, int64_t K, int64_t N);
void launch_product(Call& call, const GroupedGemm& job);

// Does a product, which has everything but its weights, with those from output column `col` on.
using WithWeights = std::function<void(const GroupedGemm& job, int64_t col)>;
WithWeights with_weights(Call& call, const Tensor& w, bool transposed);

// Columns [col, col + width) of what joins a product, [R, width] of the arithmetic's dtype.
using AddedColumns = std::function<Tensor(int64_t col, int64_t width)>;

// out[t] = sum over the rows r of token t of weight[r] (null: 1) * (rows[r] w^T + added[r] + bias); not routed: out[r],
// and zeros behind the experts' rows.
void combined_product(Call& call, const Experts& c, const Operand& rows, int64_t K, const WithWeights& product,
                      int64_t N, const void* bias, const void* row_weight, Tensor& out, const AddedColumns& added = {});

// Of each expert: out[M, N] = sum over its rows of a(row)^T b(row).
void outer_products(Call& call, const Experts& c, const Operand& a, int64_t M, const Operand& b, int64_t N,
                    Tensor& out);

// Of each expert: out[N] = sum over its rows of weight (null: 1) * row.
void sum_expert_rows(Call& call, const Experts& c, const Operand& rows, const void* row_weight, Tensor& out);

}  // namespace ffn_ops::cuda
