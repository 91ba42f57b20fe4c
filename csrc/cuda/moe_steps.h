// SPDX-License-Identifier: BSD-3-Clause
// A mixture of experts on a GPU, forward and backward, on dense and on quantised weights, with adapters or without.
#pragma once

#include <vector>
#include <array>
#include <string>
#include <tuple>

#include "../common/low_rank.h"
#include "experts.h"

namespace ffn_ops::cuda {

struct Moe : MoeShape {
  Experts experts;
  LowRank lora_in, lora_down;
  // Factors of adapters that products cannot read where they stand: several products of a call read one copy.
  struct Copy {
    const Tensor* of;
    DType dtype;
    Tensor dense;
  };
  mutable std::vector<Copy> factors;
};

Moe describe(Call& call, const MoeShape& s, const MaybeTensor& token, const MaybeTensor& weight,
             const MaybeTensor& offsets, const MaybeTensor& row, const MaybeTensor& slot_offsets);

// The weights as products read them: w_in and w_down by rows for x w^T, and by columns for d w.
struct Products {
  WithWeights in;  // of gate and, where gated, of up
  WithWeights down;
  WithWeights in_columns, down_columns;  // backward
  bool aligned_rows = false;             // they read rows by copies of 16 bytes alone
};

// y, gate and up (where saved) of the experts on x.
std::tuple<Tensor, Tensor, Tensor> run_experts(Call& call, const Moe& c, const Tensor& x, const Products& products,
                                               const MaybeTensor& b_in, const MaybeTensor& b_down, bool save);

// The gradients that are asked for, of each Input; else empty.
std::array<Tensor, kInputs> run_experts_backward(Call& call, const Moe& c, const std::string& op, const Tensor& d_y,
                                                 const Tensor& x, const Products& products, const PlainWeights& plain,
                                                 const MaybeTensor& b_in, const MaybeTensor& b_down, const Tensor& gate,
                                                 const Tensor& up, const std::array<bool, kInputs>& asked);

}  // namespace ffn_ops::cuda
