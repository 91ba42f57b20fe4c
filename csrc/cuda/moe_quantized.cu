// SPDX-License-Identifier: BSD-3-Clause
// moe_quantized on a GPU: the steps of moe, and of ffn as a mixture of one expert, on quantised weights, which are
// constants: x, the routing's weights and biases have gradients.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "gemm_grid.h"
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

// The public functions compose such a layer of other operators.
void refuse_adapters(std::initializer_list<const MaybeTensor*> factors) {
  for (const MaybeTensor* each : factors)
    STD_TORCH_CHECK(!*each, "lora: expected None on a GPU, where the kernels of quantised weights have no adapters");
}

std::tuple<Tensor, Tensor, Tensor> moe_quantized(const Tensor& x, MaybeTensor token, MaybeTensor weight,
                                                 MaybeTensor offsets, MaybeTensor row, MaybeTensor slot_offsets,
                                                 std::vector<Tensor> w_in, std::vector<Tensor> w_up,
                                                 std::vector<Tensor> w_down, std::string formats, MaybeTensor b_in,
                                                 MaybeTensor b_down, MaybeTensor lora_a_in, MaybeTensor lora_b_in,
                                                 MaybeTensor lora_a_down, MaybeTensor lora_b_down, bool gated,
                                                 bool interleaved, std::string activation, std::vector<double> params,
                                                 double, bool save) {
  refuse_adapters({&lora_a_in, &lora_b_in, &lora_a_down, &lora_b_down});
  Call call(x, "x");
  const QuantizedMoeShape s = check(call.place(), x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down,
                                    formats, b_in, b_down, gated, interleaved, check_gate(activation, params));
  const Moe c = describe(call, s, token, weight, offsets, row, slot_offsets);
  Tensor y = call.fresh({c.T, c.O});
  Tensor gate = save ? call.fresh({c.R, c.F}) : call.nothing();
  Tensor up = save && c.gated ? call.fresh({c.R, c.F}) : call.nothing();
  Tensor h = call.fresh({c.R, c.F});
  const Tensor readable = aligned_rows(call, x, c.dtype);
  pre_activations(call, c, readable, with_gate_and_up(call, s), b_in, save ? gate.mutable_data_ptr() : nullptr,
                  save && c.gated ? up.mutable_data_ptr() : nullptr, h.mutable_data_ptr());
  h = aligned_rows(call, h, c.dtype);
  combined_product(call, c.experts, dense_rows(h.const_data_ptr(), h.stride(0)), c.F, with_codes(call, s.down, false),
                   c.O, call.dense(b_down), c.experts.weight, y);
  return {y, gate, up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_quantized_backward(
    const Tensor& d_y, const Tensor& x, MaybeTensor token, MaybeTensor weight, MaybeTensor offsets, MaybeTensor row,
    MaybeTensor slot_offsets, std::vector<Tensor> w_in, std::vector<Tensor> w_up, std::vector<Tensor> w_down,
    std::string formats, MaybeTensor b_in, MaybeTensor b_down, MaybeTensor lora_a_in, MaybeTensor lora_b_in,
    MaybeTensor lora_a_down, MaybeTensor lora_b_down, const Tensor& gate, const Tensor& up, bool gated,
    bool interleaved, std::string activation, std::vector<double> params, double, std::vector<bool> needs) {
  check_needs(needs, 8);
  refuse_adapters({&lora_a_in, &lora_b_in, &lora_a_down, &lora_b_down});
  Call call(x, "x");
  const QuantizedMoeShape s = check(call.place(), x, token, weight, offsets, row, slot_offsets, w_in, w_up, w_down,
                                    formats, b_in, b_down, gated, interleaved, check_gate(activation, params));
  check_tensor(d_y, "d_y", s.dtype, {s.T, s.O}, call.place());
  const bool saved = check_saved("moe_quantized", gate, up, s.dtype, s.R, s.F, s.gated, call.place());
  const Moe c = describe(call, s, token, weight, offsets, row, slot_offsets);
  const bool need_x = needs[0], need_weight = needs[1] && c.routed, need_b_in = needs[2], need_b_down = needs[3];
  const bool need_hidden = need_x || need_b_in || need_weight;

  const void* gate_data = gate.const_data_ptr();
  const void* up_data = c.gated ? up.const_data_ptr() : nullptr;
  Tensor again[2] = {call.nothing(), call.nothing()};
  if (!saved && need_hidden) {
    for (int i = 0; i < (c.gated ? 2 : 1); ++i) again[i] = call.fresh({c.R, c.F});
    void* up_again = c.gated ? again[1].mutable_data_ptr() : nullptr;
    pre_activations(call, c, aligned_rows(call, x, c.dtype), with_gate_and_up(call, s), b_in,
                    again[0].mutable_data_ptr(), up_again, nullptr);
    gate_data = again[0].const_data_ptr();
    up_data = up_again;
  }

  Tensor d_hidden = need_hidden ? call.fresh({c.R, c.hidden()}) : call.nothing();
  HiddenGradient of;
  if (need_weight) {
    of.num_parts = row_dots_parts(c.dtype, c.F);
    of.parts = call.workspace(c.R * of.num_parts * storage_size(arithmetic_dtype(c.dtype)));
  }
  if (need_hidden) {
    of.d_hidden = d_hidden.mutable_data_ptr();
    hidden_gradient(c, aligned_rows(call, d_y, c.dtype), with_codes(call, s.down, true), gate_data, up_data, of);
  }
  Tensor d_weight = need_weight ? call.fresh(arithmetic_dtype(c.dtype), {c.R}) : call.nothing();
  if (need_weight) weight_gradient(call, c, d_y, b_down, of, d_weight);

  Tensor d_x = need_x ? call.fresh({c.T, c.D}) : call.nothing();
  if (need_x) {
    const Tensor rows = aligned_rows(call, d_hidden, c.dtype);
    combined_product(call, c.experts, dense_rows(rows.const_data_ptr(), rows.stride(0)), c.hidden(),
                     with_codes(call, s.in, true, s.up), c.D, nullptr, nullptr, d_x);
  }
  Tensor d_b_in = need_b_in ? call.fresh({c.E, c.hidden()}) : call.nothing();
  if (need_b_in) sum_expert_rows(call, c.experts, dense_rows(d_hidden.const_data_ptr(), c.hidden()), nullptr, d_b_in);
  Tensor d_b_down = need_b_down ? call.fresh({c.E, c.O}) : call.nothing();
  if (need_b_down) sum_expert_rows(call, c.experts, token_rows(c.experts, d_y), c.experts.weight, d_b_down);
  const auto none = [&] { return call.nothing(); };
  return {d_x, d_weight, d_b_in, d_b_down, none(), none(), none(), none()};
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("moe_quantized", TORCH_BOX(&ffn_ops::cuda::moe_quantized));
  m.impl("moe_quantized_backward", TORCH_BOX(&ffn_ops::cuda::moe_quantized_backward));
}
