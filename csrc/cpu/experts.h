// SPDX-License-Identifier: BSD-3-Clause
// The products and sums of a mixture of experts, expert by expert, as steps of one call. The operators are in moe.cpp.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <tuple>

#include "../common/low_rank.h"
#include "routes.h"

namespace ffn_ops {

// A stacked weight [E, rows, columns]: that of an expert from a row and a column on.
using StackedWeight = std::function<Matrix(int64_t expert, int64_t row, int64_t column)>;

// Rows sorted by expert, and where they come from: gathered from tokens, or in order already (not routed).
struct Experts {
  DType dtype;
  int64_t T = 0, D = 0, F = 0, O = 0, E = 0, R = 0;
  bool gated = false, interleaved = false, routed = false;
  bool two_in = false;  // w_in is of two weights, gate's rows and up's
  Gate form;
  LowRank lora_in, lora_down;
  Routes routes;
  const int64_t* offsets = nullptr;
  const void* weight = nullptr;  // of each row, of the arithmetic's dtype
  std::vector<Segment> segments;
  std::vector<int64_t> segment_of;       // each expert's, -1 where it has no rows
  StackedWeight lora_b_in, lora_b_down;  // of adapters, see add_factors
  std::vector<Tensor> keep;
  std::deque<std::array<Operand, 2>> operands;  // products point to them
  std::deque<std::array<const void*, 2>> biases;

  int64_t hidden() const { return gated ? 2 * F : F; }
  void set_rows(const Tensor& expert_offsets, int64_t experts, int64_t rows) {
    E = experts;
    R = rows;
    offsets = check_offsets(expert_offsets, "offsets", E, R, keep);
    routes.kept = offsets[E];
    segments = ffn_ops::segments(offsets, E);
    segment_of.assign(static_cast<size_t>(E), -1);
    for (size_t i = 0; i < segments.size(); ++i)
      segment_of[static_cast<size_t>(segments[i].expert)] = static_cast<int64_t>(i);
  }
  const Operand* hold(const Operand& first, const Operand& second = {}) {
    return operands.emplace_back(std::array{first, second}).data();
  }
  const void* const* hold_bias(const void* first, const void* second = nullptr) {
    return biases.emplace_back(std::array{first, second}).data();
  }
  const void* row_weight(const Segment& s) const { return advance(weight, s.begin, arithmetic_dtype(dtype)); }
};

// Without offsets: one expert, which takes every row.
inline Tensor all_rows(const std::optional<Tensor>& offsets, int64_t rows) {
  if (offsets) return *offsets;
  Tensor all = fresh_indices({2});
  auto* data = static_cast<int64_t*>(all.mutable_data_ptr());
  data[0] = 0;
  data[1] = rows;
  return all;
}

// The experts of a call, with their routes where it is routed.
Experts with_routes(const MoeShape& s, const std::optional<Tensor>& token, const std::optional<Tensor>& weight,
                    const Tensor& offsets, const std::optional<Tensor>& row, const std::optional<Tensor>& slot_offsets);

// The rows of an expert in a matrix.
using RowsOf = std::function<Matrix(const Segment&)>;

// In a tensor of tokens, gathered where routed.
inline RowsOf token_rows(const Experts& c, const Tensor& t) {
  return [&c, &t](const Segment& s) {
    Matrix m = matrix(t, c.dtype, c.routed ? 0 : s.begin);
    if (c.routed) m.rows = c.routes.token + s.begin;
    return m;
  };
}

// In dense rows of the workspace.
inline RowsOf dense_rows(const void* data, int64_t width, DType dtype) {
  return [=](const Segment& s) { return dense(advance(data, s.begin * width, dtype), width, dtype); };
}

inline StackedWeight stacked(const Tensor& w, DType dtype) {
  return [&w, dtype](int64_t e, int64_t row, int64_t col) { return expert_matrix(w, dtype, e, row, col); };
}

// The weights of an expert from an output column on: rows of w in rows[r] w^T, its columns in rows[r] w.
using WeightsFrom = std::function<Operand(int64_t expert, int64_t column)>;

inline WeightsFrom rows_of(const StackedWeight& w) {
  return [w](int64_t e, int64_t col) { return lanes_are_rows(w(e, col, 0)); };
}
inline WeightsFrom columns_of(const StackedWeight& w) {
  return [w](int64_t e, int64_t col) { return lanes_are_columns(w(e, 0, col)); };
}

inline void* take_rows(Workspace& workspace, const Experts& c, int64_t width, DType dtype, const char* name) {
  return workspace.take(static_cast<size_t>(c.routes.kept * width * storage_size(dtype)), name);
}

// Gradients of the experts without rows.
inline Phases::Task zeros_of(const std::vector<char*>& empty, int64_t bytes) {
  return [=](int64_t task, int64_t) { std::memset(empty[static_cast<size_t>(task)], 0, static_cast<size_t>(bytes)); };
}

inline std::vector<char*> without_rows(const Experts& c, void* out, int64_t bytes) {
  std::vector<char*> empty;
  for (int64_t e = 0; e < c.E; ++e)
    if (c.offsets[e] == c.offsets[e + 1]) empty.push_back(static_cast<char*>(out) + e * bytes);
  return empty;
}

// A product with few columns, of the arithmetic's dtype, as the rows of a second product that joins the first.
struct SmallRows {
  const void* data = nullptr;  // [kept, rank]; null: none
  int64_t rank = 0;
  WeightsFrom weights;  // [N, rank] of an expert

