// SPDX-License-Identifier: BSD-3-Clause
// gated_act on a GPU: forward, backward and the derivatives of backward.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "passes.h"

namespace ffn_ops::cuda {
namespace {

GatedAct describe(const GatedActShape& s, const Tensor& gate, const MaybeTensor& up) {
  GatedAct g;
  g.set_form(s.form);
  g.rows = s.rows;
  g.cols = s.cols;
  g.dtype = s.dtype;
  g.gate = matrix(gate);
  if (up) g.up = matrix(*up);
  return g;
}

// A new output of the call, entered into the pass; empty if it is not needed.
Tensor output(const Call& call, GatedAct& g, int place, bool asked) {
  if (!asked) return call.nothing();
  Tensor out = call.fresh({g.rows, g.cols});
  g.out[place] = out.mutable_data_ptr();
  g.out_stride[place] = g.cols;
  return out;
}

Tensor gated_act(const Tensor& gate, MaybeTensor up, std::string activation, std::vector<double> params) {
  const Call call(gate, "gate");
  const Gate form = check_gate(activation, params);
  GatedAct g = describe(check_gated_act(gate, up, form, call.place()), gate, up);
  Tensor out = output(call, g, 0, true);
  launch_gated_act(call, g);
  return out;
}

std::tuple<Tensor, Tensor> gated_act_backward(const Tensor& d_out, const Tensor& gate, MaybeTensor up,
                                              std::string activation, std::vector<double> params,
                                              std::vector<bool> needs) {
  check_needs(needs, 2);
  const Call call(gate, "gate");
  const Gate form = check_gate(activation, params);
  GatedAct g = describe(check_gated_act(gate, up, form, call.place()), gate, up);
  check_same(d_out, "d_out", gate, g.dtype, call.place());
  g.d_out = matrix(d_out);
  Tensor d_gate = output(call, g, 0, needs[0]);
  Tensor d_up = output(call, g, 1, needs[1] && up);
  launch_gated_act_backward(call, g);
  return {d_gate, d_up};
}

std::tuple<Tensor, Tensor, Tensor> gated_act_double_backward(MaybeTensor dd_gate, MaybeTensor dd_up,
                                                             const Tensor& d_out, const Tensor& gate, MaybeTensor up,
                                                             std::string activation, std::vector<double> params) {
  const Call call(gate, "gate");
  const Gate form = check_gate(activation, params);
  GatedAct g = describe(check_gated_act(gate, up, form, call.place()), gate, up);
  check_same(d_out, "d_out", gate, g.dtype, call.place());
  g.d_out = matrix(d_out);
  STD_TORCH_CHECK(!dd_up || up, "dd_up: expected none where up is none");
  if (dd_gate) check_same(*dd_gate, "dd_gate", gate, g.dtype, call.place());
  if (dd_up) check_same(*dd_up, "dd_up", gate, g.dtype, call.place());
  if (dd_gate) g.dd_gate = matrix(*dd_gate);
  if (dd_up) g.dd_up = matrix(*dd_up);
  Tensor by_d = output(call, g, 0, true);
  Tensor by_gate = output(call, g, 1, true);
  Tensor by_up = output(call, g, 2, up.has_value());
  launch_gated_act_double_backward(call, g);
  return {by_d, by_gate, by_up};
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("gated_act", TORCH_BOX(&ffn_ops::cuda::gated_act));
  m.impl("gated_act_backward", TORCH_BOX(&ffn_ops::cuda::gated_act_backward));
  m.impl("gated_act_double_backward", TORCH_BOX(&ffn_ops::cuda::gated_act_double_backward));
}
