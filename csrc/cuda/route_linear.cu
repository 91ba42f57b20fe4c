// SPDX-License-Identifier: BSD-3-Clause
// route_linear on a GPU: a router's logits, and their backward, as products of one expert in the arithmetic's dtype.
// 16-bit tensors are copied to float32: a router is a small part of a mixture, and its rounding decides the experts.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "experts.h"
#include "passes.h"

namespace ffn_ops::cuda {
namespace {

using torch::headeronly::ScalarType;

Tensor widened(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Half || type == ScalarType::BFloat16 ? torch::stable::to(t, ScalarType::Float) : t;
}

Tensor narrowed(const Tensor& t, const Tensor& like) {
  return t.scalar_type() == like.scalar_type() ? t : torch::stable::to(t, like.scalar_type());
}

// All rows belong to the one expert.
Experts one_expert(const RouteLinearShape& s) {
  return {.dtype = s.arithmetic(), .E = 1, .R = s.T, .offsets = nullptr};
}

Operand rows_of_matrix(const Tensor& t) {
  Operand o;
  o.data = t.const_data_ptr();
  o.lane_stride = t.stride(0);
  o.k_stride = t.size(1) > 1 ? t.stride(1) : 1;
  return o;
}

Operand columns_of_matrix(const Tensor& t) {
  Operand o = rows_of_matrix(t);
  std::swap(o.lane_stride, o.k_stride);
  return o;
}

Tensor route_linear(const Tensor& x, const Tensor& weight, MaybeTensor bias) {
  Call call(x, "x");
  const RouteLinearShape s = check_route_linear(x, weight, bias, call.place());
  const Tensor rows = widened(x), experts = widened(weight);
  Tensor logits = call.fresh(s.arithmetic(), {s.T, s.E});
  GroupedGemm g = rows_product(one_expert(s), rows_of_matrix(rows), s.D, s.E);
  g.b = rows_of_matrix(experts);
  g.epilogue.out = logits.mutable_data_ptr();
  g.epilogue.out_stride = s.E;
  g.epilogue.bias = bias ? call.dense(widened(*bias)) : nullptr;
  g.epilogue.bias_stride = s.E;
  launch_product(call, g);
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> route_linear_backward(const Tensor& d_logits, const Tensor& x, const Tensor& weight,
                                                         std::vector<bool> needs) {
  Call call(x, "x");
  const RouteLinearShape s = check_route_linear_gradient(d_logits, x, weight, needs, call.place());
  const Experts all = one_expert(s);
  Tensor d_x = call.nothing(), d_weight = narrowed(call.nothing(), weight), d_bias = narrowed(call.nothing(), weight);
  if (needs[0]) {
    const Tensor experts = widened(weight);
    Tensor wide = call.fresh(s.arithmetic(), {s.T, s.D});
    GroupedGemm g = rows_product(all, rows_of_matrix(d_logits), s.E, s.D);
    g.b = columns_of_matrix(experts);
    g.epilogue.out = wide.mutable_data_ptr();
    g.epilogue.out_stride = s.D;
    launch_product(call, g);
    d_x = narrowed(wide, x);
  }
  if (needs[1]) {
    const Tensor rows = widened(x);
    Tensor wide = call.fresh(s.arithmetic(), {s.E, s.D});
    outer_products(call, all, rows_of_matrix(d_logits), s.E, rows_of_matrix(rows), s.D, wide);
    d_weight = narrowed(wide, weight);
  }
  if (needs[2]) {
    Tensor wide = call.fresh(s.arithmetic(), {s.E});
    sum_rows(call, d_logits, s.arithmetic(), wide);
    d_bias = narrowed(wide, weight);
  }
  return {d_x, d_weight, d_bias};
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("route_linear", TORCH_BOX(&ffn_ops::cuda::route_linear));
  m.impl("route_linear_backward", TORCH_BOX(&ffn_ops::cuda::route_linear_backward));
}
