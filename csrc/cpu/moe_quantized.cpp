// SPDX-License-Identifier: BSD-3-Clause
// moe_quantized on the CPU: the steps of moe, and of ffn as a mixture of one expert, on quantised weights, which are
// constants: x, the routing's weights, biases and adapters have gradients. Activations are of x's dtype, arithmetic is
// float32.
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
             const std::optional<Tensor>& slot_offsets, const std::optional<Tensor>& lora_a_in,
             const std::optional<Tensor>& lora_b_in, const std::optional<Tensor>& lora_a_down,
             const std::optional<Tensor>& lora_b_down, double scale) {
  Call c{{QuantizedWeight(s.in), QuantizedWeight(s.down), {}}, all_rows(offsets, s.T), {}};
  if (s.up) c.w.up.emplace(*s.up);
  c.experts = with_routes(s, token, weight, c.offsets, row, slot_offsets);
  c.experts.lora_in = low_rank(lora_a_in, lora_b_in, "in", scale, s, s.hidden(), s.D);
  c.experts.lora_down = low_rank(lora_a_down, lora_b_down, "down", scale, s, s.O, s.F);
  c.experts.two_in = c.w.up.has_value();
  return c;
}

std::tuple<Tensor, Tensor, Tensor> moe_quantized(
    const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight, std::optional<Tensor> offsets,
    std::optional<Tensor> row, std::optional<Tensor> slot_offsets, std::vector<Tensor> w_in, std::vector<Tensor> w_up,
    std::vector<Tensor> w_down, std::string formats, std::optional<Tensor> b_in, std::optional<Tensor> b_down,
    std::optional<Tensor> lora_a_in, std::optional<Tensor> lora_b_in, std::optional<Tensor> lora_a_down,
    std::optional<Tensor> lora_b_down, bool gated, bool interleaved, std::string activation, std::vector<double> params,
    double scale, bool save) {
  const QuantizedMoeShape s =
      check_quantized_moe(x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down, formats, b_in, b_down,
                          gated, interleaved, check_gate(activation, params));
  Call call =
      prepare(s, token, weight, offsets, row, slot_offsets, lora_a_in, lora_b_in, lora_a_down, lora_b_down, scale);
  return run_experts(call.experts, x, call.w.in_and_up(), call.w.down.stacked(), b_in, b_down, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_quantized_backward(
    const Tensor& d_y, const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight,
    std::optional<Tensor> offsets, std::optional<Tensor> row, std::optional<Tensor> slot_offsets,
    std::vector<Tensor> w_in, std::vector<Tensor> w_up, std::vector<Tensor> w_down, std::string formats,
    std::optional<Tensor> b_in, std::optional<Tensor> b_down, std::optional<Tensor> lora_a_in,
    std::optional<Tensor> lora_b_in, std::optional<Tensor> lora_a_down, std::optional<Tensor> lora_b_down,
    const Tensor& gate, const Tensor& up, bool gated, bool interleaved, std::string activation,
    std::vector<double> params, double scale, std::vector<bool> needs) {
  check_needs(needs, 8);
  const QuantizedMoeShape s =
      check_quantized_moe(x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down, formats, b_in, b_down,
                          gated, interleaved, check_gate(activation, params));
  Call call =
      prepare(s, token, weight, offsets, row, slot_offsets, lora_a_in, lora_b_in, lora_a_down, lora_b_down, scale);
  const std::array<bool, kInputs> asked = {needs[0], needs[1], false,    false,    false,   needs[2],
                                           needs[3], needs[4], needs[5], needs[6], needs[7]};
  const auto d = run_experts_backward(call.experts, "moe_quantized", d_y, x, weight, call.w.in_and_up(),
                                      call.w.down.stacked(), {}, b_in, b_down, gate, up, asked);
  return {d[kX], d[kWeight], d[kBIn], d[kBDown], d[kLoraAIn], d[kLoraBIn], d[kLoraADown], d[kLoraBDown]};
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("moe_quantized", TORCH_BOX(&ffn_ops::moe_quantized));
  m.impl("moe_quantized_backward", TORCH_BOX(&ffn_ops::moe_quantized_backward));
}
