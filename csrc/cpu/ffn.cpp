// SPDX-License-Identifier: BSD-3-Clause
// ffn on the CPU: plain and gated feed-forward layers, and their backward.
#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace ffn_ops {
namespace {

struct Ffn : FfnShape {
  std::vector<Operand> in;        // gate and up weights, or the one input weight: lanes = rows
  std::vector<const void*> bias;  // of the same
  std::vector<Operand> in_by_k;   // the input weights for d_x: k = rows, in the order of d_hidden
  std::vector<Tensor> keep;
};

Ffn with_operands(const FfnShape& shape, const Tensor& w_in, const std::optional<Tensor>& w_up,
                  const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_up) {
  Ffn c;
  static_cast<FfnShape&>(c) = shape;
  Matrix gate_rows = matrix(w_in, c.dtype), up_rows = matrix(w_in, c.dtype, c.interleaved ? 1 : c.F);
  if (c.interleaved) gate_rows.row_stride = up_rows.row_stride = 2 * gate_rows.row_stride;
  c.in.push_back(lanes_are_rows(gate_rows));
  c.in_by_k.push_back(lanes_are_columns(matrix(w_in, c.dtype)));
  c.bias.push_back(dense_data(b_in && c.interleaved ? gate_then_up(*b_in) : b_in, c.keep));
  if (w_up) {
    c.in.push_back(lanes_are_rows(matrix(*w_up, c.dtype)));
    c.in_by_k.push_back(lanes_are_columns(matrix(*w_up, c.dtype)));
    c.bias.push_back(dense_data(b_up, c.keep));
  } else if (c.fused) {
    c.in.push_back(lanes_are_rows(up_rows));
    c.bias.push_back(advance(c.bias[0], c.F, c.dtype));
  }
  return c;
}

// Rows [begin, end) of gate and up (saved where given) and of h (where given).
Gemm pre_activations(const Ffn& c, const Tensor& x, int64_t begin, int64_t end, void* gate, void* up, void* h) {
  Gemm g;
  g.M = end - begin;
  g.N = c.F;
  g.K = c.D;
  g.a = lanes_are_rows(matrix(x, c.dtype, begin));
  g.b = c.in.data();
  g.num_b = static_cast<int64_t>(c.in.size());
  g.gated = c.gated;
  Epilogue& e = g.epilogue;
  e.kind = Epilogue::Kind::kActivate;
  e.dtype = c.dtype;
  e.out = h;
  e.out_stride = c.F;
  e.gate = advance(gate, begin * c.F, c.dtype);
  e.up = advance(up, begin * c.F, c.dtype);
  e.pre_stride = c.F;
  e.bias = c.bias.data();
  e.set_form(c.form);
  return g;
}

std::tuple<Tensor, Tensor, Tensor> ffn(const Tensor& x, const Tensor& w_in, std::optional<Tensor> w_up,
                                       const Tensor& w_down, std::optional<Tensor> b_in, std::optional<Tensor> b_up,
                                       std::optional<Tensor> b_down, bool gated, bool interleaved,
                                       std::string activation, std::vector<double> params, bool save) {
  const Gate form = check_gate(activation, params);
  Ffn c = with_operands(check_ffn(x, w_in, w_up, w_down, b_in, b_up, gated, interleaved, form), w_in, w_up, b_in, b_up);
  if (b_down) check_tensor(*b_down, "b_down", c.dtype, {c.O});
  const void* bias_down = dense_data(b_down, c.keep);
  Tensor y = fresh(x, {c.T, c.O});
  Tensor gate = save ? fresh(x, {c.T, c.F}) : nothing(x);
  Tensor up = save && c.gated ? fresh(x, {c.T, c.F}) : nothing(x);
  const Operand down = lanes_are_rows(matrix(w_down, c.dtype));

  // Cuts tokens into blocks, so that h and the packed operands of a block stay in the last-level cache.
  constexpr int64_t kBlockBytes = int64_t{32} << 20;
  const int64_t row_bytes = (c.D + 2 * c.F) * (c.dtype == DType::kFloat64 ? 8 : 4);
  const int64_t most = std::max<int64_t>(256, kBlockBytes / std::max<int64_t>(1, row_bytes));
  const int64_t blocks = std::max<int64_t>(1, divide_up(c.T, most));
  const int64_t rows = divide_up(c.T, blocks);

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  void* h = workspace.take(static_cast<size_t>(rows * c.F * storage_size(c.dtype)), "h");
  for (int64_t begin = 0; begin < c.T; begin += rows) {
    const int64_t end = std::min(c.T, begin + rows);
    steps.product(pre_activations(c, x, begin, end, save ? gate.mutable_data_ptr() : nullptr,
                                  save && c.gated ? up.mutable_data_ptr() : nullptr, h));
    Gemm g;
    g.M = end - begin;
    g.N = c.O;
    g.K = c.F;
    g.a = lanes_are_rows(dense(h, c.F, c.dtype));
    g.b = &down;
    g.epilogue.dtype = c.dtype;
    g.epilogue.out = advance(y.mutable_data_ptr(), begin * c.O, c.dtype);
    g.epilogue.out_stride = c.O;
    g.epilogue.bias = &bias_down;
    steps.product(g);
  }
  steps.run();
  return {y, gate, up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_backward(
    const Tensor& d_y, const Tensor& x, const Tensor& w_in, std::optional<Tensor> w_up, const Tensor& w_down,
    std::optional<Tensor> b_in, std::optional<Tensor> b_up, const Tensor& gate, const Tensor& up, bool gated,
    bool interleaved, std::string activation, std::vector<double> params, std::vector<bool> needs) {
  check_needs(needs, 7);
  const Gate form = check_gate(activation, params);
  Ffn c = with_operands(check_ffn(x, w_in, w_up, w_down, b_in, b_up, gated, interleaved, form), w_in, w_up, b_in, b_up);
  check_tensor(d_y, "d_y", c.dtype, {c.T, c.O});
  const bool recompute = !check_saved("ffn", gate, up, c.dtype, c.T, c.F, c.gated);
  const bool need_x = needs.at(0), need_in = needs.at(1), need_up = needs.at(2) && w_up, need_down = needs.at(3);
  const bool need_b_in = needs.at(4), need_b_up = needs.at(5) && w_up, need_b_down = needs.at(6);
  const bool need_hidden = need_x || need_in || need_up || need_b_in || need_b_up;
  const int64_t element = storage_size(c.dtype);

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  void* gate_data = const_cast<void*>(gate.const_data_ptr());
  void* up_data = c.gated ? const_cast<void*>(up.const_data_ptr()) : nullptr;
  if (recompute && (need_hidden || need_down)) {
    gate_data = workspace.take(static_cast<size_t>(c.T * c.F * element), "gate");
    if (c.gated) up_data = workspace.take(static_cast<size_t>(c.T * c.F * element), "up");
    steps.product(pre_activations(c, x, 0, c.T, gate_data, up_data, nullptr));
  }

  Gemm g;
  g.epilogue.dtype = c.dtype;

  // d_hidden [T, 2F]: d_gate, then d_up, or alternating.
  const int64_t d_stride = apart(c.hidden(), c.dtype);
  const Operand down_by_k = lanes_are_columns(matrix(w_down, c.dtype));
  void* d_hidden = nullptr;
  void* h = need_down ? workspace.take(static_cast<size_t>(c.T * c.F * element), "h") : nullptr;
  if (need_hidden) {
    d_hidden = workspace.take(static_cast<size_t>(c.T * d_stride * element), "d_hidden");
    Gemm d = g;
    d.M = c.T;
    d.N = c.F;
    d.K = c.O;
    d.a = lanes_are_rows(matrix(d_y, c.dtype));
    d.b = &down_by_k;
    Epilogue& e = d.epilogue;
    e.kind = Epilogue::Kind::kActivateGrad;
    e.out = d_hidden;
    e.out_up = c.gated && !c.interleaved ? advance(d_hidden, c.F, c.dtype) : nullptr;
    e.interleaved = c.interleaved;
    e.out_stride = d_stride;
    e.h = h;
    e.gate = gate_data;
    e.up = up_data;
    e.pre_stride = c.F;
    e.set_form(c.form);
    steps.product(d);
  } else if (need_down) {
    // The same kernel as in the epilogue, so that the bits do not depend on which gradients are asked for.
    GatedAct a;
    a.set_form(c.form);
    a.rows = c.T;
    a.cols = a.out_stride = c.F;
    a.gate = a.d_out = dense(gate_data, c.F, c.dtype);
    if (c.gated) a.up = dense(up_data, c.F, c.dtype);
    a.out[2] = h;
    add_gated_act_backward(steps, a);
  }

  Tensor d_w_down = need_down ? fresh(x, {c.O, c.F}) : nothing(x);
  const Operand h_by_token = lanes_are_columns(dense(h, c.F, c.dtype));
  if (need_down) {
    g.M = c.O;
    g.N = c.F;
    g.K = c.T;
    g.a = lanes_are_columns(matrix(d_y, c.dtype));
    g.b = &h_by_token;
    g.epilogue.out = d_w_down.mutable_data_ptr();
    g.epilogue.out_stride = c.F;
    steps.product(g);
  }

  Tensor d_x = need_x ? fresh(x, {c.T, c.D}) : nothing(x);
  g.N = c.D;
  g.epilogue.out_stride = c.D;
  if (need_x) {
    g.M = c.T;
    g.K = c.hidden();
    g.a = lanes_are_rows(dense(d_hidden, d_stride, c.dtype));
    g.b = c.in_by_k.data();
    g.num_b = static_cast<int64_t>(c.in_by_k.size());
    g.epilogue.out = d_x.mutable_data_ptr();
    steps.product(g);
  }

  // Rows of d_hidden that belong to w_in and to w_up.
  const Operand tokens = lanes_are_columns(matrix(x, c.dtype));
  const int64_t in_rows = w_up ? c.F : c.hidden();
  Tensor d_w[2] = {nothing(x), nothing(x)};
  Tensor d_b[2] = {nothing(x), nothing(x)};
  const bool need_w[2] = {need_in, need_up};
  const bool need_b[2] = {need_b_in, need_b_up};
  for (int i = 0; i < 2; ++i) {
    const Matrix part = dense(advance(d_hidden, i * in_rows, c.dtype), d_stride, c.dtype);
    if (need_w[i]) {
      d_w[i] = fresh(x, {in_rows, c.D});
      g.M = in_rows;
      g.K = c.T;
      g.a = lanes_are_columns(part);
      g.b = &tokens;
      g.num_b = 1;
      g.epilogue.out = d_w[i].mutable_data_ptr();
      steps.product(g);
    }
    if (need_b[i]) {
      d_b[i] = fresh(x, {in_rows});
      add_column_sum(steps, part, c.T, in_rows, d_b[i].mutable_data_ptr());
    }
  }
  Tensor d_b_down = need_b_down ? fresh(x, {c.O}) : nothing(x);
  if (need_b_down) add_column_sum(steps, matrix(d_y, c.dtype), c.T, c.O, d_b_down.mutable_data_ptr());
  steps.run();
  return {d_x, d_w[0], d_w[1], d_w_down, d_b[0], d_b[1], d_b_down};
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("ffn", TORCH_BOX(&ffn_ops::ffn));
  m.impl("ffn_backward", TORCH_BOX(&ffn_ops::ffn_backward));
}
