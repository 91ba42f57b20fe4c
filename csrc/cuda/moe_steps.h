// SPDX-License-Identifier: BSD-3-Clause
// The steps of a mixture of experts that are the same for dense and for quantised weights.
#pragma once

#include "experts.h"
#include "rows.h"

namespace ffn_ops::cuda {

struct Moe : MoeShape {
  Experts experts;
};

Moe describe(Call& call, const MoeShape& s, const MaybeTensor& token, const MaybeTensor& weight,
             const MaybeTensor& offsets, const MaybeTensor& row, const MaybeTensor& slot_offsets);

// Gate and up [R, F] and h [R, F], each where given.
void pre_activations(Call& call, const Moe& c, const Tensor& x, const WithWeights& product, const MaybeTensor& b_in,
                     void* gate, void* up, void* h);

// The results of backward's pass over the hidden width, each only if it has memory.
struct HiddenGradient {
  void* d_hidden = nullptr;  // [R, 2F]: d_gate, then d_up
  void* h = nullptr;         // [R, F], times the row's weight where `weigh_h` says so
  bool weigh_h = true;
  void* parts = nullptr;  // [R, num_parts]: of the gradient of the row's weight
  int64_t num_parts = 0;
};

void hidden_gradient(const Moe& c, const Tensor& d_y, const WithWeights& product, const void* gate, const void* up,
                     const HiddenGradient& out);

void weight_gradient(Call& call, const Moe& c, const Tensor& d_y, const MaybeTensor& b_down, const HiddenGradient& of,
                     Tensor& d_weight);

}  // namespace ffn_ops::cuda
