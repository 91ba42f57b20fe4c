// SPDX-License-Identifier: BSD-3-Clause
// moe on the CPU: every expert's feed-forward layer over its routed rows, gathered on the fly and combined per token,
// and its backward. Without a routing the rows are already in order, and nothing is combined.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "experts.h"

namespace ffn_ops {
namespace {

Experts with_routes(const MoeShape& s, const std::optional<Tensor>& token, const std::optional<Tensor>& weight,
                    const Tensor& offsets, const std::optional<Tensor>& row,
                    const std::optional<Tensor>& slot_offsets) {
  Experts c;
  c.dtype = s.dtype;
  c.T = s.T;
  c.D = s.D;
  c.F = s.F;
  c.O = s.O;
  c.gated = s.gated;
  c.interleaved = s.interleaved;
  c.routed = s.routed;
  c.form = s.form;
  c.set_rows(offsets, s.E, s.R);
  c.routes.tokens = c.T;
  if (!c.routed) return c;
  c.routes.token = check_indices(*token, "token", c.R, c.T - 1, c.keep);
  c.routes.row = check_indices(*row, "row", c.R, c.R - 1, c.keep);
  c.routes.slot_offsets = check_offsets(*slot_offsets, "slot_offsets", c.T, c.R, c.keep);
  check_agreement(c.routes);
  c.weight = dense_data(weight, c.keep);
  return c;
}

// d_w [E, N, K] = sum over each expert's rows of d_out^T in, stored as the weight is.
Tensor add_expert_weight_gradient(Steps& steps, Experts& c, const Tensor& w, const RowsOf& d_out, const RowsOf& in) {
  const int64_t N = w.size(1), K = w.size(2);
  if (!is_transposed(w)) {
    Tensor d_w = fresh(w, {c.E, N, K});
    add_outer_products(steps, c, N, K, d_out, in, d_w.mutable_data_ptr());
    return d_w;
  }
  Tensor d_w = fresh(w, {c.E, K, N});
  add_outer_products(steps, c, K, N, in, d_out, d_w.mutable_data_ptr());
  return torch::stable::transpose(d_w, 1, 2);
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
  Tensor y = fresh(x, {c.T, c.O});
  Tensor gate = save ? fresh(x, {c.R, c.F}) : nothing(x);
  Tensor up = save && c.gated ? fresh(x, {c.R, c.F}) : nothing(x);

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  const int64_t row_bytes = c.F * storage_size(c.dtype);
  void* h = workspace.take(static_cast<size_t>(c.routes.kept * row_bytes), "h");
  add_pre_activations(steps, c, x, w_in, b_in, save ? gate.mutable_data_ptr() : nullptr,
                      save && c.gated ? up.mutable_data_ptr() : nullptr, h);
  const auto down = [&](int64_t e, int64_t col) { return lanes_are_rows(expert_matrix(w_down, c.dtype, e, col)); };
  add_combined_product(steps, workspace, c, dense_rows(h, c.F, c.dtype), c.F, c.O, down, dense_data(b_down, c.keep),
                       c.weight, y.mutable_data_ptr());
  if (save) zero_rows(steps, gate.mutable_data_ptr(), c.routes.kept, c.R, row_bytes);
  if (save && c.gated) zero_rows(steps, up.mutable_data_ptr(), c.routes.kept, c.R, row_bytes);
  steps.run();
  return {y, gate, up};
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
  check_tensor(d_y, "d_y", c.dtype, {c.T, c.O});
  const bool recompute = !check_saved("moe", gate, up, c.dtype, c.R, c.F, c.gated);
  const bool need_x = needs.at(0), need_weight = needs.at(1) && c.routed, need_in = needs.at(2);
  const bool need_down = needs.at(3), need_b_in = needs.at(4), need_b_down = needs.at(5);
  const bool need_hidden = need_x || need_in || need_b_in || need_weight;
  const int64_t element = storage_size(c.dtype);
  const DType arithmetic = arithmetic_dtype(c.dtype);
  // The row's weight times h can be too small for float16, while dY and h themselves are not.
  const DType h_dtype = c.weight && c.dtype == DType::kFloat16 ? arithmetic : c.dtype;

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  const auto rows_bytes = [&](int64_t width) { return static_cast<size_t>(c.routes.kept * width * element); };
  const void* gate_data = gate.const_data_ptr();
  const void* up_data = c.gated ? up.const_data_ptr() : nullptr;
  if (recompute && (need_hidden || need_down)) {
    void* fresh_gate = workspace.take(rows_bytes(c.F), "gate");
    void* fresh_up = c.gated ? workspace.take(rows_bytes(c.F), "up") : nullptr;
    add_pre_activations(steps, c, x, w_in, b_in, fresh_gate, fresh_up, nullptr);
    gate_data = fresh_gate;
    up_data = fresh_up;
  }

  void *d_hidden = nullptr, *h = nullptr, *parts = nullptr;
  const KernelTable& table = kernels();
  const int64_t num_parts = divide_up(c.F, table.nr_vectors * table.lanes * 4 / storage_size(arithmetic));
  if (need_down) h = workspace.take(static_cast<size_t>(c.routes.kept * c.F * storage_size(h_dtype)), "h");
  if (need_hidden) {
    d_hidden = workspace.take(rows_bytes(c.hidden()), "d_hidden");
    if (c.routed)
      parts = workspace.take(static_cast<size_t>(c.routes.kept * num_parts * storage_size(arithmetic)), "d_weight");
    add_hidden_gradient(steps, c, d_y, w_down, gate_data, up_data, d_hidden, h, h_dtype, parts, num_parts);
  } else if (need_down) {
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

  Tensor d_weight = need_weight ? fresh(*weight, {c.R}) : nothing(x);
  if (need_weight) {
    add_routing_weight_gradient(steps, c, d_y, dense_data(b_down, c.keep), parts, num_parts,
                                d_weight.mutable_data_ptr());
    zero_rows(steps, d_weight.mutable_data_ptr(), c.routes.kept, c.R, storage_size(arithmetic));
  }

  Tensor d_w_down = nothing(x);
  if (need_down)
    d_w_down = add_expert_weight_gradient(steps, c, w_down, token_rows(c, d_y), dense_rows(h, c.F, h_dtype));

  const RowsOf hidden_rows = dense_rows(d_hidden, c.hidden(), c.dtype);
  Tensor d_x = need_x ? fresh(x, {c.T, c.D}) : nothing(x);
  if (need_x) {
    const auto in = [&](int64_t e, int64_t col) { return lanes_are_columns(expert_matrix(w_in, c.dtype, e, 0, col)); };
    add_combined_product(steps, workspace, c, hidden_rows, c.hidden(), c.D, in, nullptr, nullptr,
                         d_x.mutable_data_ptr());
  }

  Tensor d_w_in = nothing(x);
  if (need_in) d_w_in = add_expert_weight_gradient(steps, c, w_in, hidden_rows, token_rows(c, x));
  Tensor d_b_in = need_b_in ? fresh(x, {c.E, c.hidden()}) : nothing(x);
  if (need_b_in) add_bias_gradients(steps, c, c.hidden(), hidden_rows, false, d_b_in.mutable_data_ptr());
  Tensor d_b_down = need_b_down ? fresh(x, {c.E, c.O}) : nothing(x);
  if (need_b_down) add_bias_gradients(steps, c, c.O, token_rows(c, d_y), c.routed, d_b_down.mutable_data_ptr());
  steps.run();
  return {d_x, d_weight, d_w_in, d_w_down, d_b_in, d_b_down};
}

// rows[r] w[e]^T, rows after the experts' are zero.
Tensor moe_linear(const Tensor& rows, const Tensor& w, const Tensor& offsets) {
  Experts c;
  c.dtype = storage_dtype(rows, "rows");
  check_tensor(rows, "rows", c.dtype, {"R", "K"});
  check_tensor(w, "w", c.dtype, {"E", "N", rows.size(1)});
  c.set_rows(offsets, w.size(0), rows.size(0));
  Tensor out = fresh(rows, {c.R, w.size(1)});
  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  const auto weights = [&](int64_t e, int64_t col) { return lanes_are_rows(expert_matrix(w, c.dtype, e, col)); };
  add_combined_product(steps, workspace, c, token_rows(c, rows), rows.size(1), w.size(1), weights, nullptr, nullptr,
                       out.mutable_data_ptr());
  steps.run();
  return out;
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
  add_outer_products(steps, c, a.size(1), b.size(1), token_rows(c, a), token_rows(c, b), out.mutable_data_ptr());
  steps.run();
  return out;
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("moe", TORCH_BOX(&ffn_ops::moe));
  m.impl("moe_backward", TORCH_BOX(&ffn_ops::moe_backward));
  m.impl("moe_linear", TORCH_BOX(&ffn_ops::moe_linear));
  m.impl("moe_outer", TORCH_BOX(&ffn_ops::moe_outer));
}
