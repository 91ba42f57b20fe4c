// SPDX-License-Identifier: BSD-3-Clause
// See moe_steps.h.
#include "moe_steps.h"

#include "gemm_grid.h"
#include "passes.h"
#include "rows.h"

namespace ffn_ops::cuda {

Moe describe(Call& call, const MoeShape& s, const MaybeTensor& token, const MaybeTensor& weight,
             const MaybeTensor& offsets, const MaybeTensor& row, const MaybeTensor& slot_offsets) {
  Moe c{s, {s.dtype, s.E, s.R, call.indices(offsets)}, {}, {}};
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

namespace {

// ---- adapters -------------------------------------------------------------------------------------------------------

Operand row_major(const Tensor& t) { return dense_rows(t.const_data_ptr(), t.stride(0)); }

Tensor as_dtype(const Tensor& t, DType dtype) { return torch::stable::to(t, scalar_type_of(dtype)); }

// A factor of an adapter. With the experts last its elements lie too far apart to be read together.
const Tensor& dense_factor(const Moe& c, const Tensor& t, DType dtype) {
  for (const Moe::Copy& each : c.factors)
    if (each.of == &t && each.dtype == dtype) return each.dense;
  c.factors.push_back({&t, dtype, as_dtype(is_expert_last(t) ? torch::stable::contiguous(t) : t, dtype)});
  return c.factors.back().dense;
}

// Rows of tokens, or of the experts in order: [R, width]. Where the arithmetic's dtype is wanted they are copied once.
class Rows {
 public:
  Rows(const Tensor& matrix, bool tokens) : matrix_(matrix), tokens_(tokens) {}
  int64_t width() const { return matrix_.size(1); }
  DType dtype() const { return storage_dtype(matrix_, "rows"); }
  Operand operand(const Experts& c, DType wanted) {
    if (wanted != dtype() && !wide_) wide_ = as_dtype(matrix_, wanted);
    const Tensor& t = wanted == dtype() ? matrix_ : *wide_;
    return tokens_ ? token_rows(c, t) : row_major(t);
  }

 private:
  Tensor matrix_;
  bool tokens_;
  std::optional<Tensor> wide_;
};

// scale * rows a^T, or rows b: [R, rank] of the arithmetic's dtype.
Tensor narrow_product(Call& call, const Moe& c, const LowRank& lora, Rows& rows, bool by_b) {
  const DType wide = arithmetic_dtype(c.dtype);
  const DType dtype = rows.dtype() == lora.dtype ? lora.dtype : wide;
  const Tensor factor = dense_factor(c, by_b ? *lora.b : *lora.a, dtype);
  Tensor out = call.fresh(wide, {c.R, lora.rank});
  GroupedGemm g = rows_product(c.experts, rows.operand(c.experts, dtype), rows.width(), lora.rank);
  g.dtype = dtype;
  g.b = expert_weights(factor, dtype, by_b, 0);
  g.epilogue.scale = lora.scale;
  g.epilogue.unrounded = true;
  g.epilogue.out = out.mutable_data_ptr();
  g.epilogue.out_stride = lora.rank;
  launch_product(call, g);
  return out;
}

// What joins another product: narrow b^T, or narrow a, from column `col` on, of every step-th column.
void widen_product(Call& call, const Moe& c, const LowRank& lora, const Tensor& narrow, bool by_a, int64_t col,
                   int64_t width, int64_t step, void* out, int64_t out_stride) {
  const DType dtype = arithmetic_dtype(c.dtype);
  const Tensor factor = dense_factor(c, by_a ? *lora.a : *lora.b, dtype);
  GroupedGemm g = rows_product(c.experts, dense_rows(narrow.const_data_ptr(), lora.rank), lora.rank, width);
  g.dtype = dtype;
  g.b = expert_weights(factor, dtype, by_a, col);
  g.b.lane_stride *= step;
  g.epilogue.out = out;
  g.epilogue.out_stride = out_stride;
  launch_product(call, g);
}

// For combined_product; none without adapters.
AddedColumns added_columns(Call& call, const Moe& c, const LowRank& lora, const Tensor& narrow, bool by_a) {
  if (lora.rank == 0) return {};
  return [&call, &c, &lora, narrow, by_a](int64_t col, int64_t width) {
    Tensor out = call.fresh(arithmetic_dtype(c.dtype), {c.R, width});
    widen_product(call, c, lora, narrow, by_a, col, width, 1, out.mutable_data_ptr(), width);
    return out;
  };
}

// The same matrix as `products` can read it.
Tensor readable(const Call& call, const Moe& c, const Products& products, const Tensor& t) {
  return products.aligned_rows ? aligned_rows(call, t, c.dtype) : t;
}

// ---- steps ----------------------------------------------------------------------------------------------------------

// Gate and up [R, F] and h [R, F], each where given.
void pre_activations(Call& call, const Moe& c, const Tensor& x, const WithWeights& product, const MaybeTensor& b_in,
                     void* gate, void* up, void* h) {
  const DType wide = arithmetic_dtype(c.dtype);
  GroupedGemm g = rows_product(c.experts, token_rows(c.experts, x), c.D, c.F);
  g.gated = c.gated;
  Epilogue& e = g.epilogue;
  Tensor added = call.nothing();  // [R, hidden], gate's columns first
  if (c.lora_in.rank > 0) {
    Rows x_rows(x, true);
    const Tensor narrow = narrow_product(call, c, c.lora_in, x_rows, false);
    added = call.fresh(wide, {c.R, c.hidden()});
    const int64_t parts = c.interleaved ? 2 : 1;
    for (int64_t part = 0; part < parts; ++part)
      widen_product(call, c, c.lora_in, narrow, false, part, c.hidden() / parts, parts,
                    advance(added.mutable_data_ptr(), part * c.F, wide), c.hidden());
    e.added = added.const_data_ptr();
    e.added_up = c.gated ? advance(e.added, c.F, wide) : nullptr;
    e.added_stride = c.hidden();
  }
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

// The results of backward's pass over the hidden width, each only if it has memory.
struct HiddenGradient {
  void* d_hidden = nullptr;  // [R, 2F]: d_gate, then d_up, or alternating
  void* h = nullptr;         // [R, F], times the row's weight where `weigh_h` says so
  bool weigh_h = true;
  void* parts = nullptr;  // [R, num_parts]: of the gradient of the row's weight
  int64_t num_parts = 0;
};

// `added` [R, F] of the arithmetic's dtype joins the gradient of h, where given.
void hidden_gradient(const Moe& c, const Tensor& d_y, const WithWeights& product, const void* gate, const void* up,
                     const void* added, const HiddenGradient& out) {
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
  e.pre_stride = e.added_stride = c.F;
  e.added = added;
  e.set_form(c.form);
  e.row_weight = c.experts.weight;
  e.weigh_h = out.weigh_h;
  e.row_dots = out.parts;
  e.row_dots_stride = out.num_parts;
  product(g, 0);
}

// Only h, if nothing else is needed.
void hidden(const Call& call, const Moe& c, const void* gate, const void* up, const HiddenGradient& out) {
  GatedAct a;
  a.set_form(c.form);
  a.rows = c.R;
  a.cols = a.out_stride[2] = c.F;
  a.dtype = c.dtype;
  a.kept = c.experts.routes.kept;
  a.gate = a.d_out = dense_matrix(gate, c.F);  // d_out: any value, nothing uses it
  if (c.gated) a.up = dense_matrix(up, c.F);
  a.out[2] = out.h;
  a.row_weight = out.weigh_h ? c.experts.weight : nullptr;
  launch_gated_act_backward(call, a);
}

void routing_weight_gradient(Call& call, const Moe& c, const Tensor& d_y, const MaybeTensor& b_down,
                             const HiddenGradient& of, Tensor& d_weight) {
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

// Rows of tokens [T, width], times their weights: [R, width] of the same dtype.
Tensor weighted_rows(const Call& call, const Moe& c, const Tensor& t, DType dtype) {
  Tensor out = call.fresh(dtype, {c.R, t.size(1)});
  MoveRows m;
  m.routes = c.experts.routes;
  m.cols = t.size(1);
  m.in = matrix(t);
  m.dtype = dtype;
  m.weight = c.experts.weight;
  m.out = out.mutable_data_ptr();
  m.out_stride = m.cols;
  launch_dispatch_rows(call, m);
  return out;
}

// d_w [E, N, K] = sum over each expert's rows of d_out^T in, of the experts' dtype, stored as the weight is.
Tensor weights_gradient(Call& call, const Experts& c, const Tensor& w, const Operand& d_out, const Operand& in) {
  const int64_t N = w.size(1), K = w.size(2);
  const bool turned = is_transposed(w);
  Tensor d_w = turned ? call.fresh(c.dtype, {c.E, K, N}) : call.fresh(c.dtype, {c.E, N, K});
  if (turned) outer_products(call, c, in, K, d_out, N, d_w);
  else outer_products(call, c, d_out, N, in, K, d_w);
  return turned ? torch::stable::transpose(d_w, 1, 2) : d_w;
}

// The gradient of a factor of `lora`, in the arithmetic's dtype and then rounded to its own; stored as the factor is.
Tensor factor_gradient(Call& call, const Moe& c, const LowRank& lora, const Tensor& factor, Rows& d_out, Rows& in) {
  Experts wide = c.experts;
  wide.dtype = arithmetic_dtype(c.dtype);
  const Tensor d = as_dtype(
      weights_gradient(call, wide, factor, d_out.operand(wide, wide.dtype), in.operand(wide, wide.dtype)), lora.dtype);
  if (!is_expert_last(factor)) return d;
  using torch::stable::transpose;
  const Tensor stored = torch::stable::contiguous(transpose(transpose(d, 0, 1), 1, 2));  // [N, K, E]
  return transpose(transpose(stored, 1, 2), 0, 1);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> run_experts(Call& call, const Moe& c, const Tensor& x, const Products& products,
                                               const MaybeTensor& b_in, const MaybeTensor& b_down, bool save) {
  Tensor y = call.fresh({c.T, c.O});
  Tensor gate = save ? call.fresh({c.R, c.F}) : call.nothing();
  Tensor up = save && c.gated ? call.fresh({c.R, c.F}) : call.nothing();
  Tensor h = call.fresh({c.R, c.F});
  pre_activations(call, c, readable(call, c, products, x), products.in, b_in, save ? gate.mutable_data_ptr() : nullptr,
                  save && c.gated ? up.mutable_data_ptr() : nullptr, h.mutable_data_ptr());
  h = readable(call, c, products, h);
  Tensor narrow = call.nothing();
  Rows h_rows(h, false);
  if (c.lora_down.rank > 0) narrow = narrow_product(call, c, c.lora_down, h_rows, false);
  combined_product(call, c.experts, row_major(h), c.F, products.down, c.O, call.dense(b_down), c.experts.weight, y,
                   added_columns(call, c, c.lora_down, narrow, false));
  return {y, gate, up};
}

std::array<Tensor, kInputs> run_experts_backward(Call& call, const Moe& c, const std::string& op, const Tensor& d_y,
                                                 const Tensor& x, const Products& products, const PlainWeights& plain,
                                                 const MaybeTensor& b_in, const MaybeTensor& b_down, const Tensor& gate,
                                                 const Tensor& up, const std::array<bool, kInputs>& asked) {
  check_tensor(d_y, "d_y", c.dtype, {c.T, c.O}, call.place());
  const bool saved = check_saved(op, gate, up, c.dtype, c.R, c.F, c.gated, call.place());
  const LowRank &lora_in = c.lora_in, &lora_down = c.lora_down;
  const Needed need(asked, c.routed, plain, lora_in, lora_down);
  const DType wide = arithmetic_dtype(c.dtype);

  const void* gate_data = gate.const_data_ptr();
  const void* up_data = c.gated ? up.const_data_ptr() : nullptr;
  Tensor again[2] = {call.nothing(), call.nothing()};
  if (!saved && (need.hidden || need.h)) {
    for (int i = 0; i < (c.gated ? 2 : 1); ++i) again[i] = call.fresh({c.R, c.F});
    void* up_again = c.gated ? again[1].mutable_data_ptr() : nullptr;
    pre_activations(call, c, readable(call, c, products, x), products.in, b_in, again[0].mutable_data_ptr(), up_again,
                    nullptr);
    gate_data = again[0].const_data_ptr();
    up_data = up_again;
  }

  Tensor d_hidden = need.hidden ? call.fresh({c.R, c.hidden()}) : call.nothing();
  Tensor h = need.h ? call.fresh({c.R, c.F}) : call.nothing();
  HiddenGradient of;
  if (need.h) of.h = h.mutable_data_ptr();
  // The weight times h can be too small for float16; dY is multiplied by the weight there, as in eager.
  of.weigh_h = c.dtype != DType::kFloat16;
  const bool weigh_d_y = c.routed && !of.weigh_h;
  if (need[kWeight]) {
    of.num_parts = row_dots_parts(c.dtype, c.F);
    of.parts = call.workspace(c.R * of.num_parts * storage_size(wide));
  }
  Rows d_y_rows(d_y, true), x_rows(x, true);
  Tensor d_narrow = call.nothing();  // dY b_down, not yet times the row's weight
  if (lora_down.rank && (need.hidden || (need[kLoraADown] && !weigh_d_y)))
    d_narrow = narrow_product(call, c, lora_down, d_y_rows, true);
  if (need.hidden) {
    of.d_hidden = d_hidden.mutable_data_ptr();
    Tensor added = lora_down.rank ? call.fresh(wide, {c.R, c.F}) : call.nothing();
    if (lora_down.rank) widen_product(call, c, lora_down, d_narrow, true, 0, c.F, 1, added.mutable_data_ptr(), c.F);
    hidden_gradient(c, readable(call, c, products, d_y), products.down_columns, gate_data, up_data,
                    lora_down.rank ? added.const_data_ptr() : nullptr, of);
  } else if (need.h) {
    hidden(call, c, gate_data, up_data, of);
  }

  std::array<Tensor, kInputs> d;
  d.fill(call.nothing());
  if (need[kWeight]) {
    d[kWeight] = call.fresh(wide, {c.R});
    routing_weight_gradient(call, c, d_y, b_down, of, d[kWeight]);
  }
  if (need[kDown] && weigh_d_y) {
    const Tensor weighted = weighted_rows(call, c, d_y, c.dtype);
    d[kDown] = weights_gradient(call, c.experts, *plain.down, row_major(weighted), row_major(h));
  } else if (need[kDown]) {
    d[kDown] = weights_gradient(call, c.experts, *plain.down, token_rows(c.experts, d_y), row_major(h));
  }
  if (need[kLoraADown] || need[kLoraBDown]) {
    Rows h_rows(h, false);
    if (weigh_d_y) d_y_rows = Rows(weighted_rows(call, c, as_dtype(d_y, wide), wide), false);
    if (need[kLoraADown]) {
      Rows narrow(weigh_d_y ? narrow_product(call, c, lora_down, d_y_rows, true) : d_narrow, false);
      d[kLoraADown] = factor_gradient(call, c, lora_down, *lora_down.a, narrow, h_rows);
    }
    if (need[kLoraBDown]) {
      Rows narrow(narrow_product(call, c, lora_down, h_rows, false), false);
      d[kLoraBDown] = factor_gradient(call, c, lora_down, *lora_down.b, d_y_rows, narrow);
    }
  }

  const Operand hidden_rows = row_major(d_hidden);
  Rows d_hidden_rows(d_hidden, false);
  Tensor d_in = call.nothing();
  if (lora_in.rank && (need[kX] || need[kLoraAIn])) d_in = narrow_product(call, c, lora_in, d_hidden_rows, true);
  if (need[kX]) {
    d[kX] = call.fresh({c.T, c.D});
    const Tensor rows = readable(call, c, products, d_hidden);
    combined_product(call, c.experts, row_major(rows), c.hidden(), products.in_columns, c.D, nullptr, nullptr, d[kX],
                     added_columns(call, c, lora_in, d_in, true));
  }
  if (need[kIn]) d[kIn] = weights_gradient(call, c.experts, *plain.in, hidden_rows, token_rows(c.experts, x));
  if (need[kUp]) {
    const Operand up_rows = dense_rows(advance(d_hidden.const_data_ptr(), c.F, c.dtype), c.hidden());
    d[kUp] = weights_gradient(call, c.experts, *plain.up, up_rows, token_rows(c.experts, x));
  }
  if (need[kLoraAIn]) {
    Rows narrow(d_in, false);
    d[kLoraAIn] = factor_gradient(call, c, lora_in, *lora_in.a, narrow, x_rows);
  }
  if (need[kLoraBIn]) {
    Rows narrow(narrow_product(call, c, lora_in, x_rows, false), false);
    d[kLoraBIn] = factor_gradient(call, c, lora_in, *lora_in.b, d_hidden_rows, narrow);
  }
  if (need[kBIn]) {
    d[kBIn] = call.fresh({c.E, c.hidden()});
    sum_expert_rows(call, c.experts, hidden_rows, nullptr, d[kBIn]);
  }
  if (need[kBDown]) {
    d[kBDown] = call.fresh({c.E, c.O});
    sum_expert_rows(call, c.experts, token_rows(c.experts, d_y), c.experts.weight, d[kBDown]);
  }
  return d;
}

}  // namespace ffn_ops::cuda
