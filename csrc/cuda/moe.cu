// SPDX-License-Identifier: BSD-3-Clause
// moe on a GPU: every expert's feed-forward layer over its routed rows, gathered on the fly and combined per token, and
// its backward, with adapters or without. Without a routing the rows are already in order, and nothing is combined.
#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "moe_steps.h"

namespace ffn_ops::cuda {
namespace {

// As products read dense weights. `w_up`: gate's rows alone stand in w_in.
Products products_of(Call& call, const Moe& c, const Tensor& w_in, const MaybeTensor& w_up, const Tensor& w_down) {
  Products p;
  p.in = [&call, &c, &w_in, &w_up](GroupedGemm g, int64_t) {
    g.b = expert_weights(w_in, c.dtype, false, 0);
    if (w_up) g.b_up = expert_weights(*w_up, c.dtype, false, 0);
    else if (c.gated) g.b_up = expert_weights(w_in, c.dtype, false, c.interleaved ? 1 : c.F);
    if (c.interleaved) g.b.lane_stride = g.b_up.lane_stride = 2 * g.b.lane_stride;
    launch_product(call, g);
  };
  p.down = with_weights(call, w_down, false);
  p.down_columns = with_weights(call, w_down, true);
  p.in_columns = with_weights(call, w_in, true);
  if (!w_up) return p;
  // Gate's half of k, unrounded; then up's, which it joins.
  p.in_columns = [&call, &c, &w_in, &w_up](GroupedGemm g, int64_t col) {
    const DType wide = arithmetic_dtype(c.dtype);
    Tensor gate_part = call.fresh(wide, {c.R, g.N});
    GroupedGemm first = g;
    first.K = g.K = c.F;
    first.b = expert_weights(w_in, c.dtype, true, col);
    first.epilogue.unrounded = true;
    first.epilogue.out = gate_part.mutable_data_ptr();
    first.epilogue.out_stride = g.N;
    launch_product(call, first);
    g.a.data = advance(g.a.data, c.F, c.dtype);
    g.b = expert_weights(*w_up, c.dtype, true, col);
    g.epilogue.added = gate_part.const_data_ptr();
    g.epilogue.added_stride = g.N;
    launch_product(call, g);
  };
  return p;
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
  const MaybeTensor w_up;
  return run_experts(call, c, x, products_of(call, c, w_in, w_up, w_down), b_in, b_down, save);
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
  const Moe c = describe(call, s, token, weight, offsets, row, slot_offsets);
  const MaybeTensor w_up;
  const std::array<bool, kInputs> asked = {needs[0], needs[1], needs[2], false, needs[3], needs[4], needs[5]};
  const auto d = run_experts_backward(call, c, "moe", d_y, x, products_of(call, c, w_in, w_up, w_down),
                                      {&w_in, nullptr, &w_down}, b_in, b_down, gate, up, asked);
  return {d[kX], d[kWeight], d[kIn], d[kDown], d[kBIn], d[kBDown]};
}

// ---- with adapters --------------------------------------------------------------------------------------------------

Moe describe_adapted(Call& call, const Tensor& x, const MaybeTensor& token, const MaybeTensor& weight,
                     const MaybeTensor& offsets, const MaybeTensor& row, const MaybeTensor& slot_offsets,
                     const Tensor& w_in, const MaybeTensor& w_up, const Tensor& w_down, const MaybeTensor& b_in,
                     const MaybeTensor& b_down, const MaybeTensor& lora_a_in, const MaybeTensor& lora_b_in,
                     const MaybeTensor& lora_a_down, const MaybeTensor& lora_b_down, bool gated, bool interleaved,
                     const Gate& form, double scale) {
  const MoeShape s = check_moe(x, token, weight, offsets, row, slot_offsets, w_in, w_down, b_in, b_down, gated,
                               interleaved, form, call.place(), w_up);
  Moe c = describe(call, s, token, weight, offsets, row, slot_offsets);
  c.lora_in = low_rank(lora_a_in, lora_b_in, "in", scale, s, s.hidden(), s.D, call.place());
  c.lora_down = low_rank(lora_a_down, lora_b_down, "down", scale, s, s.O, s.F, call.place());
  return c;
}

std::tuple<Tensor, Tensor, Tensor> moe_lora(const Tensor& x, MaybeTensor token, MaybeTensor weight, MaybeTensor offsets,
                                            MaybeTensor row, MaybeTensor slot_offsets, const Tensor& w_in,
                                            MaybeTensor w_up, const Tensor& w_down, MaybeTensor b_in,
                                            MaybeTensor b_down, MaybeTensor lora_a_in, MaybeTensor lora_b_in,
                                            MaybeTensor lora_a_down, MaybeTensor lora_b_down, bool gated,
                                            bool interleaved, std::string activation, std::vector<double> params,
                                            double scale, bool save) {
  Call call(x, "x");
  const Moe c =
      describe_adapted(call, x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down, b_in, b_down, lora_a_in,
                       lora_b_in, lora_a_down, lora_b_down, gated, interleaved, check_gate(activation, params), scale);
  return run_experts(call, c, x, products_of(call, c, w_in, w_up, w_down), b_in, b_down, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_lora_backward(
    const Tensor& d_y, const Tensor& x, MaybeTensor token, MaybeTensor weight, MaybeTensor offsets, MaybeTensor row,
    MaybeTensor slot_offsets, const Tensor& w_in, MaybeTensor w_up, const Tensor& w_down, MaybeTensor b_in,
    MaybeTensor b_down, MaybeTensor lora_a_in, MaybeTensor lora_b_in, MaybeTensor lora_a_down, MaybeTensor lora_b_down,
    const Tensor& gate, const Tensor& up, bool gated, bool interleaved, std::string activation,
    std::vector<double> params, double scale, std::vector<bool> needs) {
  check_needs(needs, kInputs);
  Call call(x, "x");
  const Moe c =
      describe_adapted(call, x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down, b_in, b_down, lora_a_in,
                       lora_b_in, lora_a_down, lora_b_down, gated, interleaved, check_gate(activation, params), scale);
  std::array<bool, kInputs> asked;
  std::copy(needs.begin(), needs.end(), asked.begin());
  return std::tuple_cat(run_experts_backward(call, c, "moe_lora", d_y, x, products_of(call, c, w_in, w_up, w_down),
                                             {&w_in, w_up ? &*w_up : nullptr, &w_down}, b_in, b_down, gate, up, asked));
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
  m.impl("moe_lora", TORCH_BOX(&ffn_ops::cuda::moe_lora));
  m.impl("moe_lora_backward", TORCH_BOX(&ffn_ops::cuda::moe_lora_backward));
  m.impl("moe_linear", TORCH_BOX(&ffn_ops::cuda::moe_linear));
  m.impl("moe_outer", TORCH_BOX(&ffn_ops::cuda::moe_outer));
}
