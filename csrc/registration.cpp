// Every operator's schema on one screen. Kernels are registered for their device in cpu/ and cuda/.
//
// Shapes: x [T, D], weights [out, in] as nn.Linear has them, gate and up [T, F]. `save` asks for the pre-activations
// that backward needs (else those results are empty). Gradients that `needs` does not ask for come back empty.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ffn_ops, m) {
  m.def("gated_act(Tensor gate, Tensor? up, str activation, float beta) -> Tensor");
  m.def(
      "gated_act_backward(Tensor d_out, Tensor gate, Tensor? up, str activation, float beta, bool[2] needs)"
      " -> (Tensor d_gate, Tensor d_up)");
  m.def(
      "gated_act_double_backward(Tensor? dd_gate, Tensor? dd_up, Tensor d_out, Tensor gate, Tensor? up, str activation,"
      " float beta) -> (Tensor d_d_out, Tensor d_gate, Tensor d_up)");

  m.def(
      "gated_linear(Tensor x, Tensor[] w_gate, Tensor[] w_up, Tensor[] b_gate, Tensor[] b_up, str activation,"
      " float beta, bool save) -> (Tensor y, Tensor gate, Tensor up)");
  m.def(
      "gated_linear_backward(Tensor d_y, Tensor x, Tensor[] w_gate, Tensor[] w_up, Tensor[] b_gate, Tensor[] b_up,"
      " Tensor gate, Tensor up, str activation, float beta, bool[5] needs)"
      " -> (Tensor d_x, Tensor d_w_gate, Tensor d_w_up, Tensor d_b_gate, Tensor d_b_up)");

  m.def(
      "ffn(Tensor x, Tensor w_in, Tensor? w_up, Tensor w_down, Tensor? b_in, Tensor? b_up, Tensor? b_down, bool gated,"
      " str activation, float beta, bool save) -> (Tensor y, Tensor gate, Tensor up)");
  m.def(
      "ffn_backward(Tensor d_y, Tensor x, Tensor w_in, Tensor? w_up, Tensor w_down, Tensor? b_in, Tensor? b_up,"
      " Tensor gate, Tensor up, bool gated, str activation, float beta, bool[7] needs)"
      " -> (Tensor d_x, Tensor d_w_in, Tensor d_w_up, Tensor d_w_down, Tensor d_b_in, Tensor d_b_up, Tensor d_b_down)");

  // Facts about this build and machine, and the choice that FFN_OPS_ISA makes at load, for tests over every set.
  m.def("_isa() -> str");
  m.def("_isas() -> str");
  m.def("_use_isa(str name) -> ()");
  m.def("_has_amx() -> bool");
}
