// SPDX-License-Identifier: BSD-3-Clause
// learned_act on a GPU: an activation whose own parameters are a tensor, its backward, and the derivatives of d_x. The
// kernels read the parameters where they are: the host never waits for them.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "passes.h"

namespace ffn_ops::cuda {
namespace {

OwnSums describe(Call& call, const LearnedActShape& s, const Tensor& x, const Tensor& own) {
  OwnSums g;
  g.set_form(s.form);
  g.rows = s.rows;
  g.cols = s.cols;
  g.dtype = s.dtype;
  g.gate = matrix(x);
  g.own_values = call.dense(own);
  return g;
}

// A new output of the call, entered into the pass.
Tensor output(const Call& call, GatedAct& g, int place) {
  Tensor out = call.fresh({g.rows, g.cols});
  g.out[place] = out.mutable_data_ptr();
  g.out_stride[place] = g.cols;
  return out;
}

Tensor own_sums(Call& call, const OwnSums& g, const LearnedActShape& s) {
  Tensor sums = call.fresh(arithmetic_dtype(s.dtype), {s.count});
  launch_own_sums(call, g, s.count, sums.mutable_data_ptr());
  return sums;
}

Tensor learned_act(const Tensor& x, const Tensor& own, std::string activation) {
  Call call(x, "x");
  GatedAct g = describe(call, check_learned_act(x, own, activation, call.place()), x, own);
  Tensor out = output(call, g, 0);
  launch_gated_act(call, g);
  return out;
}

std::tuple<Tensor, Tensor> learned_act_backward(const Tensor& d_out, const Tensor& x, const Tensor& own,
                                                std::string activation, std::vector<bool> needs) {
  check_needs(needs, 2);
  Call call(x, "x");
  const LearnedActShape s = check_learned_act(x, own, activation, call.place());
  check_same(d_out, "d_out", x, s.dtype, call.place());
  OwnSums g = describe(call, s, x, own);
  g.d_out = matrix(d_out);
  Tensor d_own = needs[1] ? own_sums(call, g, s) : call.fresh(arithmetic_dtype(s.dtype), {0});
  Tensor d_x = needs[0] ? output(call, g, 0) : call.nothing();
  if (needs[0]) launch_gated_act_backward(call, g);
  return {d_x, d_own};
}

std::tuple<Tensor, Tensor, Tensor> learned_act_double_backward(const Tensor& dd_x, const Tensor& d_out, const Tensor& x,
                                                               const Tensor& own, std::string activation) {
  Call call(x, "x");
  const LearnedActShape s = check_learned_act(x, own, activation, call.place());
  check_same(dd_x, "dd_x", x, s.dtype, call.place());
  check_same(d_out, "d_out", x, s.dtype, call.place());
  OwnSums g = describe(call, s, x, own);
  g.d_out = matrix(d_out);
  g.dd_gate = matrix(dd_x);
  Tensor by_own = own_sums(call, g, s);
  Tensor by_d = output(call, g, 0), by_x = output(call, g, 1);
  launch_gated_act_double_backward(call, g);
  return {by_d, by_x, by_own};
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("learned_act", TORCH_BOX(&ffn_ops::cuda::learned_act));
  m.impl("learned_act_backward", TORCH_BOX(&ffn_ops::cuda::learned_act_backward));
  m.impl("learned_act_double_backward", TORCH_BOX(&ffn_ops::cuda::learned_act_double_backward));
}
