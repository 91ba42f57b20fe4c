// SPDX-License-Identifier: BSD-3-Clause
// moe_quantized on the CPU: the steps of moe, and of ffn as a mixture of one expert, on quantised weights, which are
// constants: x, the routing's weights and biases have gradients. Activations are of x's dtype, arithmetic is float32.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "quantized.h"

namespace ffn_ops {
namespace {

struct Weights {
  QuantizedWeight in, down;
  std::optional<QuantizedWeight> up;  // else `in` holds gate and up where gated

  StackedWeight in_and_up() const {
    if (!up) return in.stacked();
    return [this](int64_t e, int64_t row, int64_t col) { return row < in.N ? in.at(e, row, col) : up->at(e, 0, col); };
  }
};

struct Call {
  Weights w;
  Tensor offsets;
  Experts experts;
};

Call prepare(const QuantizedMoeShape& s, const std::optional<Tensor>& token, const std::optional<Tensor>& weight,
             const std::optional<Tensor>& offsets, const std::optional<Tensor>& row,
             const std::optional<Tensor>& slot_offsets) {
  Call c{{QuantizedWeight(s.in), QuantizedWeight(s.down), {}}, offsets ? *offsets : fresh_indices({2}), {}};
  if (s.up) c.w.up.emplace(*s.up);
  if (!offsets) {
    auto* data = static_cast<int64_t*>(c.offsets.mutable_data_ptr());
    data[0] = 0;
    data[1] = s.T;
  }
  c.experts = with_routes(s, token, weight, c.offsets, row, slot_offsets);
  return c;
}

std::tuple<Tensor, Tensor, Tensor> moe_quantized(
    const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight, std::optional<Tensor> offsets,
    std::optional<Tensor> row, std::optional<Tensor> slot_offsets, std::vector<Tensor> w_in, std::vector<Tensor> w_up,
    std::vector<Tensor> w_down, std::string formats, std::optional<Tensor> b_in, std::optional<Tensor> b_down,
    bool gated, bool interleaved, std::string activation, std::vector<double> params, bool save) {
  const QuantizedMoeShape s =
      check_quantized_moe(x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down, formats, b_in, b_down,
                          gated, interleaved, check_gate(activation, params));
  Call call = prepare(s, token, weight, offsets, row, slot_offsets);
  return run_experts(call.experts, x, call.w.in_and_up(), call.w.down.stacked(), b_in, b_down, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_quantized_backward(
    const Tensor& d_y, const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight,
    std::optional<Tensor> offsets, std::optional<Tensor> row, std::optional<Tensor> slot_offsets,
    std::vector<Tensor> w_in, std::vector<Tensor> w_up, std::vector<Tensor> w_down, std::string formats,
    std::optional<Tensor> b_in, std::optional<Tensor> b_down, const Tensor& gate, const Tensor& up, bool gated,
    bool interleaved, std::string activation, std::vector<double> params, std::vector<bool> needs) {
  check_needs(needs, 4);
  const QuantizedMoeShape s =
      check_quantized_moe(x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down, formats, b_in, b_down,
                          gated, interleaved, check_gate(activation, params));
  Call call = prepare(s, token, weight, offsets, row, slot_offsets);
  Experts& c = call.experts;
  const Weights& w = call.w;
  check_tensor(d_y, "d_y", c.dtype, {c.T, c.O});
  const bool recompute = !check_saved("moe_quantized", gate, up, c.dtype, c.R, c.F, c.gated);
  const bool need_x = needs.at(0), need_weight = needs.at(1) && c.routed, need_b_in = needs.at(2);
  const bool need_b_down = needs.at(3), need_hidden = need_x || need_b_in || need_weight;

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  const void* gate_data = gate.const_data_ptr();
  const void* up_data = c.gated ? up.const_data_ptr() : nullptr;
  if (recompute && need_hidden) {
    void* fresh_gate = take_rows(workspace, c, c.F, c.dtype, "gate");
    void* fresh_up = c.gated ? take_rows(workspace, c, c.F, c.dtype, "up") : nullptr;
    add_pre_activations(steps, workspace, c, x, w.in_and_up(), b_in, fresh_gate, fresh_up, nullptr);
    gate_data = fresh_gate;
    up_data = fresh_up;
  }

  void *d_hidden = nullptr, *parts = nullptr;
  const KernelTable& table = kernels();
  const int64_t num_parts = divide_up(c.F, table.nr_vectors * table.lanes);
  if (need_hidden) {
    d_hidden = take_rows(workspace, c, c.hidden(), c.dtype, "d_hidden");
    if (c.routed) parts = take_rows(workspace, c, num_parts, DType::kFloat32, "d_weight");
    add_hidden_gradient(steps, c, d_y, w.down.stacked(), gate_data, up_data, d_hidden, nullptr, c.dtype, parts,
                        num_parts);
  }

  Tensor d_weight = need_weight ? fresh(*weight, {c.R}) : nothing(x);
  if (need_weight) {
    add_routing_weight_gradient(steps, c, d_y, dense_data(b_down, c.keep), parts, num_parts,
                                d_weight.mutable_data_ptr());
    zero_rows(steps, d_weight.mutable_data_ptr(), c.routes.kept, c.R, storage_size(DType::kFloat32));
  }

  const RowsOf hidden_rows = dense_rows(d_hidden, c.hidden(), c.dtype);
  Tensor d_x = need_x ? fresh(x, {c.T, c.D}) : nothing(x);
  if (need_x) {
    add_combined_product(steps, workspace, c, hidden_rows, c.hidden(), c.D, columns_of(w.in.stacked()), nullptr,
                         nullptr, d_x.mutable_data_ptr(), {}, w.up ? columns_of(w.up->stacked()) : WeightsFrom{});
  }
  Tensor d_b_in = need_b_in ? fresh(x, {c.E, c.hidden()}) : nothing(x);
  if (need_b_in) add_bias_gradients(steps, c, c.hidden(), hidden_rows, false, d_b_in.mutable_data_ptr());
  Tensor d_b_down = need_b_down ? fresh(x, {c.E, c.O}) : nothing(x);
  if (need_b_down) add_bias_gradients(steps, c, c.O, token_rows(c, d_y), c.routed, d_b_down.mutable_data_ptr());
  steps.run();
  return {d_x, d_weight, d_b_in, d_b_down};
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("moe_quantized", TORCH_BOX(&ffn_ops::moe_quantized));
  m.impl("moe_quantized_backward", TORCH_BOX(&ffn_ops::moe_quantized_backward));
}
