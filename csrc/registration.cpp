// SPDX-License-Identifier: BSD-3-Clause
// Every operator's schema on one screen. Kernels are registered for their device in cpu/ and cuda/.
//
// Shapes: x [T, D], weights [out, in] as nn.Linear has them, gate and up [T, F]. `save` asks for the pre-activations
// that backward needs (else those results are empty). Gradients that `needs` does not ask for come back empty. `params`
// of an activation: limit (0: none; AOTInductor writes no infinity), up_shift, then its own parameters as
// common/activations.h declares them. interleaved: rows of one input weight alternate between gate and up.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ffn_ops, m) {
  m.def("gated_act(Tensor gate, Tensor? up, str activation, float[] params) -> Tensor");
  m.def(
      "gated_act_backward(Tensor d_out, Tensor gate, Tensor? up, str activation, float[] params,"
      " bool[2] needs) -> (Tensor d_gate, Tensor d_up)");
  m.def(
      "gated_act_double_backward(Tensor? dd_gate, Tensor? dd_up, Tensor d_out, Tensor gate, Tensor? up, str activation,"
      " float[] params) -> (Tensor d_d_out, Tensor d_gate, Tensor d_up)");

  // own [count]: the activation's own parameters, of the arithmetic's dtype.
  m.def("learned_act(Tensor x, Tensor own, str activation) -> Tensor");
  m.def(
      "learned_act_backward(Tensor d_out, Tensor x, Tensor own, str activation, bool[2] needs)"
      " -> (Tensor d_x, Tensor d_own)");
  m.def(
      "learned_act_double_backward(Tensor dd_x, Tensor d_out, Tensor x, Tensor own, str activation)"
      " -> (Tensor d_d_out, Tensor d_x, Tensor d_own)");

  m.def(
      "gated_linear(Tensor x, Tensor[] w_gate, Tensor[] w_up, Tensor[] b_gate, Tensor[] b_up, str activation,"
      " float[] params, bool save) -> (Tensor y, Tensor gate, Tensor up)");
  m.def(
      "gated_linear_backward(Tensor d_y, Tensor x, Tensor[] w_gate, Tensor[] w_up, Tensor[] b_gate, Tensor[] b_up,"
      " Tensor gate, Tensor up, str activation, float[] params, bool[5] needs)"
      " -> (Tensor d_x, Tensor d_w_gate, Tensor d_w_up, Tensor d_b_gate, Tensor d_b_up)");

  m.def(
      "ffn(Tensor x, Tensor w_in, Tensor? w_up, Tensor w_down, Tensor? b_in, Tensor? b_up, Tensor? b_down, bool gated,"
      " bool interleaved, str activation, float[] params, bool save)"
      " -> (Tensor y, Tensor gate, Tensor up)");
  m.def(
      "ffn_backward(Tensor d_y, Tensor x, Tensor w_in, Tensor? w_up, Tensor w_down, Tensor? b_in, Tensor? b_up,"
      " Tensor gate, Tensor up, bool gated, bool interleaved, str activation, float[] params, bool[7] needs)"
      " -> (Tensor d_x, Tensor d_w_in, Tensor d_w_up, Tensor d_w_down, Tensor d_b_in, Tensor d_b_up, Tensor d_b_down)");

  // Mixture of experts. Rows [R] are pairs of a token and an expert, sorted by expert: those of expert e are
  // offsets[e] .. offsets[e + 1], rows from offsets[E] on are dropped. token [R] is the source of each row, weight [R]
  // its factor; the rows of token t are row[slot_offsets[t]] .. row[slot_offsets[t + 1]]. Without token, weight, row
  // and slot_offsets x holds the rows themselves, and so does the result.
  m.def(
      "moe(Tensor x, Tensor? token, Tensor? weight, Tensor offsets, Tensor? row, Tensor? slot_offsets, Tensor w_in,"
      " Tensor w_down, Tensor? b_in, Tensor? b_down, bool gated, bool interleaved, str activation,"
      " float[] params, bool save) -> (Tensor y, Tensor gate, Tensor up)");
  m.def(
      "moe_backward(Tensor d_y, Tensor x, Tensor? token, Tensor? weight, Tensor offsets, Tensor? row,"
      " Tensor? slot_offsets, Tensor w_in, Tensor w_down, Tensor? b_in, Tensor? b_down, Tensor gate, Tensor up,"
      " bool gated, bool interleaved, str activation, float[] params, bool[6] needs)"
      " -> (Tensor d_x, Tensor d_weight, Tensor d_w_in, Tensor d_w_down, Tensor d_b_in, Tensor d_b_down)");
  // With adapters: w_in + scale * lora_b_in lora_a_in, and the same of w_down. lora_a [E, rank, in], lora_b [E, out,
  // rank], of x's dtype or of the arithmetic's. With w_up, w_in has gate's rows alone; lora_b_in has those of both.
  // Without offsets: one expert, which takes every row.
  m.def(
      "moe_lora(Tensor x, Tensor? token, Tensor? weight, Tensor? offsets, Tensor? row, Tensor? slot_offsets,"
      " Tensor w_in, Tensor? w_up, Tensor w_down, Tensor? b_in, Tensor? b_down, Tensor? lora_a_in, Tensor? lora_b_in,"
      " Tensor? lora_a_down, Tensor? lora_b_down, bool gated, bool interleaved, str activation, float[] params,"
      " float scale, bool save) -> (Tensor y, Tensor gate, Tensor up)");
  m.def(
      "moe_lora_backward(Tensor d_y, Tensor x, Tensor? token, Tensor? weight, Tensor? offsets, Tensor? row,"
      " Tensor? slot_offsets, Tensor w_in, Tensor? w_up, Tensor w_down, Tensor? b_in, Tensor? b_down,"
      " Tensor? lora_a_in, Tensor? lora_b_in, Tensor? lora_a_down, Tensor? lora_b_down, Tensor gate, Tensor up,"
      " bool gated, bool interleaved, str activation, float[] params, float scale, bool[11] needs)"
      " -> (Tensor d_x, Tensor d_weight, Tensor d_w_in, Tensor d_w_up, Tensor d_w_down, Tensor d_b_in, Tensor d_b_down,"
      " Tensor d_a_in, Tensor d_lora_b_in, Tensor d_a_down, Tensor d_lora_b_down)");
  m.def(
      "moe_dispatch(Tensor x, Tensor token, Tensor? weight, Tensor offsets, Tensor row, Tensor slot_offsets)"
      " -> Tensor");
  m.def(
      "moe_combine(Tensor rows, Tensor token, Tensor? weight, Tensor offsets, Tensor row, Tensor slot_offsets)"
      " -> Tensor");
  m.def("moe_row_dots(Tensor a, Tensor rows, Tensor token, Tensor offsets, Tensor row, Tensor slot_offsets) -> Tensor");
  m.def("moe_linear(Tensor rows, Tensor w, Tensor offsets) -> Tensor");
  m.def("moe_outer(Tensor a, Tensor b, Tensor offsets) -> Tensor");

  // Quantised weights [E, N, K]: each is a list of its tensors, `formats` has the name of each with the block of a
  // scale, such as "mxfp4:1x32,fp8:128x128", separated by commas. Of two formats the
  // operators do not read w_up: it is empty, or any list, because AOTInductor's packages do not take an empty one.
  m.def("dequantize(Tensor[] w, str format, str dtype) -> Tensor");
  m.def("quantized_linear(Tensor rows, Tensor[] w, str format, Tensor offsets, bool transposed) -> Tensor");
  m.def(
      "moe_quantized(Tensor x, Tensor? token, Tensor? weight, Tensor? offsets, Tensor? row, Tensor? slot_offsets,"
      " Tensor[] w_in, Tensor[] w_up, Tensor[] w_down, str formats, Tensor? b_in, Tensor? b_down, Tensor? lora_a_in,"
      " Tensor? lora_b_in, Tensor? lora_a_down, Tensor? lora_b_down, bool gated, bool interleaved, str activation,"
      " float[] params, float scale, bool save) -> (Tensor y, Tensor gate, Tensor up)");
  m.def(
      "moe_quantized_backward(Tensor d_y, Tensor x, Tensor? token, Tensor? weight, Tensor? offsets, Tensor? row,"
      " Tensor? slot_offsets, Tensor[] w_in, Tensor[] w_up, Tensor[] w_down, str formats, Tensor? b_in, Tensor? b_down,"
      " Tensor? lora_a_in, Tensor? lora_b_in, Tensor? lora_a_down, Tensor? lora_b_down, Tensor gate, Tensor up,"
      " bool gated, bool interleaved, str activation, float[] params, float scale, bool[8] needs)"
      " -> (Tensor d_x, Tensor d_weight, Tensor d_b_in, Tensor d_b_down, Tensor d_a_in, Tensor d_lora_b_in,"
      " Tensor d_a_down, Tensor d_lora_b_down)");

  // Logits [T, E] of the arithmetic's dtype; weight and bias of x's dtype, or of the arithmetic's.
  m.def("route_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "route_linear_backward(Tensor d_logits, Tensor x, Tensor weight, bool[3] needs)"
      " -> (Tensor d_x, Tensor d_weight, Tensor d_bias)");

  // Routing. Indices >= num_experts (or num_tokens) are skipped; capacity < 0: none.
  m.def(
      "route_top_k(Tensor logits, Tensor? bias, Tensor? ids, SymInt k, int shared, str score, bool renormalize,"
      " bool by_logits, int num_groups, int top_groups, int group_best, float scale) -> (Tensor weights, Tensor ids)");
  m.def(
      "route_top_k_backward(Tensor d_weights, Tensor logits, Tensor ids, str score, bool renormalize,"
      " bool by_logits, float scale) -> Tensor");
  m.def(
      "moe_sort(Tensor expert, Tensor? token, Tensor weight, SymInt num_experts, SymInt num_tokens, SymInt capacity,"
      " bool by_weight) -> (Tensor weight, Tensor token, Tensor offsets, Tensor row, Tensor slot_offsets,"
      " Tensor counts, Tensor place)");
  m.def("balanced_assignment(Tensor scores, Tensor? mask) -> Tensor");
  m.def("round_tokens(Tensor scores, Tensor ids, int tile) -> (Tensor expert, Tensor token)");

  // The list of common/activations.h as JSON: name, parameters of its own, whether it has a side of up, how many
  // parameters may be learned.
  m.def("_gates() -> str");
  // Facts about this build and machine, and the choice that FFN_OPS_ISA makes at load, for tests over every set.
  m.def("_isa() -> str");
  m.def("_isas() -> str");
  m.def("_use_isa(str name) -> ()");
  m.def("_has_amx() -> bool");
  // The machine's limits: GFLOP/s of float32 multiply-adds, and GB/s of one pass over a float32 buffer.
  m.def("_peak_fma(str isa, int threads, float seconds) -> float");
  m.def("_peak_read(Tensor buffer, str isa, int threads) -> float");
  // Moves memory onto huge pages in its place; gives the bytes of it that lie on them.
  m.def("_use_huge_pages(int address, int bytes) -> int");
  // Workspace that the CPU keeps for later calls.
  m.def("_empty_cache() -> ()");
  m.def("_cached_bytes() -> int");
  m.def("_cache_limit() -> int");
  m.def("_set_cache_limit(int bytes) -> ()");
}
