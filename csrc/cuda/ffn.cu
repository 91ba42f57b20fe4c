// SPDX-License-Identifier: BSD-3-Clause
// ffn on a GPU: plain products by torch's cuBLAS, our element-wise passes between them, and the same for backward.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "passes.h"

namespace ffn_ops::cuda {
namespace {

struct Weight {
  Tensor matrix;
  MaybeTensor bias;
};

// The weights of gate and, where gated, of up.
std::vector<Weight> input_weights(const FfnShape& s, const Tensor& w_in, const MaybeTensor& w_up,
                                  const MaybeTensor& b_in, const MaybeTensor& b_up) {
  if (!s.fused) {
    std::vector<Weight> weights{{w_in, b_in}};
    if (w_up) weights.push_back({*w_up, b_up});
    return weights;
  }
  std::vector<Weight> halves;
  const int64_t step = s.interleaved ? 2 : 1;
  for (const int64_t first : {int64_t{0}, s.interleaved ? 1 : s.F}) {
    Weight half{rows_of(w_in, first, s.F, step), std::nullopt};
    if (b_in) half.bias = elements_of(*b_in, first, s.F, step);
    halves.push_back(half);
  }
  return halves;
}

struct PreActivations {
  Tensor gate, up;  // up: empty where plain
};

// Forward and recomputation in backward use the same products, so they have the same bits.
PreActivations pre_activations(const Call& call, const FfnShape& s, const Tensor& x,
                               const std::vector<Weight>& weights) {
  PreActivations pre{call.fresh({s.T, s.F}), s.gated ? call.fresh({s.T, s.F}) : call.nothing()};
  linear(x, weights[0].matrix, weights[0].bias, pre.gate);
  if (s.gated) linear(x, weights[1].matrix, weights[1].bias, pre.up);
  return pre;
}

GatedAct describe(const FfnShape& s, const Tensor& gate, const Tensor& up) {
  GatedAct a;
  a.set_form(s.form);
  a.rows = s.T;
  a.cols = s.F;
  a.dtype = s.dtype;
  a.gate = matrix(gate);
  if (s.gated) a.up = matrix(up);
  return a;
}

std::tuple<Tensor, Tensor, Tensor> ffn(const Tensor& x, const Tensor& w_in, MaybeTensor w_up, const Tensor& w_down,
                                       MaybeTensor b_in, MaybeTensor b_up, MaybeTensor b_down, bool gated,
                                       bool interleaved, std::string activation, std::vector<double> params,
                                       bool save) {
  const Call call(x, "x");
  const FfnShape s =
      check_ffn(x, w_in, w_up, w_down, b_in, b_up, gated, interleaved, check_gate(activation, params), call.place());
  if (b_down) check_tensor(*b_down, "b_down", s.dtype, {s.O}, call.place());
  Tensor y = call.fresh({s.T, s.O});
  PreActivations pre = pre_activations(call, s, x, input_weights(s, w_in, w_up, b_in, b_up));
  Tensor h = call.fresh({s.T, s.F});
  GatedAct a = describe(s, pre.gate, pre.up);
  a.out[0] = h.mutable_data_ptr();
  a.out_stride[0] = s.F;
  launch_gated_act(call, a);
  linear(h, w_down, b_down, y);
  if (!save) return {y, call.nothing(), call.nothing()};
  return {y, pre.gate, pre.up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_backward(
    const Tensor& d_y, const Tensor& x, const Tensor& w_in, MaybeTensor w_up, const Tensor& w_down, MaybeTensor b_in,
    MaybeTensor b_up, const Tensor& gate, const Tensor& up, bool gated, bool interleaved, std::string activation,
    std::vector<double> params, std::vector<bool> needs) {
  check_needs(needs, 7);
  Call call(x, "x");
  const FfnShape s =
      check_ffn(x, w_in, w_up, w_down, b_in, b_up, gated, interleaved, check_gate(activation, params), call.place());
  check_tensor(d_y, "d_y", s.dtype, {s.T, s.O}, call.place());
  const bool saved = check_saved("ffn", gate, up, s.dtype, s.T, s.F, s.gated, call.place());
  const bool need_x = needs[0], need_in = needs[1], need_up = needs[2] && w_up, need_down = needs[3];
  const bool need_b_in = needs[4], need_b_up = needs[5] && w_up, need_b_down = needs[6];
  const bool need_hidden = need_x || need_in || need_up || need_b_in || need_b_up;

  // d_hidden [T, 2F]: d_gate, then d_up, or alternating as in w_in. And h, for d_w_down.
  Tensor d_hidden = need_hidden ? call.fresh({s.T, s.hidden()}) : call.nothing();
  Tensor h = need_down ? call.fresh({s.T, s.F}) : call.nothing();
  if (need_hidden || need_down) {
    PreActivations pre{gate, up};
    if (!saved) pre = pre_activations(call, s, x, input_weights(s, w_in, w_up, b_in, b_up));
    GatedAct a = describe(s, pre.gate, pre.up);
    a.d_out = a.gate;  // any value: without d_hidden nothing uses it
    Tensor d_h = need_hidden ? call.fresh({s.T, s.F}) : call.nothing();
    if (need_hidden) {
      product(d_y, w_down, d_h);
      a.d_out = matrix(d_h);
      a.out[0] = d_hidden.mutable_data_ptr();
      a.out[1] = s.gated ? advance(a.out[0], s.F, s.dtype) : nullptr;
      a.out_stride[0] = a.out_stride[1] = s.hidden();
    }
    if (need_down) a.out[2] = h.mutable_data_ptr();
    a.out_stride[2] = s.F;
    launch_gated_act_backward(call, a);
    if (need_hidden && s.interleaved) d_hidden = alternating(d_hidden);
  }

  Tensor d_w_down = need_down ? call.fresh({s.O, s.F}) : call.nothing();
  if (need_down) product(transposed(d_y), h, d_w_down);

  // The part of d_hidden that belongs to w_in, and to w_up.
  const int64_t in_rows = w_up ? s.F : s.hidden();
  const auto part = [&](int64_t i) { return view(d_hidden, i * in_rows, s.T, in_rows, s.hidden(), 1); };
  Tensor d_x = need_x ? call.fresh({s.T, s.D}) : call.nothing();
  if (need_x) product(part(0), w_in, d_x);
  if (need_x && w_up) product_plus(part(1), *w_up, d_x, d_x);

  Tensor d_w[2] = {call.nothing(), call.nothing()};
  Tensor d_b[2] = {call.nothing(), call.nothing()};
  const bool need_w[2] = {need_in, need_up}, need_b[2] = {need_b_in, need_b_up};
  for (int i = 0; i < 2; ++i) {
    if (need_w[i]) {
      d_w[i] = call.fresh({in_rows, s.D});
      product(transposed(part(i)), x, d_w[i]);
    }
    if (need_b[i]) {
      d_b[i] = call.fresh({in_rows});
      sum_rows(call, part(i), s.dtype, d_b[i]);
    }
  }
  Tensor d_b_down = need_b_down ? call.fresh({s.O}) : call.nothing();
  if (need_b_down) sum_rows(call, d_y, s.dtype, d_b_down);
  return {d_x, d_w[0], d_w[1], d_w_down, d_b[0], d_b[1], d_b_down};
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("ffn", TORCH_BOX(&ffn_ops::cuda::ffn));
  m.impl("ffn_backward", TORCH_BOX(&ffn_ops::cuda::ffn_backward));
}
