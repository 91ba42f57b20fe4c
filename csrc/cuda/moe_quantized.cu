// SPDX-License-Identifier: BSD-3-Clause
// moe_quantized on a GPU: the steps of moe, and of ffn as a mixture of one expert, on quantised weights, which are
// constants: x, the routing's weights, biases and adapters have gradients.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "moe_steps.h"
#include "quantized.h"

namespace ffn_ops::cuda {
namespace {

template <class... Arguments>
QuantizedMoeShape check(Place place, const Arguments&... arguments) {
  QuantizedMoeShape s = check_quantized_moe(arguments..., place);
  check_groups(s.in, "w_in");
  if (s.up) check_groups(*s.up, "w_up");
  check_groups(s.down, "w_down");
  return s;
}

Moe describe_adapted(Call& call, const QuantizedMoeShape& s, const MaybeTensor& token, const MaybeTensor& weight,
                     const MaybeTensor& offsets, const MaybeTensor& row, const MaybeTensor& slot_offsets,
                     const MaybeTensor& lora_a_in, const MaybeTensor& lora_b_in, const MaybeTensor& lora_a_down,
                     const MaybeTensor& lora_b_down, double scale) {
  Moe c = describe(call, s, token, weight, offsets, row, slot_offsets);
  c.lora_in = low_rank(lora_a_in, lora_b_in, "in", scale, s, s.hidden(), s.D, call.place());
  c.lora_down = low_rank(lora_a_down, lora_b_down, "down", scale, s, s.O, s.F, call.place());
  return c;
}

Products products_of(Call& call, const QuantizedMoeShape& s) {
  return {with_gate_and_up(call, s), with_codes(call, s.down, false), with_codes(call, s.in, true, s.up),
          with_codes(call, s.down, true), true};
}

std::tuple<Tensor, Tensor, Tensor> moe_quantized(const Tensor& x, MaybeTensor token, MaybeTensor weight,
                                                 MaybeTensor offsets, MaybeTensor row, MaybeTensor slot_offsets,
                                                 std::vector<Tensor> w_in, std::vector<Tensor> w_up,
                                                 std::vector<Tensor> w_down, std::string formats, MaybeTensor b_in,
                                                 MaybeTensor b_down, MaybeTensor lora_a_in, MaybeTensor lora_b_in,
                                                 MaybeTensor lora_a_down, MaybeTensor lora_b_down, bool gated,
                                                 bool interleaved, std::string activation, std::vector<double> params,
                                                 double scale, bool save) {
  Call call(x, "x");
  const QuantizedMoeShape s = check(call.place(), x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down,
                                    formats, b_in, b_down, gated, interleaved, check_gate(activation, params));
  const Moe c = describe_adapted(call, s, token, weight, offsets, row, slot_offsets, lora_a_in, lora_b_in, lora_a_down,
                                 lora_b_down, scale);
  return run_experts(call, c, x, products_of(call, s), b_in, b_down, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_quantized_backward(
    const Tensor& d_y, const Tensor& x, MaybeTensor token, MaybeTensor weight, MaybeTensor offsets, MaybeTensor row,
    MaybeTensor slot_offsets, std::vector<Tensor> w_in, std::vector<Tensor> w_up, std::vector<Tensor> w_down,
    std::string formats, MaybeTensor b_in, MaybeTensor b_down, MaybeTensor lora_a_in, MaybeTensor lora_b_in,
    MaybeTensor lora_a_down, MaybeTensor lora_b_down, const Tensor& gate, const Tensor& up, bool gated,
    bool interleaved, std::string activation, std::vector<double> params, double scale, std::vector<bool> needs) {
  check_needs(needs, 8);
  Call call(x, "x");
  const QuantizedMoeShape s = check(call.place(), x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down,
                                    formats, b_in, b_down, gated, interleaved, check_gate(activation, params));
  const Moe c = describe_adapted(call, s, token, weight, offsets, row, slot_offsets, lora_a_in, lora_b_in, lora_a_down,
                                 lora_b_down, scale);
  const std::array<bool, kInputs> asked = {needs[0], needs[1], false,    false,    false,   needs[2],
                                           needs[3], needs[4], needs[5], needs[6], needs[7]};
  const auto d =
      run_experts_backward(call, c, "moe_quantized", d_y, x, products_of(call, s), {}, b_in, b_down, gate, up, asked);
  return {d[kX], d[kWeight], d[kBIn], d[kBDown], d[kLoraAIn], d[kLoraBIn], d[kLoraADown], d[kLoraBDown]};
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("moe_quantized", TORCH_BOX(&ffn_ops::cuda::moe_quantized));
  m.impl("moe_quantized_backward", TORCH_BOX(&ffn_ops::cuda::moe_quantized_backward));
}
