// SPDX-License-Identifier: BSD-3-Clause
// route_linear on the CPU: a router's logits, unrounded from tensors of any storage dtype, and their backward.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace ffn_ops {
namespace {

Tensor route_linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  const RouteLinearShape s = check_route_linear(x, weight, bias);
  std::vector<Tensor> keep;
  const void* const biases[] = {dense_data(bias, keep)};
  Tensor logits = fresh_arithmetic(s.dtype, {s.T, s.E});
  const Operand experts = lanes_are_rows(matrix(weight, s.weight_dtype));
  Gemm g;
  g.M = s.T;
  g.N = s.E;
  g.K = s.D;
  g.a = lanes_are_rows(matrix(x, s.dtype));
  g.b = &experts;
  g.mixed = s.dtype != s.weight_dtype;
  g.epilogue.dtype = s.weight_dtype;
  g.epilogue.out_unrounded = true;
  g.epilogue.out = logits.mutable_data_ptr();
  g.epilogue.out_stride = s.E;
  g.epilogue.bias = biases;
  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  steps.product(g);
  steps.run();
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> route_linear_backward(const Tensor& d_logits, const Tensor& x, const Tensor& weight,
                                                         std::vector<bool> needs) {
  const RouteLinearShape s = check_route_linear_gradient(d_logits, x, weight, needs);
  Tensor d_x = needs[0] ? fresh(x, {s.T, s.D}) : nothing(x);
  Tensor d_weight = needs[1] ? fresh(weight, {s.E, s.D}) : nothing(weight);
  Tensor d_bias = needs[2] ? fresh(d_logits, {s.E}) : nothing(weight);
  const Matrix d = matrix(d_logits, s.arithmetic());
  const Operand experts = lanes_are_columns(matrix(weight, s.weight_dtype));
  const Operand tokens = lanes_are_columns(matrix(x, s.dtype));
  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  Gemm g;
  g.mixed = s.dtype != s.arithmetic();
  g.N = s.D;
  g.epilogue.out_stride = s.D;
  if (needs[0]) {
    g.M = s.T;
    g.K = s.E;
    g.a = lanes_are_rows(d);
    g.b = &experts;
    g.epilogue.dtype = s.dtype;
    g.epilogue.out = d_x.mutable_data_ptr();
    steps.product(g);
  }
  if (needs[1]) {
    g.M = s.E;
    g.K = s.T;
    g.a = lanes_are_columns(d);
    g.b = &tokens;
    g.epilogue.dtype = s.weight_dtype;
    g.epilogue.out = d_weight.mutable_data_ptr();
    steps.product(g);
  }
  if (needs[2]) add_column_sum(steps, d, s.T, s.E, d_bias.mutable_data_ptr());
  steps.run();
  if (needs[2] && s.weight_dtype != s.arithmetic()) d_bias = torch::stable::to(d_bias, weight.scalar_type());
  return {d_x, d_weight, d_bias};
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("route_linear", TORCH_BOX(&ffn_ops::route_linear));
  m.impl("route_linear_backward", TORCH_BOX(&ffn_ops::route_linear_backward));
}
