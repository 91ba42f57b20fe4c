// SPDX-License-Identifier: BSD-3-Clause
// gated_linear on a GPU: each branch's two products by torch's cuBLAS, one element-wise pass that adds the branch to
// the sum, and their backward.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "passes.h"

namespace ffn_ops::cuda {
namespace {

GatedAct describe(const GatedLinearShape& s, const Tensor& gate, const Tensor& up) {
  GatedAct a;
  a.set_form(s.form);
  a.rows = s.T;
  a.cols = s.F;
  a.dtype = s.dtype;
  a.gate = matrix(gate);
  a.up = matrix(up);
  return a;
}

MaybeTensor of_branch(const std::vector<Tensor>& biases, size_t i) {
  return biases.empty() ? MaybeTensor() : MaybeTensor(biases[i]);
}

std::tuple<Tensor, Tensor, Tensor> gated_linear(const Tensor& x, std::vector<Tensor> w_gate, std::vector<Tensor> w_up,
                                                std::vector<Tensor> b_gate, std::vector<Tensor> b_up,
                                                std::string activation, std::vector<double> params, bool save) {
  Call call(x, "x");
  const GatedLinearShape s =
      check_gated_linear(x, w_gate, w_up, b_gate, b_up, check_gate(activation, params), call.place());
  Tensor y = call.fresh({s.T, s.F});
  const int64_t kept = save ? s.G : 1;  // else each branch overwrites the previous one
  Tensor gate = call.fresh({kept, s.T, s.F}), up = call.fresh({kept, s.T, s.F});
  void* sum = s.G > 1 ? call.workspace(s.T * s.F * storage_size(arithmetic_dtype(s.dtype))) : nullptr;
  for (int64_t i = 0; i < s.G; ++i) {
    const auto branch = static_cast<size_t>(i);
    const int64_t at = save ? i * s.T * s.F : 0;
    const Tensor g = view(gate, at, s.T, s.F, s.F, 1), u = view(up, at, s.T, s.F, s.F, 1);
    linear(x, w_gate[branch], of_branch(b_gate, branch), g);
    linear(x, w_up[branch], of_branch(b_up, branch), u);
    GatedAct a = describe(s, g, u);
    const bool last = i + 1 == s.G;
    if (last) a.out[0] = y.mutable_data_ptr();
    a.out_stride[0] = s.F;
    a.sum = sum;
    a.accumulate = i > 0;
    launch_gated_act(call, a);
  }
  if (!save) return {y, call.nothing(), call.nothing()};
  return {y, gate, up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_linear_backward(
    const Tensor& d_y, const Tensor& x, std::vector<Tensor> w_gate, std::vector<Tensor> w_up,
    std::vector<Tensor> b_gate, std::vector<Tensor> b_up, const Tensor& gate, const Tensor& up, std::string activation,
    std::vector<double> params, std::vector<bool> needs) {
  Call call(x, "x");
  const GatedLinearShape s =
      check_gated_linear(x, w_gate, w_up, b_gate, b_up, check_gate(activation, params), call.place());
  check_gated_linear_gradient(s, d_y, gate, up, needs, call.place());
  const int64_t half = s.G * s.F;

  // d_hidden [T, 2 G F]: all d_gate, then all d_up.
  Tensor d_hidden = call.fresh({s.T, 2 * half});
  for (int64_t i = 0; i < s.G; ++i) {
    const int64_t at = i * s.T * s.F;
    GatedAct a = describe(s, view(gate, at, s.T, s.F, s.F, 1), view(up, at, s.T, s.F, s.F, 1));
    a.d_out = matrix(d_y);
    a.out[0] = advance(d_hidden.mutable_data_ptr(), i * s.F, s.dtype);
    a.out[1] = advance(a.out[0], half, s.dtype);
    a.out_stride[0] = a.out_stride[1] = 2 * half;
    launch_gated_act_backward(call, a);
  }

  Tensor d_x = needs[0] ? call.fresh({s.T, s.D}) : call.nothing();
  for (int64_t i = 0; needs[0] && i < 2 * s.G; ++i) {
    const Tensor part = view(d_hidden, i * s.F, s.T, s.F, 2 * half, 1);
    const Tensor& w = i < s.G ? w_gate[static_cast<size_t>(i)] : w_up[static_cast<size_t>(i - s.G)];
    if (i == 0) product(part, w, d_x);
    else product_plus(part, w, d_x, d_x);
  }
  Tensor d_w[2] = {call.nothing(), call.nothing()};
  Tensor d_b[2] = {call.nothing(), call.nothing()};
  for (int i = 0; i < 2; ++i) {
    const Tensor part = view(d_hidden, i * half, s.T, half, 2 * half, 1);
    if (needs[static_cast<size_t>(1 + i)]) {
      d_w[i] = call.fresh({s.G, s.F, s.D});
      product(transposed(part), x, view(d_w[i], 0, half, s.D, s.D, 1));
    }
    if (needs[static_cast<size_t>(3 + i)]) {
      d_b[i] = call.fresh({s.G, s.F});
      sum_rows(call, part, s.dtype, d_b[i]);
    }
  }
  return {d_x, d_w[0], d_w[1], d_b[0], d_b[1]};
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("gated_linear", TORCH_BOX(&ffn_ops::cuda::gated_linear));
  m.impl("gated_linear_backward", TORCH_BOX(&ffn_ops::cuda::gated_linear_backward));
}
