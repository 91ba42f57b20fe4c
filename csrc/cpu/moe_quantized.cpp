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
                const std::optional<Tensor>& b_down, bool gated, bool interleaved, const Gate& form) {
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
  Call c{std::move(w), offsets ? *offsets : fresh_indices({2}), {}};
  if (!offsets) {
    auto* data = static_cast<int64_t*>(c.offsets.mutable_data_ptr());
    data[0] = 0;
    data[1] = s.T;
  }
  if (s.routed) {
    check_indices_shape(*slot_offsets, "slot_offsets", {s.T + 1});
    s.R = check_routes(*token, weight, s.dtype, c.offsets, *row, *slot_offsets).R;
  }
  c.experts = with_routes(s, token, weight, c.offsets, row, slot_offsets);
  return c;
}

std::tuple<Tensor, Tensor, Tensor> moe_quantized(
    const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight, std::optional<Tensor> offsets,
    std::optional<Tensor> row, std::optional<Tensor> slot_offsets, std::vector<Tensor> w_in, std::vector<Tensor> w_up,
    std::vector<Tensor> w_down, std::string formats, std::optional<Tensor> b_in, std::optional<Tensor> b_down,
    bool gated, bool interleaved, std::string activation, std::vector<double> params, bool save) {
  Call call = check_call(x, token, weight, offsets, row, slot_offsets, check_weights(w_in, w_up, w_down, formats), b_in,
                         b_down, gated, interleaved, check_gate(activation, params));
  return run_experts(call.experts, x, call.w.in_and_up(), call.w.down.stacked(), b_in, b_down, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_quantized_backward(
    const Tensor& d_y, const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight,
    std::optional<Tensor> offsets, std::optional<Tensor> row, std::optional<Tensor> slot_offsets,
    std::vector<Tensor> w_in, std::vector<Tensor> w_up, std::vector<Tensor> w_down, std::string formats,
    std::optional<Tensor> b_in, std::optional<Tensor> b_down, const Tensor& gate, const Tensor& up, bool gated,
    bool interleaved, std::string activation, std::vector<double> params, std::vector<bool> needs) {
  check_needs(needs, 4);
  Call call = check_call(x, token, weight, offsets, row, slot_offsets, check_weights(w_in, w_up, w_down, formats), b_in,
                         b_down, gated, interleaved, check_gate(activation, params));
  const Weights& w = call.w;
  const ExpertWeights weights = {w.in_and_up(), columns_of(w.in.stacked()),
                                 w.up ? columns_of(w.up->stacked()) : WeightsFrom{}, w.down.stacked()};
  const std::vector<bool> all = {needs.at(0), needs.at(1), false, false, needs.at(2),
                                 needs.at(3), false,       false, false, false};
  const ExpertGradients d =
      run_backward("moe_quantized", call.experts, d_y, x, weight, weights, b_in, b_down, gate, up, all);
  return {d.x, d.weight, d.b_in, d.b_down};
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("moe_quantized", TORCH_BOX(&ffn_ops::moe_quantized));
  m.impl("moe_quantized_backward", TORCH_BOX(&ffn_ops::moe_quantized_backward));
}
