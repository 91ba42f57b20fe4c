// SPDX-License-Identifier: BSD-3-Clause
// See moe_steps.h.
#include "moe_steps.h"

#include "gemm_grid.h"

namespace ffn_ops::cuda {

Moe describe(Call& call, const MoeShape& s, const MaybeTensor& token, const MaybeTensor& weight,
             const MaybeTensor& offsets, const MaybeTensor& row, const MaybeTensor& slot_offsets) {
  Moe c{s, {s.dtype, s.E, s.R, call.indices(offsets)}};
  Experts& e = c.experts;
  e.routed = s.routed;
  e.routes.kept = e.offsets ? e.offsets + s.E : nullptr;
  e.routes.tokens = s.T;
  e.routes.rows = s.R;
  e.routes.token = call.indices(token);
  e.routes.row = call.indices(row);
  e.routes.slot_offsets = call.indices(slot_offsets);
  e.weight = call.dense(weight);
  return c;
}

void pre_activations(Call& call, const Moe& c, const Tensor& x, const WithWeights& product, const MaybeTensor& b_in,
                     void* gate, void* up, void* h) {
  GroupedGemm g = rows_product(c.experts, token_rows(c.experts, x), c.D, c.F);
  g.gated = c.gated;
  Epilogue& e = g.epilogue;
  e.kind = Epilogue::Kind::kActivate;
  e.out = h;
  e.out_stride = e.pre_stride = c.F;
  e.gate = gate;
  e.up = up;
  e.bias = call.dense(b_in && c.interleaved ? MaybeTensor(gate_then_up(*b_in)) : b_in);
  e.bias_up = c.gated ? advance(e.bias, c.F, c.dtype) : nullptr;
  e.bias_stride = c.hidden();
  e.set_form(c.form);
  product(g, 0);
}

void hidden_gradient(const Moe& c, const Tensor& d_y, const WithWeights& product, const void* gate, const void* up,
                     const HiddenGradient& out) {
  GroupedGemm g = rows_product(c.experts, token_rows(c.experts, d_y), c.O, c.F);
  Epilogue& e = g.epilogue;
  e.kind = Epilogue::Kind::kActivateGrad;
  e.out = out.d_hidden;
  e.out_up = c.gated && !c.interleaved ? advance(out.d_hidden, c.F, c.dtype) : nullptr;
  e.interleaved = c.interleaved;
  e.out_stride = c.hidden();
  e.h = out.h;
  e.gate = const_cast<void*>(gate);
  e.up = const_cast<void*>(up);
  e.pre_stride = c.F;
  e.set_form(c.form);
  e.row_weight = c.experts.weight;
  e.weigh_h = out.weigh_h;
  e.row_dots = out.parts;
  e.row_dots_stride = out.num_parts;
  product(g, 0);
}

void weight_gradient(Call& call, const Moe& c, const Tensor& d_y, const MaybeTensor& b_down, const HiddenGradient& of,
                     Tensor& d_weight) {
  RowDots job;
  job.routes = c.experts.routes;
  job.dtype = c.dtype;
  if (b_down) {
    job.cols = c.O;
    job.a = matrix(d_y);
    job.b = dense_matrix(call.dense(b_down), c.O);
    job.offsets = c.experts.offsets;
    job.experts = c.E;
  }
  job.parts = of.parts;
  job.num_parts = of.num_parts;
  job.out = d_weight.mutable_data_ptr();
  launch_row_dots(call, job);
}

}  // namespace ffn_ops::cuda
