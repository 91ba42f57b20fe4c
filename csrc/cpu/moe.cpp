// SPDX-License-Identifier: BSD-3-Clause
// moe on the CPU: every expert's feed-forward layer over its routed rows, gathered on the fly and combined per token,
// and its backward, with adapters or without. Without a routing the rows are already in order, and nothing is combined.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "experts.h"

namespace ffn_ops {
namespace {

// d_w [E, N, K] = sum over each expert's rows of d_out^T in, stored as the weight is. `add`: add_outer_products, or for
// a factor of an adapter add_short_outer_products.
Tensor add_weight_gradient(Steps& steps, Experts& c, const Tensor& w, const RowsOf& d_out, const RowsOf& in,
                           decltype(&add_outer_products) add = &add_outer_products) {
  const int64_t N = w.size(1), K = w.size(2);
  const DType dtype = storage_dtype(w, "w");
  const bool turned = is_transposed(w);
  Tensor d_w = turned ? fresh(w, {c.E, K, N}) : fresh(w, {c.E, N, K});
  if (turned) add(steps, c, K, N, in, d_out, dtype, d_w.mutable_data_ptr());
  else add(steps, c, N, K, d_out, in, dtype, d_w.mutable_data_ptr());
  return turned ? torch::stable::transpose(d_w, 1, 2) : d_w;
}

// Of a factor of an adapter.
Tensor add_factor_gradient(Steps& steps, Workspace& workspace, Experts& c, const Tensor& w, const RowsOf& d_out,
                           const RowsOf& in) {
  if (!is_expert_last(w)) return add_weight_gradient(steps, c, w, d_out, in, &add_short_outer_products);
  const int64_t N = w.size(1), K = w.size(2);
  Tensor d_w = fresh(w, {N, K, c.E});
  add_short_outer_products_expert_last(steps, workspace, c, N, K, d_out, in, storage_dtype(w, "w"),
                                       d_w.mutable_data_ptr());
  return torch::stable::transpose(torch::stable::transpose(d_w, 0, 2), 1, 2);
}

// In backward: each row of the gradient times b, and a as the second factor, which gives the gradient of the input.
SmallRows add_up_gradient(Steps& steps, Workspace& workspace, Experts& c, const LowRank& lora, const StackedWeight& b,
                          const RowsOf& rows) {
  if (lora.rank == 0) return {};
  const void* small = add_short_product(steps, workspace, c, rows, lora.b->size(1), lora.rank, columns_of(b),
                                        lora.scale, "a gradient times b");
  return {small, lora.rank, columns_of(stacked(*lora.a, lora.dtype))};
}

}  // namespace

std::array<Tensor, kInputs> run_experts_backward(Experts& c, const std::string& op, const Tensor& d_y, const Tensor& x,
                                                 const std::optional<Tensor>& weight, const StackedWeight& w_in,
                                                 const StackedWeight& w_down, const PlainWeights& plain,
                                                 const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_down,
                                                 const Tensor& gate, const Tensor& up,
                                                 const std::array<bool, kInputs>& asked) {
  check_tensor(d_y, "d_y", c.dtype, {c.T, c.O});
  const bool recompute = !check_saved(op, gate, up, c.dtype, c.R, c.F, c.gated);
  const Needed need(asked, c.routed, plain, c.lora_in, c.lora_down);
  const DType arithmetic = arithmetic_dtype(c.dtype);
  // The row's weight times h can be too small for float16, while dY and h themselves are not.
  const DType h_dtype = c.weight && c.dtype == DType::kFloat16 ? arithmetic : c.dtype;

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  add_factors(steps, workspace, c, false);
  steps.join();
  const void* gate_data = gate.const_data_ptr();
  const void* up_data = c.gated ? up.const_data_ptr() : nullptr;
  if (recompute && (need.hidden || need.h)) {
    void* fresh_gate = take_rows(workspace, c, c.F, c.dtype, "gate");
    void* fresh_up = c.gated ? take_rows(workspace, c, c.F, c.dtype, "up") : nullptr;
    add_pre_activations(steps, workspace, c, x, w_in, b_in, fresh_gate, fresh_up, nullptr);
    gate_data = fresh_gate;
    up_data = fresh_up;
  }

  const RowsOf x_rows = token_rows(c, x), d_y_rows = token_rows(c, d_y);
  SmallRows d_down, of_x, of_h, d_in;  // d_down: of a_down's output, not yet times the row's weight
  if (need.hidden || need[kLoraADown])
    d_down = add_up_gradient(steps, workspace, c, c.lora_down, c.lora_b_down, d_y_rows);
  if (need[kLoraBIn]) of_x = add_down_projection(steps, workspace, c, c.lora_in, c.lora_b_in, x_rows);

  void *d_hidden = nullptr, *h = nullptr, *parts = nullptr;
  const int64_t d_stride = apart(c.hidden(), c.dtype);
  const KernelTable& table = kernels();
  const int64_t num_parts = divide_up(c.F, table.nr_vectors * table.lanes * 4 / storage_size(arithmetic));
  if (need.h) h = take_rows(workspace, c, c.F, h_dtype, "h");
  if (need.hidden) {
    d_hidden = take_rows(workspace, c, d_stride, c.dtype, "d_hidden");
    if (c.routed) parts = take_rows(workspace, c, num_parts, arithmetic, "d_weight");
    add_hidden_gradient(steps, c, d_y, w_down, gate_data, up_data, d_hidden, h, h_dtype, parts, num_parts, d_down);
  } else if (need.h) {
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

  steps.join();

  std::array<Tensor, kInputs> d;
  for (Tensor& each : d) each = nothing(x);
  const auto small_rows = [&](const SmallRows& s) { return dense_rows(s.data, s.rank, arithmetic); };
  const RowsOf h_rows = dense_rows(h, c.F, h_dtype), hidden_rows = dense_rows(d_hidden, d_stride, c.dtype);
  // Products with the adapters' factors, which need no more than the above, and gradients that need no more than those.
  if (need[kLoraBDown])  // h has the row's weight, and so has its product with a_down
    of_h = add_down_projection(steps, workspace, c, c.lora_down, c.lora_b_down, h_rows);
  if (need[kX] || need[kLoraAIn]) d_in = add_up_gradient(steps, workspace, c, c.lora_in, c.lora_b_in, hidden_rows);
  const auto factor = [&](const Tensor& w, const RowsOf& d_out, const RowsOf& in) {
    return add_factor_gradient(steps, workspace, c, w, d_out, in);
  };
  if (need[kLoraADown]) d[kLoraADown] = factor(*c.lora_down.a, small_rows(d_down), h_rows);
  if (need[kLoraBIn]) d[kLoraBIn] = factor(*c.lora_in.b, hidden_rows, small_rows(of_x));
  steps.join();
  if (need[kLoraBDown]) d[kLoraBDown] = factor(*c.lora_down.b, d_y_rows, small_rows(of_h));
  if (need[kLoraAIn]) d[kLoraAIn] = factor(*c.lora_in.a, small_rows(d_in), x_rows);

  if (need[kWeight]) {
    d[kWeight] = fresh(*weight, {c.R});
    add_routing_weight_gradient(steps, c, d_y, dense_data(b_down, c.keep), parts, num_parts,
                                d[kWeight].mutable_data_ptr());
    zero_rows(steps, d[kWeight].mutable_data_ptr(), c.routes.kept, c.R, storage_size(arithmetic));
  }
  if (need[kDown]) d[kDown] = add_weight_gradient(steps, c, *plain.down, d_y_rows, h_rows);
  if (need[kX]) {
    d[kX] = fresh(x, {c.T, c.D});
    const auto up_columns = [&](int64_t e, int64_t col) { return lanes_are_columns(w_in(e, c.F, col)); };
    add_combined_product(steps, workspace, c, hidden_rows, c.hidden(), c.D, columns_of(w_in), nullptr, nullptr,
                         d[kX].mutable_data_ptr(), d_in, c.two_in ? WeightsFrom(up_columns) : WeightsFrom{});
  }
  if (need[kIn]) d[kIn] = add_weight_gradient(steps, c, *plain.in, hidden_rows, x_rows);
  if (need[kUp]) {
    const RowsOf up_rows = dense_rows(advance(d_hidden, c.F, c.dtype), d_stride, c.dtype);
    d[kUp] = add_weight_gradient(steps, c, *plain.up, up_rows, x_rows);
  }
  if (need[kBIn]) {
    d[kBIn] = fresh(x, {c.E, c.hidden()});
    add_bias_gradients(steps, c, c.hidden(), hidden_rows, false, d[kBIn].mutable_data_ptr());
  }
  if (need[kBDown]) {
    d[kBDown] = fresh(x, {c.E, c.O});
    add_bias_gradients(steps, c, c.O, d_y_rows, c.routed, d[kBDown].mutable_data_ptr());
  }
  steps.run();
  return d;
}

namespace {

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
  const std::array<bool, kInputs> asked = {needs[0], needs[1], needs[2], false, needs[3], needs[4], needs[5]};
  const auto d = run_experts_backward(c, "moe", d_y, x, weight, stacked(w_in, c.dtype), stacked(w_down, c.dtype),
                                      {&w_in, nullptr, &w_down}, b_in, b_down, gate, up, asked);
  return {d[kX], d[kWeight], d[kIn], d[kDown], d[kBIn], d[kBDown]};
}

// ---- with adapters --------------------------------------------------------------------------------------------------

struct LoraCall {
  Tensor offsets;
  Experts experts;
  StackedWeight w_in;
};

LoraCall check_lora_call(const Tensor& x, const std::optional<Tensor>& token, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& offsets, const std::optional<Tensor>& row,
                         const std::optional<Tensor>& slot_offsets, const Tensor& w_in,
                         const std::optional<Tensor>& w_up, const Tensor& w_down, const std::optional<Tensor>& b_in,
                         const std::optional<Tensor>& b_down, const std::optional<Tensor>& lora_a_in,
                         const std::optional<Tensor>& lora_b_in, const std::optional<Tensor>& lora_a_down,
                         const std::optional<Tensor>& lora_b_down, bool gated, bool interleaved, const Gate& form,
                         double scale) {
  LoraCall call{all_rows(offsets, x.dim() > 0 ? x.size(0) : 0), {}, {}};
  const MoeShape s = check_moe(x, token, weight, call.offsets, row, slot_offsets, w_in, w_down, b_in, b_down, gated,
                               interleaved, form, {}, w_up);
  Experts& c = call.experts = with_routes(s, token, weight, call.offsets, row, slot_offsets);
  c.lora_in = low_rank(lora_a_in, lora_b_in, "in", scale, s, s.hidden(), s.D);
  c.lora_down = low_rank(lora_a_down, lora_b_down, "down", scale, s, s.O, s.F);
  c.two_in = w_up.has_value();
  call.w_in = stacked(w_in, s.dtype);
  if (w_up)
    call.w_in = [&w_in, &w_up, dtype = s.dtype, F = s.F](int64_t e, int64_t r, int64_t col) {
      return r < F ? expert_matrix(w_in, dtype, e, r, col) : expert_matrix(*w_up, dtype, e, r - F, col);
    };
  return call;
}

std::tuple<Tensor, Tensor, Tensor> moe_lora(
    const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight, std::optional<Tensor> offsets,
    std::optional<Tensor> row, std::optional<Tensor> slot_offsets, const Tensor& w_in, std::optional<Tensor> w_up,
    const Tensor& w_down, std::optional<Tensor> b_in, std::optional<Tensor> b_down, std::optional<Tensor> lora_a_in,
    std::optional<Tensor> lora_b_in, std::optional<Tensor> lora_a_down, std::optional<Tensor> lora_b_down, bool gated,
    bool interleaved, std::string activation, std::vector<double> params, double scale, bool save) {
  LoraCall call =
      check_lora_call(x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down, b_in, b_down, lora_a_in,
                      lora_b_in, lora_a_down, lora_b_down, gated, interleaved, check_gate(activation, params), scale);
  return run_experts(call.experts, x, call.w_in, stacked(w_down, call.experts.dtype), b_in, b_down, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_lora_backward(
    const Tensor& d_y, const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight,
    std::optional<Tensor> offsets, std::optional<Tensor> row, std::optional<Tensor> slot_offsets, const Tensor& w_in,
    std::optional<Tensor> w_up, const Tensor& w_down, std::optional<Tensor> b_in, std::optional<Tensor> b_down,
    std::optional<Tensor> lora_a_in, std::optional<Tensor> lora_b_in, std::optional<Tensor> lora_a_down,
    std::optional<Tensor> lora_b_down, const Tensor& gate, const Tensor& up, bool gated, bool interleaved,
    std::string activation, std::vector<double> params, double scale, std::vector<bool> needs) {
  check_needs(needs, kInputs);
  LoraCall call =
      check_lora_call(x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down, b_in, b_down, lora_a_in,
                      lora_b_in, lora_a_down, lora_b_down, gated, interleaved, check_gate(activation, params), scale);
  std::array<bool, kInputs> asked;
  std::copy(needs.begin(), needs.end(), asked.begin());
  const auto d =
      run_experts_backward(call.experts, "moe_lora", d_y, x, weight, call.w_in, stacked(w_down, call.experts.dtype),
                           {&w_in, w_up ? &*w_up : nullptr, &w_down}, b_in, b_down, gate, up, asked);
  return std::tuple_cat(d);
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
