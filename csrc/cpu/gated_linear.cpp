// SPDX-License-Identifier: BSD-3-Clause
// gated_linear on the CPU: a sum of gated branches in one product, and its backward.
#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace ffn_ops {
namespace {

struct GatedLinear : GatedLinearShape {
  std::vector<Operand> forward;   // gate and up weights of each branch, lanes = their rows
  std::vector<Operand> backward;  // all gate weights, then all up weights, k = their rows
};

GatedLinear with_operands(const GatedLinearShape& shape, const std::vector<Tensor>& w_gate,
                          const std::vector<Tensor>& w_up) {
  GatedLinear c{shape, {}, {}};
  for (size_t i = 0; i < w_gate.size(); ++i) {
    c.forward.push_back(lanes_are_rows(matrix(w_gate[i], c.dtype)));
    c.forward.push_back(lanes_are_rows(matrix(w_up[i], c.dtype)));
  }
  for (const auto* list : {&w_gate, &w_up})
    for (const Tensor& w : *list) c.backward.push_back(lanes_are_columns(matrix(w, c.dtype)));
  return c;
}

std::tuple<Tensor, Tensor, Tensor> gated_linear(const Tensor& x, std::vector<Tensor> w_gate, std::vector<Tensor> w_up,
                                                std::vector<Tensor> b_gate, std::vector<Tensor> b_up,
                                                std::string activation, std::vector<double> params, bool save) {
  const GatedLinear c =
      with_operands(check_gated_linear(x, w_gate, w_up, b_gate, b_up, check_gate(activation, params)), w_gate, w_up);
  std::vector<Tensor> keep;
  std::vector<const void*> bias(static_cast<size_t>(2 * c.G), nullptr);
  for (size_t i = 0; i < b_gate.size(); ++i) bias[2 * i] = dense_data(b_gate[i], keep);
  for (size_t i = 0; i < b_up.size(); ++i) bias[2 * i + 1] = dense_data(b_up[i], keep);
  Tensor y = fresh(x, {c.T, c.F});
  Tensor gate = save ? fresh(x, {c.G, c.T, c.F}) : nothing(x);
  Tensor up = save ? fresh(x, {c.G, c.T, c.F}) : nothing(x);

  Gemm g;
  g.M = c.T;
  g.N = c.F;
  g.K = c.D;
  g.a = lanes_are_rows(matrix(x, c.dtype));
  g.b = c.forward.data();
  g.num_b = 2 * c.G;
  g.gated = true;
  Epilogue& e = g.epilogue;
  e.kind = Epilogue::Kind::kActivate;
  e.dtype = c.dtype;
  e.out = y.mutable_data_ptr();
  e.out_stride = c.F;
  if (save) {
    e.gate = gate.mutable_data_ptr();
    e.up = up.mutable_data_ptr();
    e.pre_stride = c.F;
    e.pre_branch_stride = c.T * c.F;
  }
  e.bias = bias.data();
  e.set_form(c.form);
  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  steps.product(g);
  steps.run();
  return {y, gate, up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_linear_backward(
    const Tensor& d_y, const Tensor& x, std::vector<Tensor> w_gate, std::vector<Tensor> w_up,
    std::vector<Tensor> b_gate, std::vector<Tensor> b_up, const Tensor& gate, const Tensor& up, std::string activation,
    std::vector<double> params, std::vector<bool> needs) {
  const GatedLinear c =
      with_operands(check_gated_linear(x, w_gate, w_up, b_gate, b_up, check_gate(activation, params)), w_gate, w_up);
  check_gated_linear_gradient(c, d_y, gate, up, needs);
  const int64_t half = c.G * c.F;
  Workspace workspace;
  Steps steps(kernels(), workspace, threads());

  // d_hidden [T, 2 G F]: all d_gate, then all d_up.
  void* d_hidden = workspace.take(static_cast<size_t>(c.T * 2 * half * storage_size(c.dtype)), "d_hidden");
  const Matrix d_hidden_matrix = dense(d_hidden, 2 * half, c.dtype);
  for (int64_t i = 0; i < c.G; ++i) {
    GatedAct a;
    a.set_form(c.form);
    a.rows = c.T;
    a.cols = c.F;
    a.gate = dense(advance(gate.const_data_ptr(), i * c.T * c.F, c.dtype), c.F, c.dtype);
    a.up = dense(advance(up.const_data_ptr(), i * c.T * c.F, c.dtype), c.F, c.dtype);
    a.d_out = matrix(d_y, c.dtype);
    a.out[0] = advance(d_hidden, i * c.F, c.dtype);
    a.out[1] = advance(d_hidden, half + i * c.F, c.dtype);
    a.out_stride = 2 * half;
    add_gated_act_backward(steps, a);
  }

  Tensor d_x = needs.at(0) ? fresh(x, {c.T, c.D}) : nothing(x);
  Gemm g;
  g.epilogue.dtype = c.dtype;
  g.epilogue.out_stride = c.D;
  g.N = c.D;
  if (needs[0]) {
    g.M = c.T;
    g.K = 2 * half;
    g.a = lanes_are_rows(d_hidden_matrix);
    g.b = c.backward.data();
    g.num_b = 2 * c.G;
    g.epilogue.out = d_x.mutable_data_ptr();
    steps.product(g);
  }
  Tensor d_w[2] = {nothing(x), nothing(x)};
  Tensor d_b[2] = {nothing(x), nothing(x)};
  const Operand tokens = lanes_are_columns(matrix(x, c.dtype));
  for (int i = 0; i < 2; ++i) {
    const Matrix part = dense(advance(d_hidden, i * half, c.dtype), 2 * half, c.dtype);
    if (needs.at(static_cast<size_t>(1 + i))) {
      d_w[i] = fresh(x, {c.G, c.F, c.D});
      g.M = half;
      g.K = c.T;
      g.a = lanes_are_columns(part);
      g.b = &tokens;
      g.num_b = 1;
      g.epilogue.out = d_w[i].mutable_data_ptr();
      steps.product(g);
    }
    if (needs.at(static_cast<size_t>(3 + i))) {
      d_b[i] = fresh(x, {c.G, c.F});
      add_column_sum(steps, part, c.T, half, d_b[i].mutable_data_ptr());
    }
  }
  steps.run();
  return {d_x, d_w[0], d_w[1], d_b[0], d_b[1]};
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("gated_linear", TORCH_BOX(&ffn_ops::gated_linear));
  m.impl("gated_linear_backward", TORCH_BOX(&ffn_ops::gated_linear_backward));
}
