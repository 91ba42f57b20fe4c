// SPDX-License-Identifier: BSD-3-Clause
// moe on a GPU: every expert's feed-forward layer over its routed rows, gathered on the fly and combined per token, and
// its backward. Without a routing the rows are already in order, and nothing is combined.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "gemm_grid.h"
#include "moe_steps.h"
#include "passes.h"

namespace ffn_ops::cuda {
namespace {

// The rows of gate and, where gated, up.
WithWeights gate_and_up(Call& call, const Moe& c, const Tensor& w_in) {
  return [&](GroupedGemm g, int64_t) {
    g.b = expert_weights(w_in, c.dtype, false, 0);
    if (c.gated) g.b_up = expert_weights(w_in, c.dtype, false, c.interleaved ? 1 : c.F);
    if (c.interleaved) g.b.lane_stride = g.b_up.lane_stride = 2 * g.b.lane_stride;
    launch_product(call, g);
  };
}

std::tuple<Tensor, Tensor, Tensor> moe(const Tensor& x, MaybeTensor token, MaybeTensor weight, const Tensor& offsets,
                                       MaybeTensor row, MaybeTensor slot_offsets, const Tensor& w_in,
                                       const Tensor& w_down, MaybeTensor b_in, MaybeTensor b_down, bool gated,
                                       bool interleaved, std::string activation, std::vector<double> params,
                                       bool save) {
  Call call(x, "x");
  const MoeShape s = check_moe(x, token, weight, offsets, row, slot_offsets, w_in, w_down, b_in, b_down, gated,
                               interleaved, check_gate(activation, params), call.place());
  const Moe c = describe(call, s, token, weight, offsets, row, slot_offsets);
  Tensor y = call.fresh({c.T, c.O});
  Tensor gate = save ? call.fresh({c.R, c.F}) : call.nothing();
  Tensor up = save && c.gated ? call.fresh({c.R, c.F}) : call.nothing();
  Tensor h = call.fresh({c.R, c.F});
  pre_activations(call, c, x, gate_and_up(call, c, w_in), b_in, save ? gate.mutable_data_ptr() : nullptr,
                  save && c.gated ? up.mutable_data_ptr() : nullptr, h.mutable_data_ptr());
  combined_product(call, c.experts, dense_rows(h.const_data_ptr(), c.F), c.F, with_weights(call, w_down, false), c.O,
                   call.dense(b_down), c.experts.weight, y);
  return {y, gate, up};
}

// Only h, if nothing else is needed.
void hidden(const Call& call, const Moe& c, const void* gate, const void* up, const HiddenGradient& out) {
  GatedAct a;
  a.set_form(c.form);
  a.rows = c.R;
  a.cols = a.out_stride[2] = c.F;
  a.dtype = c.dtype;
  a.kept = c.experts.routes.kept;
  a.gate = a.d_out = dense_matrix(gate, c.F);  // d_out: any value, nothing uses it
  if (c.gated) a.up = dense_matrix(up, c.F);
  a.out[2] = out.h;
  a.row_weight = out.weigh_h ? c.experts.weight : nullptr;
  launch_gated_act_backward(call, a);
}

// d_w [E, N, K] = sum over each expert's rows of d_out^T in, stored as the weight is.
Tensor weights_gradient(Call& call, const Moe& c, const Tensor& w, const Operand& d_out, const Operand& in) {
  const int64_t N = w.size(1), K = w.size(2);
  if (!is_transposed(w)) {
    Tensor d_w = call.fresh({c.E, N, K});
    outer_products(call, c.experts, d_out, N, in, K, d_w);
    return d_w;
  }
  Tensor d_w = call.fresh({c.E, K, N});
  outer_products(call, c.experts, in, K, d_out, N, d_w);
  return torch::stable::transpose(d_w, 1, 2);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_backward(
    const Tensor& d_y, const Tensor& x, MaybeTensor token, MaybeTensor weight, const Tensor& offsets, MaybeTensor row,
    MaybeTensor slot_offsets, const Tensor& w_in, const Tensor& w_down, MaybeTensor b_in, MaybeTensor b_down,
    const Tensor& gate, const Tensor& up, bool gated, bool interleaved, std::string activation,
    std::vector<double> params, std::vector<bool> needs) {
  check_needs(needs, 6);
  Call call(x, "x");
  const MoeShape s = check_moe(x, token, weight, offsets, row, slot_offsets, w_in, w_down, b_in, b_down, gated,
                               interleaved, check_gate(activation, params), call.place());
  check_tensor(d_y, "d_y", s.dtype, {s.T, s.O}, call.place());
  const bool saved = check_saved("moe", gate, up, s.dtype, s.R, s.F, s.gated, call.place());
  const Moe c = describe(call, s, token, weight, offsets, row, slot_offsets);
  const bool need_x = needs[0], need_weight = needs[1] && c.routed, need_in = needs[2];
  const bool need_down = needs[3], need_b_in = needs[4], need_b_down = needs[5];
  const bool need_hidden = need_x || need_in || need_b_in || need_weight;

  const void* gate_data = gate.const_data_ptr();
  const void* up_data = c.gated ? up.const_data_ptr() : nullptr;
  Tensor again[2] = {call.nothing(), call.nothing()};
  if (!saved && (need_hidden || need_down)) {
    for (int i = 0; i < (c.gated ? 2 : 1); ++i) again[i] = call.fresh({c.R, c.F});
    void* up_again = c.gated ? again[1].mutable_data_ptr() : nullptr;
    pre_activations(call, c, x, gate_and_up(call, c, w_in), b_in, again[0].mutable_data_ptr(), up_again, nullptr);
    gate_data = again[0].const_data_ptr();
    up_data = up_again;
  }

  Tensor d_hidden = need_hidden ? call.fresh({c.R, c.hidden()}) : call.nothing();
  Tensor h = need_down ? call.fresh({c.R, c.F}) : call.nothing();
  HiddenGradient of;
  if (need_down) of.h = h.mutable_data_ptr();
  // The weight times h can be too small for float16; dY is multiplied by the weight there, as in eager.
  of.weigh_h = c.dtype != DType::kFloat16;
  if (need_weight) {
    of.num_parts = row_dots_parts(c.dtype, c.F);
    of.parts = call.workspace(c.R * of.num_parts * storage_size(arithmetic_dtype(c.dtype)));
  }
  if (need_hidden) {
    of.d_hidden = d_hidden.mutable_data_ptr();
    hidden_gradient(c, d_y, with_weights(call, w_down, true), gate_data, up_data, of);
  } else if (need_down) {
    hidden(call, c, gate_data, up_data, of);
  }

  Tensor d_weight = need_weight ? call.fresh(arithmetic_dtype(c.dtype), {c.R}) : call.nothing();
  if (need_weight) weight_gradient(call, c, d_y, b_down, of, d_weight);

  const Operand hidden_rows = dense_rows(d_hidden.const_data_ptr(), c.hidden());
  Tensor d_w_down = call.nothing();
  if (need_down && c.routed && !of.weigh_h) {
    Tensor weighted = call.fresh({c.R, c.O});
    MoveRows m;
    m.routes = c.experts.routes;
    m.cols = c.O;
    m.in = matrix(d_y);
    m.dtype = c.dtype;
    m.weight = c.experts.weight;
    m.out = weighted.mutable_data_ptr();
    m.out_stride = c.O;
    launch_dispatch_rows(call, m);
    d_w_down = weights_gradient(call, c, w_down, dense_rows(weighted.const_data_ptr(), c.O), dense_rows(of.h, c.F));
  } else if (need_down) {
    d_w_down = weights_gradient(call, c, w_down, token_rows(c.experts, d_y), dense_rows(of.h, c.F));
  }
  Tensor d_x = need_x ? call.fresh({c.T, c.D}) : call.nothing();
  if (need_x)
    combined_product(call, c.experts, hidden_rows, c.hidden(), with_weights(call, w_in, true), c.D, nullptr, nullptr,
                     d_x);
  Tensor d_w_in = call.nothing();
  if (need_in) d_w_in = weights_gradient(call, c, w_in, hidden_rows, token_rows(c.experts, x));
  Tensor d_b_in = need_b_in ? call.fresh({c.E, c.hidden()}) : call.nothing();
  if (need_b_in) sum_expert_rows(call, c.experts, hidden_rows, nullptr, d_b_in);
  Tensor d_b_down = need_b_down ? call.fresh({c.E, c.O}) : call.nothing();
  if (need_b_down) sum_expert_rows(call, c.experts, token_rows(c.experts, d_y), c.experts.weight, d_b_down);
  return {d_x, d_weight, d_w_in, d_w_down, d_b_in, d_b_down};
}

// rows[r] w[e]^T, rows after the experts' are zero.
Tensor moe_linear(const Tensor& rows, const Tensor& w, const Tensor& offsets) {
  Call call(rows, "rows");
  const DType dtype = storage_dtype(rows, "rows");
  check_tensor(rows, "rows", dtype, {"R", "K"}, call.place());
  check_tensor(w, "w", dtype, {"E", "N", rows.size(1)}, call.place());
  check_indices_shape(offsets, "offsets", {w.size(0) + 1}, call.place());
  const Experts c{dtype, w.size(0), rows.size(0), call.indices(offsets)};
  Tensor out = call.fresh({c.R, w.size(1)});
  combined_product(call, c, token_rows(c, rows), rows.size(1), with_weights(call, w, false), w.size(1), nullptr,
                   nullptr, out);
  return out;
}

// out[e] = sum over the rows of e of a[r]^T b[r].
Tensor moe_outer(const Tensor& a, const Tensor& b, const Tensor& offsets) {
  Call call(a, "a");
  const DType dtype = storage_dtype(a, "a");
  check_tensor(a, "a", dtype, {"R", "M"}, call.place());
  check_tensor(b, "b", dtype, {a.size(0), "N"}, call.place());
  const int64_t E = count_of(offsets, "offsets", call.place());
  const Experts c{dtype, E, a.size(0), call.indices(offsets)};
  Tensor out = call.fresh({E, a.size(1), b.size(1)});
  outer_products(call, c, token_rows(c, a), a.size(1), token_rows(c, b), b.size(1), out);
  return out;
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("moe", TORCH_BOX(&ffn_ops::cuda::moe));
  m.impl("moe_backward", TORCH_BOX(&ffn_ops::cuda::moe_backward));
  m.impl("moe_linear", TORCH_BOX(&ffn_ops::cuda::moe_linear));
  m.impl("moe_outer", TORCH_BOX(&ffn_ops::cuda::moe_outer));
}
