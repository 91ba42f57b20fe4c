// SPDX-License-Identifier: BSD-3-Clause
// moe on a GPU: every expert's feed-forward layer over its routed rows, gathered on the fly and combined per token, and
// its backward. Without a routing the rows are already in order, and nothing is combined.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "experts.h"
#include "gemm_grid.h"
#include "passes.h"
#include "rows.h"

namespace ffn_ops::cuda {
namespace {

struct Moe : MoeShape {
  Experts experts;
};

Moe describe(Call& call, const MoeShape& s, const MaybeTensor& token, const MaybeTensor& weight, const Tensor& offsets,
             const MaybeTensor& row, const MaybeTensor& slot_offsets) {
  Moe c{s, {s.dtype, s.E, s.R, call.indices(offsets)}};
  Experts& e = c.experts;
  e.routed = s.routed;
  e.routes.kept = e.offsets + s.E;
  e.routes.tokens = s.T;
  e.routes.rows = s.R;
  e.routes.token = call.indices(token);
  e.routes.row = call.indices(row);
  e.routes.slot_offsets = call.indices(slot_offsets);
  e.weight = call.dense(weight);
  return c;
}

// Gate and up [R, F] and h [R, F], each where given.
void pre_activations(Call& call, const Moe& c, const Tensor& x, const Tensor& w_in, const MaybeTensor& b_in, void* gate,
                     void* up, void* h) {
  GroupedGemm g = rows_product(c.experts, token_rows(c.experts, x), c.D, expert_weights(w_in, c.dtype, false, 0), c.F);
  g.gated = c.gated;
  if (c.gated) g.b_up = expert_weights(w_in, c.dtype, false, c.interleaved ? 1 : c.F);
  if (c.interleaved) g.b.lane_stride = g.b_up.lane_stride = 2 * g.b.lane_stride;
  Epilogue& e = g.epilogue;
  e.kind = Epilogue::Kind::kActivate;
  e.out = h;
  e.out_stride = e.pre_stride = c.F;
  e.gate = gate;
  e.up = up;
  e.bias = call.dense(b_in && c.interleaved ? MaybeTensor(gate_then_up(*b_in)) : b_in);
  e.bias_up = c.gated ? advance(e.bias, c.F, c.dtype) : nullptr;
  e.bias_stride = c.hidden();
  e.set_form(c.form);
  launch_product(call, g);
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
  pre_activations(call, c, x, w_in, b_in, save ? gate.mutable_data_ptr() : nullptr,
                  save && c.gated ? up.mutable_data_ptr() : nullptr, h.mutable_data_ptr());
  combined_product(call, c.experts, dense_rows(h.const_data_ptr(), c.F), c.F, w_down, false, c.O, call.dense(b_down),
                   c.experts.weight, y);
  return {y, gate, up};
}

// The results of backward's pass over the hidden width, each only if it has memory.
struct HiddenGradient {
  void* d_hidden = nullptr;  // [R, 2F]: d_gate, then d_up
  void* h = nullptr;         // [R, F], times the row's weight where `weigh_h` says so
  bool weigh_h = true;
  void* parts = nullptr;  // [R, num_parts]: of the gradient of the row's weight
  int64_t num_parts = 0;
};

void hidden_gradient(Call& call, const Moe& c, const Tensor& d_y, const Tensor& w_down, const void* gate,
                     const void* up, const HiddenGradient& out) {
  GroupedGemm g =
      rows_product(c.experts, token_rows(c.experts, d_y), c.O, expert_weights(w_down, c.dtype, true, 0), c.F);
  Epilogue& e = g.epilogue;
  e.kind = Epilogue::Kind::kActivateGrad;
  e.out = out.d_hidden;
  e.out_up = c.gated && !c.interleaved ? advance(out.d_hidden, c.F, c.dtype) : nullptr;
  e.interleaved = c.interleaved;
  e.out_stride = c.hidden();
  e.h = out.h;
  e.gate = const_cast<void*>(gate);
  e.up = const_cast<void*>(up);
  e.pre_stride = c.F;
  e.set_form(c.form);
  e.row_weight = c.experts.weight;
  e.weigh_h = out.weigh_h;
  e.row_dots = out.parts;
  e.row_dots_stride = out.num_parts;
  launch_product(call, g);
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

void weight_gradient(Call& call, const Moe& c, const Tensor& d_y, const MaybeTensor& b_down, const HiddenGradient& of,
                     Tensor& d_weight) {
  RowDots job;
  job.routes = c.experts.routes;
  job.dtype = c.dtype;
  if (b_down) {
    job.cols = c.O;
    job.a = matrix(d_y);
    job.b = dense_matrix(call.dense(b_down), c.O);
    job.offsets = c.experts.offsets;
    job.experts = c.E;
  }
  job.parts = of.parts;
  job.num_parts = of.num_parts;
  job.out = d_weight.mutable_data_ptr();
  launch_row_dots(call, job);
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
    pre_activations(call, c, x, w_in, b_in, again[0].mutable_data_ptr(), up_again, nullptr);
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
    hidden_gradient(call, c, d_y, w_down, gate_data, up_data, of);
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
  if (need_x) combined_product(call, c.experts, hidden_rows, c.hidden(), w_in, true, c.D, nullptr, nullptr, d_x);
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
  combined_product(call, c, token_rows(c, rows), rows.size(1), w, false, w.size(1), nullptr, nullptr, out);
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
