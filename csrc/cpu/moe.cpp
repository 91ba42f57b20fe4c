// SPDX-License-Identifier: BSD-3-Clause
// moe on the CPU: every expert's feed-forward layer over its routed rows, gathered on the fly and combined per token,
// and its backward, with adapters or without. Without a routing the rows are already in order, and nothing is combined.
// Their steps: experts.h.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "experts.h"

namespace ffn_ops {
namespace {

ExpertWeights dense_weights(const Tensor& w_in, const Tensor& w_down, DType dtype) {
  const StackedWeight in = stacked(w_in, dtype);
  return {in, columns_of(in), {}, stacked(w_down, dtype), &w_in, &w_down};
}

std::tuple<Tensor, Tensor, Tensor> moe(const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight,
                                       const Tensor& offsets, std::optional<Tensor> row,
                                       std::optional<Tensor> slot_offsets, const Tensor& w_in, const Tensor& w_down,
                                       std::optional<Tensor> b_in, std::optional<Tensor> b_down, bool gated,
                                       bool interleaved, std::string activation, std::vector<double> params,
                                       bool save) {
  const MoeShape s = check_moe(x, token, weight, offsets, row, slot_offsets, w_in, w_down, b_in, b_down, gated,
                               interleaved, check_gate(activation, params));
  Experts c = with_routes(s, token, weight, offsets, row, slot_offsets);
  return run_experts(c, x, stacked(w_in, c.dtype), stacked(w_down, c.dtype), b_in, b_down, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_backward(
    const Tensor& d_y, const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight,
    const Tensor& offsets, std::optional<Tensor> row, std::optional<Tensor> slot_offsets, const Tensor& w_in,
    const Tensor& w_down, std::optional<Tensor> b_in, std::optional<Tensor> b_down, const Tensor& gate,
    const Tensor& up, bool gated, bool interleaved, std::string activation, std::vector<double> params,
    std::vector<bool> needs) {
  check_needs(needs, 6);
  const MoeShape s = check_moe(x, token, weight, offsets, row, slot_offsets, w_in, w_down, b_in, b_down, gated,
                               interleaved, check_gate(activation, params));
  Experts c = with_routes(s, token, weight, offsets, row, slot_offsets);
  needs.resize(10);
  const ExpertGradients d =
      run_backward("moe", c, d_y, x, weight, dense_weights(w_in, w_down, c.dtype), b_in, b_down, gate, up, needs);
  return {d.x, d.weight, d.w_in, d.w_down, d.b_in, d.b_down};
}

// ---- with adapters --------------------------------------------------------------------------------------------------

LowRank low_rank(const std::optional<Tensor>& a, const std::optional<Tensor>& b, const std::string& place, double scale,
                 const MoeShape& s, int64_t N, int64_t K) {
  LowRank l;
  STD_TORCH_CHECK(a.has_value() == b.has_value(), "lora: expected a_", place, " and b_", place,
                  " together, or none of them, got one");
  if (!a) return l;
  const std::string a_name = "lora.a_" + place, b_name = "lora.b_" + place;
  const DType wide = arithmetic_dtype(s.dtype);
  const auto text = [](DType d) { return std::string(kDTypeNames[static_cast<int>(d)]); };
  const auto dtype_of = [&](const Tensor& t, const std::string& name) {
    const DType dtype = storage_dtype(t, name.c_str());
    check_place(t, name.c_str(), {});
    const std::string expected = text(s.dtype) + (wide == s.dtype ? "" : " or " + text(wide));
    STD_TORCH_CHECK(dtype == s.dtype || dtype == wide, name, ": expected dtype ", expected, ", got ", text(dtype));
    return dtype;
  };
  l.dtype = dtype_of(*a, a_name);
  const DType b_dtype = dtype_of(*b, b_name);
  STD_TORCH_CHECK(b_dtype == l.dtype, b_name, ": expected dtype ", text(l.dtype), " as a_", place, " has, got ",
                  text(b_dtype));
  check_extents(*a, a_name.c_str(), {s.E, "r", K});
  l.rank = a->size(1);
  STD_TORCH_CHECK(l.rank > 0, a_name, ": expected a rank of at least 1, got shape ", shape_text(*a));
  check_extents(*b, b_name.c_str(), {s.E, N, l.rank});
  l.a = &*a;
  l.b = &*b;
  l.scale = scale;
  return l;
}

std::tuple<Tensor, Tensor, Tensor> moe_lora(
    const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight, const Tensor& offsets,
    std::optional<Tensor> row, std::optional<Tensor> slot_offsets, const Tensor& w_in, const Tensor& w_down,
    std::optional<Tensor> b_in, std::optional<Tensor> b_down, std::optional<Tensor> lora_a_in,
    std::optional<Tensor> lora_b_in, std::optional<Tensor> lora_a_down, std::optional<Tensor> lora_b_down, bool gated,
    bool interleaved, std::string activation, std::vector<double> params, double scale, bool save) {
  const MoeShape s = check_moe(x, token, weight, offsets, row, slot_offsets, w_in, w_down, b_in, b_down, gated,
                               interleaved, check_gate(activation, params));
  Experts c = with_routes(s, token, weight, offsets, row, slot_offsets);
  c.lora_in = low_rank(lora_a_in, lora_b_in, "in", scale, s, s.hidden(), s.D);
  c.lora_down = low_rank(lora_a_down, lora_b_down, "down", scale, s, s.O, s.F);
  return run_experts(c, x, stacked(w_in, c.dtype), stacked(w_down, c.dtype), b_in, b_down, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_lora_backward(
    const Tensor& d_y, const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight,
    const Tensor& offsets, std::optional<Tensor> row, std::optional<Tensor> slot_offsets, const Tensor& w_in,
    const Tensor& w_down, std::optional<Tensor> b_in, std::optional<Tensor> b_down, std::optional<Tensor> lora_a_in,
    std::optional<Tensor> lora_b_in, std::optional<Tensor> lora_a_down, std::optional<Tensor> lora_b_down,
    const Tensor& gate, const Tensor& up, bool gated, bool interleaved, std::string activation,
    std::vector<double> params, double scale, std::vector<bool> needs) {
  check_needs(needs, 10);
  const MoeShape s = check_moe(x, token, weight, offsets, row, slot_offsets, w_in, w_down, b_in, b_down, gated,
                               interleaved, check_gate(activation, params));
  Experts c = with_routes(s, token, weight, offsets, row, slot_offsets);
  c.lora_in = low_rank(lora_a_in, lora_b_in, "in", scale, s, s.hidden(), s.D);
  c.lora_down = low_rank(lora_a_down, lora_b_down, "down", scale, s, s.O, s.F);
  const ExpertGradients d =
      run_backward("moe", c, d_y, x, weight, dense_weights(w_in, w_down, c.dtype), b_in, b_down, gate, up, needs);
  return {d.x, d.weight, d.w_in, d.w_down, d.b_in, d.b_down, d.lora_a_in, d.lora_b_in, d.lora_a_down, d.lora_b_down};
}

// rows[r] w[e]^T, rows after the experts' are zero.
Tensor moe_linear(const Tensor& rows, const Tensor& w, const Tensor& offsets) {
  Experts c;
  c.dtype = storage_dtype(rows, "rows");
  check_tensor(rows, "rows", c.dtype, {"R", "K"});
  check_tensor(w, "w", c.dtype, {"E", "N", rows.size(1)});
  c.set_rows(offsets, w.size(0), rows.size(0));
  return run_linear(c, rows, w.size(1), rows_of(stacked(w, c.dtype)));
}

// out[e] = sum over the rows of e of a[r]^T b[r].
Tensor moe_outer(const Tensor& a, const Tensor& b, const Tensor& offsets) {
  Experts c;
  c.dtype = storage_dtype(a, "a");
  check_tensor(a, "a", c.dtype, {"R", "M"});
  check_tensor(b, "b", c.dtype, {a.size(0), "N"});
  c.set_rows(offsets, count_of(offsets, "offsets"), a.size(0));
  Tensor out = fresh(a, {c.E, a.size(1), b.size(1)});
  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  add_outer_products(steps, c, a.size(1), b.size(1), token_rows(c, a), token_rows(c, b), c.dtype,
                     out.mutable_data_ptr());
  steps.run();
  return out;
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("moe", TORCH_BOX(&ffn_ops::moe));
  m.impl("moe_backward", TORCH_BOX(&ffn_ops::moe_backward));
  m.impl("moe_lora", TORCH_BOX(&ffn_ops::moe_lora));
  m.impl("moe_lora_backward", TORCH_BOX(&ffn_ops::moe_lora_backward));
  m.impl("moe_linear", TORCH_BOX(&ffn_ops::moe_linear));
  m.impl("moe_outer", TORCH_BOX(&ffn_ops::moe_outer));
}
