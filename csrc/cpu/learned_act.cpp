// SPDX-License-Identifier: BSD-3-Clause
// learned_act on the CPU: an activation whose own parameters are a tensor, its backward, and the derivatives of d_x.
#include <array>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "passes.h"

namespace ffn_ops {
namespace {

double element(const void* values, int64_t at, DType dtype) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(values)[at]
                                  : static_cast<double>(static_cast<const float*>(values)[at]);
}

// The pass with the present values of the parameters.
GatedAct describe(const LearnedActShape& s, const Tensor& x, const Tensor& own) {
  GatedAct g;
  g.set_form(s.form);
  g.rows = s.rows;
  g.cols = s.cols;
  g.gate = matrix(x, s.dtype);
  g.out_stride = g.cols;
  for (int64_t k = 0; k < s.count; ++k) g.own[k] = element(own.const_data_ptr(), k * own.stride(0), s.dtype);
  return g;
}

// Each task adds on its own, then their sums are added in order.
Tensor own_sums(GatedAct g, const LearnedActShape& s) {
  const ElementwiseTasks tasks(g);
  std::vector<std::array<double, kMostOwnParams>> sums(static_cast<size_t>(tasks.count()));
  tasks.run(
      [&](const Range& range, int64_t task) { kernels().own_sums(g, range, sums[static_cast<size_t>(task)].data()); });
  Tensor out = fresh_arithmetic(arithmetic_dtype(s.dtype), {s.count});
  for (int64_t k = 0; k < s.count; ++k) {
    double total = 0;
    for (const auto& part : sums) total += part[static_cast<size_t>(k)];
    if (s.dtype == DType::kFloat64) static_cast<double*>(out.mutable_data_ptr())[k] = total;
    else static_cast<float*>(out.mutable_data_ptr())[k] = static_cast<float>(total);
  }
  return out;
}

Tensor learned_act(const Tensor& x, const Tensor& own, std::string activation) {
  GatedAct g = describe(check_learned_act(x, own, activation), x, own);
  Tensor out = fresh(x, {g.rows, g.cols});
  g.out[0] = out.mutable_data_ptr();
  run_elementwise(g, kernels().gated_act);
  return out;
}

std::tuple<Tensor, Tensor> learned_act_backward(const Tensor& d_out, const Tensor& x, const Tensor& own,
                                                std::string activation, std::vector<bool> needs) {
  check_needs(needs, 2);
  const LearnedActShape s = check_learned_act(x, own, activation);
  check_same(d_out, "d_out", x, s.dtype);
  GatedAct g = describe(s, x, own);
  g.d_out = matrix(d_out, s.dtype);
  Tensor d_own = needs[1] ? own_sums(g, s) : nothing(own);
  Tensor d_x = needs[0] ? fresh(x, {g.rows, g.cols}) : nothing(x);
  if (needs[0]) {
    g.out[0] = d_x.mutable_data_ptr();
    run_elementwise(g, kernels().gated_act_backward);
  }
  return {d_x, d_own};
}

std::tuple<Tensor, Tensor, Tensor> learned_act_double_backward(const Tensor& dd_x, const Tensor& d_out, const Tensor& x,
                                                               const Tensor& own, std::string activation) {
  const LearnedActShape s = check_learned_act(x, own, activation);
  check_same(dd_x, "dd_x", x, s.dtype);
  check_same(d_out, "d_out", x, s.dtype);
  GatedAct g = describe(s, x, own);
  g.d_out = matrix(d_out, s.dtype);
  g.dd_gate = matrix(dd_x, s.dtype);
  Tensor by_own = own_sums(g, s);
  Tensor by_d = fresh(x, {g.rows, g.cols}), by_x = fresh(x, {g.rows, g.cols});
  g.out[0] = by_d.mutable_data_ptr();
  g.out[1] = by_x.mutable_data_ptr();
  run_elementwise(g, kernels().gated_act_double_backward);
  return {by_d, by_x, by_own};
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("learned_act", TORCH_BOX(&ffn_ops::learned_act));
  m.impl("learned_act_backward", TORCH_BOX(&ffn_ops::learned_act_backward));
  m.impl("learned_act_double_backward", TORCH_BOX(&ffn_ops::learned_act_double_backward));
}