  // In the epilogue of a product over the rows of an expert; `b` are its weights, held.
  void join(Epilogue& e, const Segment& s, const Operand* b) const {
    e.small = advance(data, s.begin * rank, e.arithmetic());
    e.rank = rank;
    e.small_b = b;
  }
};

// Sets lora_b_in and lora_b_down: where they stand, or turned beside the next step where is_expert_last; `along_rows`
// suits products with their rows, as forward has them.
void add_factors(Steps& steps, Workspace& workspace, Experts& c, bool along_rows);

// scale * rows[r] weights^T [kept, rank] of the arithmetic's dtype, computed beside the step that follows.
const void* add_short_product(Steps& steps, Workspace& workspace, Experts& c, const RowsOf& rows, int64_t K,
                              int64_t rank, const WeightsFrom& weights, double scale, const char* name);

// Each row times a^T, in the arithmetic's dtype, and b as the weights of the second product. Beside the next step.
SmallRows add_down_projection(Steps& steps, Workspace& workspace, Experts& c, const LowRank& lora,
                              const StackedWeight& b, const RowsOf& rows);

// Gate and up (saved where given) and h (where given) of every row.
void add_pre_activations(Steps& steps, Workspace& workspace, Experts& c, const Tensor& x, const StackedWeight& w_in,
                         const std::optional<Tensor>& b_in, void* gate, void* up, void* h);

// out[t] = sum over the rows r of token t of weight[r] (null: 1) * (rows[r] weights^T + bias); not routed: out[r], and
// zeros behind the experts' rows. `small` joins rows[r] weights^T. With `second` the
// halves of k are of two weights.
void add_combined_product(Steps& steps, Workspace& workspace, Experts& c, const RowsOf& rows, int64_t K, int64_t N,
                          const WeightsFrom& weights, const void* bias, const void* row_weight, void* out,
                          const SmallRows& small = {}, const WeightsFrom& second = {});

// y, gate and up (where saved) of the experts on x.
std::tuple<Tensor, Tensor, Tensor> run_experts(Experts& c, const Tensor& x, const StackedWeight& w_in,
                                               const StackedWeight& w_down, const std::optional<Tensor>& b_in,
                                               const std::optional<Tensor>& b_down, bool save);

// The gradients that are asked for, of each Input; else empty.
std::array<Tensor, kInputs> run_experts_backward(Experts& c, const std::string& op, const Tensor& d_y, const Tensor& x,
                                                 const std::optional<Tensor>& weight, const StackedWeight& w_in,
                                                 const StackedWeight& w_down, const PlainWeights& plain,
                                                 const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_down,
                                                 const Tensor& gate, const Tensor& up,
                                                 const std::array<bool, kInputs>& asked);

// rows[r] weights^T [R, N]; rows after the experts' are zero.
Tensor run_linear(Experts& c, const Tensor& rows, int64_t N, const WeightsFrom& weights);

// d_hidden [R, 2F] (d_gate, then d_up, or alternating), its rows `apart`, and h, times the row's weight where there is
// one; parts of the gradient of the weight (null: not routed). `small` joins the gradient of h, unweighted.
void add_hidden_gradient(Steps& steps, Experts& c, const Tensor& d_y, const StackedWeight& w_down, const void* gate,
                         const void* up, void* d_hidden, void* h, DType h_dtype, void* parts, int64_t num_parts,
                         const SmallRows& small = {});

// Of each row: the sum of its parts, and d_y of its token times its expert's bias.
void add_routing_weight_gradient(Steps& steps, const Experts& c, const Tensor& d_y, const void* bias, const void* parts,
                                 int64_t num_parts, void* out);

// Of each expert: out[M, N] of `dtype` = sum over its rows of a(row)^T b(row). Experts without rows get zeros.
void add_outer_products(Steps& steps, Experts& c, int64_t M, int64_t N, const RowsOf& a, const RowsOf& b, DType dtype,
                        void* out);

// The same where M or N is the rank of an adapter, and that side of the arithmetic's dtype; beside the next step.
void add_short_outer_products(Steps& steps, Experts& c, int64_t M, int64_t N, const RowsOf& a, const RowsOf& b,
                              DType dtype, void* out);

// The same as out[M, rank, E].
void add_short_outer_products_expert_last(Steps& steps, Workspace& workspace, Experts& c, int64_t M, int64_t rank,
                                          const RowsOf& a, const RowsOf& b, DType dtype, void* out);

// Of each expert: out[N] = sum over its rows of weight * m(row).
void add_bias_gradients(Steps& steps, const Experts& c, int64_t N, const RowsOf& rows, bool weighted, void* out);

}  // namespace ffn_ops
