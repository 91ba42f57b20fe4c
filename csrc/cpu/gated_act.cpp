// SPDX-License-Identifier: BSD-3-Clause
// gated_act on the CPU: forward, backward and the derivatives of backward.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "passes.h"

namespace ffn_ops {
namespace {

GatedAct elementwise(const Tensor& gate, const std::optional<Tensor>& up, const Gate& form) {
  const GatedActShape s = check_gated_act(gate, up, form);
  GatedAct g;
  g.set_form(s.form);
  g.rows = s.rows;
  g.cols = s.cols;
  g.gate = matrix(gate, s.dtype);
  if (up) g.up = matrix(*up, s.dtype);
  g.out_stride = g.cols;
  return g;
}

Tensor gated_act(const Tensor& gate, std::optional<Tensor> up, std::string activation, std::vector<double> params) {
  GatedAct g = elementwise(gate, up, check_gate(activation, params));
  Tensor out = fresh(gate, {g.rows, g.cols});
  g.out[0] = out.mutable_data_ptr();
  run_elementwise(g, kernels().gated_act);
  return out;
}

std::tuple<Tensor, Tensor> gated_act_backward(const Tensor& d_out, const Tensor& gate, std::optional<Tensor> up,
                                              std::string activation, std::vector<double> params,
                                              std::vector<bool> needs) {
  check_needs(needs, 2);
  GatedAct g = elementwise(gate, up, check_gate(activation, params));
  check_same(d_out, "d_out", gate, g.gate.dtype);
  g.d_out = matrix(d_out, g.gate.dtype);
  Tensor d_gate = needs.at(0) ? fresh(gate, {g.rows, g.cols}) : nothing(gate);
  Tensor d_up = needs.at(1) && up ? fresh(gate, {g.rows, g.cols}) : nothing(gate);
  if (needs[0]) g.out[0] = d_gate.mutable_data_ptr();
  if (needs[1] && up) g.out[1] = d_up.mutable_data_ptr();
  run_elementwise(g, kernels().gated_act_backward);
  return {d_gate, d_up};
}

std::tuple<Tensor, Tensor, Tensor> gated_act_double_backward(std::optional<Tensor> dd_gate, std::optional<Tensor> dd_up,
                                                             const Tensor& d_out, const Tensor& gate,
                                                             std::optional<Tensor> up, std::string activation,
                                                             std::vector<double> params) {
  GatedAct g = elementwise(gate, up, check_gate(activation, params));
  const DType dtype = g.gate.dtype;
  check_same(d_out, "d_out", gate, dtype);
  g.d_out = matrix(d_out, dtype);
  if (dd_gate) {
    check_same(*dd_gate, "dd_gate", gate, dtype);
    g.dd_gate = matrix(*dd_gate, dtype);
  }
  if (dd_up) {
    STD_TORCH_CHECK(up.has_value(), "dd_up: expected none where up is none");
    check_same(*dd_up, "dd_up", gate, dtype);
    g.dd_up = matrix(*dd_up, dtype);
  }
  Tensor by_d = fresh(gate, {g.rows, g.cols});
  Tensor by_gate = fresh(gate, {g.rows, g.cols});
  Tensor by_up = up ? fresh(gate, {g.rows, g.cols}) : nothing(gate);
  g.out[0] = by_d.mutable_data_ptr();
  g.out[1] = by_gate.mutable_data_ptr();
  if (up) g.out[2] = by_up.mutable_data_ptr();
  run_elementwise(g, kernels().gated_act_double_backward);
  return {by_d, by_gate, by_up};
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("gated_act", TORCH_BOX(&ffn_ops::gated_act));
  m.impl("gated_act_backward", TORCH_BOX(&ffn_ops::gated_act_backward));
  m.impl("gated_act_double_backward", TORCH_BOX(&ffn_ops::gated_act_double_backward));
}
