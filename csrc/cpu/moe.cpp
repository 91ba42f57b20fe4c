// SPDX-License-Identifier: BSD-3-Clause
// moe on the CPU: every expert's feed-forward layer over its routed rows, gathered on the fly and combined per token,
// and its backward, with adapters or without. Without a routing the rows are already in order, and nothing is combined.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "experts.h"

namespace ffn_ops {
namespace {

// d_w [E, N, K] = sum over each expert's rows of d_out^T in, stored as the weight is.
Tensor add_expert_weight_gradient(Steps& steps, Experts& c, const Tensor& w, const RowsOf& d_out, const RowsOf& in) {
  const int64_t N = w.size(1), K = w.size(2);
  const DType dtype = storage_dtype(w, "w");
  if (!is_transposed(w)) {
    Tensor d_w = fresh(w, {c.E, N, K});
    add_outer_products(steps, c, N, K, d_out, in, dtype, d_w.mutable_data_ptr());
    return d_w;
  }
  Tensor d_w = fresh(w, {c.E, K, N});
  add_outer_products(steps, c, K, N, in, d_out, dtype, d_w.mutable_data_ptr());
  return torch::stable::transpose(d_w, 1, 2);
}

// In backward: each row of the gradient times b, and a as the second factor, which gives the gradient of the input.
SmallRows add_up_gradient(Steps& steps, Workspace& workspace, Experts& c, const LowRank& lora, const RowsOf& rows) {
  if (lora.rank == 0) return {};
  void* small = take_rows(workspace, c, lora.rank, arithmetic_dtype(c.dtype), "a gradient times b");
  add_small_product(steps, c, rows, lora.b->size(1), lora.rank, columns_of(stacked(*lora.b, lora.dtype)), lora.scale,
                    small, lora.rank);
  return {small, lora.rank, columns_of(stacked(*lora.a, lora.dtype))};
}

struct Gradients {
  Tensor x, weight, w_in, w_down, b_in, b_down, lora_a_in, lora_b_in, lora_a_down, lora_b_down;
};

// `needs` in the order of Gradients.
Gradients backward(Experts& c, const Tensor& d_y, const Tensor& x, const std::optional<Tensor>& weight,
                   const Tensor& w_in, const Tensor& w_down, const std::optional<Tensor>& b_in,
                   const std::optional<Tensor>& b_down, const Tensor& gate, const Tensor& up,
                   const std::vector<bool>& needs) {
  check_tensor(d_y, "d_y", c.dtype, {c.T, c.O});
  const bool recompute = !check_saved("moe", gate, up, c.dtype, c.R, c.F, c.gated);
  const bool need_x = needs.at(0), need_weight = needs.at(1) && c.routed, need_in = needs.at(2);
  const bool need_down = needs.at(3), need_b_in = needs.at(4), need_b_down = needs.at(5);
  const bool need_lora_in[2] = {needs.at(6) && c.lora_in.rank > 0, needs.at(7) && c.lora_in.rank > 0};
  const bool need_lora_down[2] = {needs.at(8) && c.lora_down.rank > 0, needs.at(9) && c.lora_down.rank > 0};
  const bool need_hidden = need_x || need_in || need_b_in || need_weight || need_lora_in[0] || need_lora_in[1];
  const bool need_h = need_down || need_lora_down[0] || need_lora_down[1];
  const DType arithmetic = arithmetic_dtype(c.dtype);
  // The row's weight times h can be too small for float16, while dY and h themselves are not.
  const DType h_dtype = c.weight && c.dtype == DType::kFloat16 ? arithmetic : c.dtype;

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  const void* gate_data = gate.const_data_ptr();
  const void* up_data = c.gated ? up.const_data_ptr() : nullptr;
  if (recompute && (need_hidden || need_h)) {
    void* fresh_gate = take_rows(workspace, c, c.F, c.dtype, "gate");
    void* fresh_up = c.gated ? take_rows(workspace, c, c.F, c.dtype, "up") : nullptr;
    add_pre_activations(steps, workspace, c, x, stacked(w_in, c.dtype), b_in, fresh_gate, fresh_up, nullptr);
    gate_data = fresh_gate;
    up_data = fresh_up;
  }

  const RowsOf x_rows = token_rows(c, x), d_y_rows = token_rows(c, d_y);
  SmallRows d_down;  // of a_down's output, not yet times the row's weight
  if (need_hidden || need_lora_down[0]) d_down = add_up_gradient(steps, workspace, c, c.lora_down, d_y_rows);

  void *d_hidden = nullptr, *h = nullptr, *parts = nullptr, *add = nullptr;
  const KernelTable& table = kernels();
  const int64_t num_parts = divide_up(c.F, table.nr_vectors * table.lanes * 4 / storage_size(arithmetic));
  if (need_h) h = take_rows(workspace, c, c.F, h_dtype, "h");
  if (need_hidden) {
    d_hidden = take_rows(workspace, c, c.hidden(), c.dtype, "d_hidden");
    if (c.routed) parts = take_rows(workspace, c, num_parts, arithmetic, "d_weight");
    if (d_down.data) {
      add = take_rows(workspace, c, c.F, arithmetic, "the adapters' part of d_h");
      add_small_product(steps, c, dense_rows(d_down.data, d_down.rank, arithmetic), d_down.rank, c.F, d_down.weights, 1,
                        add, c.F);
    }
    add_hidden_gradient(steps, c, d_y, stacked(w_down, c.dtype), gate_data, up_data, d_hidden, h, h_dtype, parts,
                        num_parts, add);
  } else if (need_h) {
    // The same kernel as in the epilogue, so that the bits do not depend on which gradients are asked for.
    GatedAct a;
    a.set_form(c.form);
    a.rows = c.routes.kept;
    a.cols = a.out_stride = c.F;
    a.gate = a.d_out = dense(gate_data, c.F, c.dtype);
    if (c.gated) a.up = dense(up_data, c.F, c.dtype);
    a.out[2] = h;
    a.h_unrounded = h_dtype != c.dtype;
    a.row_weight = c.weight;
    add_gated_act_backward(steps, a);
  }

  const auto none = [&] { return nothing(x); };
  Gradients d{none(), none(), none(), none(), none(), none(), none(), none(), none(), none()};
  if (need_weight) {
    d.weight = fresh(*weight, {c.R});
    add_routing_weight_gradient(steps, c, d_y, dense_data(b_down, c.keep), parts, num_parts,
                                d.weight.mutable_data_ptr());
    zero_rows(steps, d.weight.mutable_data_ptr(), c.routes.kept, c.R, storage_size(arithmetic));
  }
  const auto small_rows = [&](const SmallRows& s) { return dense_rows(s.data, s.rank, arithmetic); };
  const RowsOf h_rows = dense_rows(h, c.F, h_dtype);
  if (need_down) d.w_down = add_expert_weight_gradient(steps, c, w_down, d_y_rows, h_rows);
  if (need_lora_down[0])
    d.lora_a_down = add_expert_weight_gradient(steps, c, *c.lora_down.a, small_rows(d_down), h_rows);
  if (need_lora_down[1]) {  // h has the row's weight, and so has its product with a_down
    const SmallRows again = add_down_projection(steps, workspace, c, c.lora_down, h_rows);
    d.lora_b_down = add_expert_weight_gradient(steps, c, *c.lora_down.b, d_y_rows, small_rows(again));
  }

  const RowsOf hidden_rows = dense_rows(d_hidden, c.hidden(), c.dtype);
  SmallRows d_in;
  if (need_x || need_lora_in[0]) d_in = add_up_gradient(steps, workspace, c, c.lora_in, hidden_rows);
  if (need_x) {
    d.x = fresh(x, {c.T, c.D});
    add_combined_product(steps, workspace, c, hidden_rows, c.hidden(), c.D, columns_of(stacked(w_in, c.dtype)), nullptr,
                         nullptr, d.x.mutable_data_ptr(), d_in);
  }
  if (need_in) d.w_in = add_expert_weight_gradient(steps, c, w_in, hidden_rows, x_rows);
  if (need_lora_in[0]) d.lora_a_in = add_expert_weight_gradient(steps, c, *c.lora_in.a, small_rows(d_in), x_rows);
  if (need_lora_in[1]) {
    const SmallRows again = add_down_projection(steps, workspace, c, c.lora_in, x_rows);
    d.lora_b_in = add_expert_weight_gradient(steps, c, *c.lora_in.b, hidden_rows, small_rows(again));
  }
  if (need_b_in) {
    d.b_in = fresh(x, {c.E, c.hidden()});
    add_bias_gradients(steps, c, c.hidden(), hidden_rows, false, d.b_in.mutable_data_ptr());
  }
  if (need_b_down) {
    d.b_down = fresh(x, {c.E, c.O});
    add_bias_gradients(steps, c, c.O, d_y_rows, c.routed, d.b_down.mutable_data_ptr());
  }
  steps.run();
  return d;
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
  const Gradients d = backward(c, d_y, x, weight, w_in, w_down, b_in, b_down, gate, up, needs);
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
  const Gradients d = backward(c, d_y, x, weight, w_in, w_down, b_in, b_down, gate, up, needs);
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
