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

Weights check_weights(const std::vector<Tensor>& w_in, const std::vector<Tensor>& w_up,
                      const std::vector<Tensor>& w_down, const std::string& formats) {
  const std::vector<std::string> names = split_formats(formats);
  STD_TORCH_CHECK(names.size() == (w_up.empty() ? 2 : 3), "formats: expected one for each weight, got '", formats, "'");
  Weights w{{w_in, names.front(), "w_in"}, {w_down, names.back(), "w_down"}, {}};
  if (!w_up.empty()) w.up.emplace(w_up, names[1], "w_up");
  return w;
}

struct Call {
  Weights w;
  Tensor offsets;
  Experts experts;
};

Call check_call(const Tensor& x, const std::optional<Tensor>& token, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& offsets, const std::optional<Tensor>& row,
                const std::optional<Tensor>& slot_offsets, Weights w, const std::optional<Tensor>& b_in,
                const std::optional<Tensor>& b_down, const std::optional<Tensor>& lora_a_in,
                const std::optional<Tensor>& lora_b_in, const std::optional<Tensor>& lora_a_down,
                const std::optional<Tensor>& lora_b_down, bool gated, bool interleaved, const Gate& form,
                double scale) {
  MoeShape s;
  s.dtype = storage_dtype(x, "x");
  STD_TORCH_CHECK(s.dtype != DType::kFloat64,
                  "x: expected dtype float32, float16 or bfloat16 where weights are quantised, got float64");
  check_tensor(x, "x", s.dtype, {"T", "D"});
  s.T = s.R = x.size(0);
  s.D = x.size(1);
  s.E = w.in.E;
  s.O = w.down.N;
  s.gated = gated;
  s.interleaved = interleaved;
  s.form = form;
  const bool one_weight = gated && !w.up;
  check_interleaved(interleaved, gated, one_weight);
  STD_TORCH_CHECK(gated || !w.up, "gated: expected True where w_up is given, got False");
  check_gated_form(form, gated);
  STD_TORCH_CHECK(s.E > 0, "w_in: expected at least one expert, got none");
  STD_TORCH_CHECK(!one_weight || w.in.N % 2 == 0, "w_in: expected an even number of rows, of gate and up, got ",
                  w.in.N);
  s.F = one_weight ? w.in.N / 2 : w.in.N;
  const auto fits = [&](const QuantizedWeight& each, const char* name, int64_t N, int64_t K) {
    STD_TORCH_CHECK(each.E == s.E && each.N == N && each.K == K, name, ": expected a quantised weight of shape [", s.E,
                    ", ", N, ", ", K, "], got [", each.E, ", ", each.N, ", ", each.K, "]");
  };
  fits(w.in, "w_in", w.in.N, s.D);
  if (w.up) fits(*w.up, "w_up", s.F, s.D);
  fits(w.down, "w_down", s.O, s.F);
  if (b_in) check_tensor(*b_in, "b_in", s.dtype, {s.E, s.hidden()});
  if (b_down) check_tensor(*b_down, "b_down", s.dtype, {s.E, s.O});
  s.routed = token.has_value();
  STD_TORCH_CHECK(s.routed == weight.has_value() && s.routed == row.has_value() &&
                      s.routed == slot_offsets.has_value() && (offsets || !s.routed),
                  "routing: expected token, weight, row and slot_offsets together, or none of them");
  STD_TORCH_CHECK(offsets || s.E == 1, "offsets: expected a tensor where there are several experts, got none");
  Call c{std::move(w), all_rows(offsets, s.T), {}};
  if (s.routed) {
    check_indices_shape(*slot_offsets, "slot_offsets", {s.T + 1});
    s.R = check_routes(*token, weight, s.dtype, c.offsets, *row, *slot_offsets).R;
  }
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
  Call call = check_call(x, token, weight, offsets, row, slot_offsets, check_weights(w_in, w_up, w_down, formats), b_in,
                         b_down, lora_a_in, lora_b_in, lora_a_down, lora_b_down, gated, interleaved,
                         check_gate(activation, params), scale);
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
  Call call = check_call(x, token, weight, offsets, row, slot_offsets, check_weights(w_in, w_up, w_down, formats), b_in,
                         b_down, lora_a_in, lora_b_in, lora_a_down, lora_b_down, gated, interleaved,
                         check_gate(activation, params), scale);
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
