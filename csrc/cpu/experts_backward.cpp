// SPDX-License-Identifier: BSD-3-Clause
// The backward of a mixture of experts, of dense and of quantised weights, as the steps of one call: see experts.h.
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

}  // namespace

ExpertGradients run_backward(const char* name, Experts& c, const Tensor& d_y, const Tensor& x,
                             const std::optional<Tensor>& weight, const ExpertWeights& w,
                             const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_down, const Tensor& gate,
                             const Tensor& up, const std::vector<bool>& needs) {
  check_tensor(d_y, "d_y", c.dtype, {c.T, c.O});
  const bool recompute = !check_saved(name, gate, up, c.dtype, c.R, c.F, c.gated);
  const bool need_x = needs.at(0), need_weight = needs.at(1) && c.routed, need_in = needs.at(2) && w.dense_in;
  const bool need_down = needs.at(3) && w.dense_down, need_b_in = needs.at(4), need_b_down = needs.at(5);
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
    add_pre_activations(steps, workspace, c, x, w.in, b_in, fresh_gate, fresh_up, nullptr);
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
    add_hidden_gradient(steps, c, d_y, w.down, gate_data, up_data, d_hidden, h, h_dtype, parts, num_parts, add);
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
  ExpertGradients d{none(), none(), none(), none(), none(), none(), none(), none(), none(), none()};
  if (need_weight) {
    d.weight = fresh(*weight, {c.R});
    add_routing_weight_gradient(steps, c, d_y, dense_data(b_down, c.keep), parts, num_parts,
                                d.weight.mutable_data_ptr());
    zero_rows(steps, d.weight.mutable_data_ptr(), c.routes.kept, c.R, storage_size(arithmetic));
  }
  const auto small_rows = [&](const SmallRows& s) { return dense_rows(s.data, s.rank, arithmetic); };
  const RowsOf h_rows = dense_rows(h, c.F, h_dtype);
  if (need_down) d.w_down = add_expert_weight_gradient(steps, c, *w.dense_down, d_y_rows, h_rows);
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
    add_combined_product(steps, workspace, c, hidden_rows, c.hidden(), c.D, w.in_columns, nullptr, nullptr,
                         d.x.mutable_data_ptr(), d_in, w.up_columns);
  }
  if (need_in) d.w_in = add_expert_weight_gradient(steps, c, *w.dense_in, hidden_rows, x_rows);
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

}  // namespace ffn_ops
