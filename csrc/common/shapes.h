// SPDX-License-Identifier: BSD-3-Clause
// Checks of whole operators, for every device. Each returns the extents of a call, or reports the argument that does
// not fit. The device checks the values of indices and offsets.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "descriptors.h"
#include "names.h"

namespace ffn_ops {

using MaybeTensor = std::optional<Tensor>;

inline void check_same(const Tensor& t, const char* name, const Tensor& like, DType dtype, Place place = {},
                       const char* of = "x") {
  if (like.dim() == 2) check_tensor(t, name, dtype, {like.size(0), like.size(1)}, place, of);
  else check_tensor(t, name, dtype, {like.numel()}, place, of);
}

// ---- gated_act ------------------------------------------------------------------------------------------------------

struct GatedActShape {
  DType dtype;
  int64_t rows, cols;
  Gate form;
};

inline GatedActShape check_gated_act(const Tensor& gate, const MaybeTensor& up, const Gate& form, Place place = {}) {
  const DType dtype = storage_dtype(gate, "gate");
  check_tensor(gate, "gate", dtype, {"rows", "columns"}, place);
  if (up) check_same(*up, "up", gate, dtype, place);
  check_gated_form(form, up.has_value());
  return {dtype, gate.size(0), gate.size(1), form};
}

// An activation whose own parameters are a tensor [count], of the arithmetic's dtype.
struct LearnedActShape : GatedActShape {
  int64_t count;
};

inline LearnedActShape check_learned_act(const Tensor& x, const Tensor& own, const std::string& activation,
                                         Place place = {}) {
  LearnedActShape s{check_gated_act(x, std::nullopt, Gate{}, place), 0};
  s.form.activation = kActivations.index(activation);
  const auto learns = [](const ActivationInfo& each) { return each.learned > 0; };
  STD_TORCH_CHECK(s.form.activation >= 0 && learns(kActivations.rows[s.form.activation]),
                  "activation: expected one of ", kActivations.names(learns), ", got '", activation, "'");
  s.count = kActivations.rows[s.form.activation].own.count();
  check_tensor(own, "own", arithmetic_dtype(s.dtype), {s.count}, place, nullptr);
  return s;
}

// ---- gated_linear ---------------------------------------------------------------------------------------------------

struct GatedLinearShape {
  DType dtype;
  int64_t T, D, F, G;
  Gate form;
};

inline GatedLinearShape check_gated_linear(const Tensor& x, const std::vector<Tensor>& w_gate,
                                           const std::vector<Tensor>& w_up, const std::vector<Tensor>& b_gate,
                                           const std::vector<Tensor>& b_up, const Gate& form, Place place = {}) {
  GatedLinearShape s;
  s.dtype = storage_dtype(x, "x");
  check_tensor(x, "x", s.dtype, {"T", "D"}, place);
  s.G = static_cast<int64_t>(w_gate.size());
  STD_TORCH_CHECK(s.G > 0, "w_gate: expected at least one weight, got none");
  STD_TORCH_CHECK(w_up.size() == w_gate.size(), "w_up: expected as many weights as w_gate has (", s.G, "), got ",
                  w_up.size());
  s.T = x.size(0);
  s.D = x.size(1);
  check_tensor(w_gate[0], "w_gate", s.dtype, {"F", s.D}, place);
  s.F = w_gate[0].size(0);
  for (size_t i = 0; i < w_gate.size(); ++i) {
    check_tensor(w_gate[i], "w_gate", s.dtype, {s.F, s.D}, place);
    check_tensor(w_up[i], "w_up", s.dtype, {s.F, s.D}, place);
  }
  const auto check_biases = [&](const std::vector<Tensor>& biases, const char* name) {
    STD_TORCH_CHECK(biases.empty() || static_cast<int64_t>(biases.size()) == s.G, name,
                    ": expected none or one for each weight (", s.G, "), got ", biases.size());
    for (const Tensor& bias : biases) check_tensor(bias, name, s.dtype, {s.F}, place);
  };
  check_biases(b_gate, "b_gate");
  check_biases(b_up, "b_up");
  s.form = form;
  return s;
}

inline void check_gated_linear_gradient(const GatedLinearShape& s, const Tensor& d_y, const Tensor& gate,
                                        const Tensor& up, const std::vector<bool>& needs, Place place = {}) {
  check_needs(needs, 5);
  check_tensor(d_y, "d_y", s.dtype, {s.T, s.F}, place);
  check_tensor(gate, "gate", s.dtype, {s.G, s.T, s.F}, place);
  check_tensor(up, "up", s.dtype, {s.G, s.T, s.F}, place);
  STD_TORCH_CHECK(gate.is_contiguous() && up.is_contiguous(), "gate, up: expected the tensors that gated_linear saved");
}

// ---- ffn ------------------------------------------------------------------------------------------------------------

struct FfnShape {
  DType dtype;
  int64_t T, D, F, O;  // tokens, model width, FFN width, output width
  bool gated, fused;   // fused: one weight [2F, D] holds gate and up rows
  bool interleaved;    // fused: gate and up rows alternate
  Gate form;

  int64_t hidden() const { return gated ? 2 * F : F; }  // width of d_hidden
};

inline FfnShape check_ffn(const Tensor& x, const Tensor& w_in, const MaybeTensor& w_up, const Tensor& w_down,
                          const MaybeTensor& b_in, const MaybeTensor& b_up, bool gated, bool interleaved,
                          const Gate& form, Place place = {}) {
  FfnShape s;
  s.dtype = storage_dtype(x, "x");
  check_tensor(x, "x", s.dtype, {"T", "D"}, place);
  s.T = x.size(0);
  s.D = x.size(1);
  s.gated = gated || w_up.has_value();
  s.fused = s.gated && !w_up;
  s.interleaved = interleaved;
  check_gated_form(form, s.gated);
  check_interleaved(interleaved, s.gated, s.fused);
  check_tensor(w_in, "w_in", s.dtype, {s.fused ? "2F" : "F", s.D}, place);
  STD_TORCH_CHECK(!s.fused || w_in.size(0) % 2 == 0, "w_in: expected an even number of rows, of gate and up, got ",
                  shape_text(w_in));
  s.F = s.fused ? w_in.size(0) / 2 : w_in.size(0);
  if (w_up) check_tensor(*w_up, "w_up", s.dtype, {s.F, s.D}, place);
  check_tensor(w_down, "w_down", s.dtype, {"D_out", s.F}, place);
  s.O = w_down.size(0);
  if (b_in) check_tensor(*b_in, "b_in", s.dtype, {w_in.size(0)}, place);
  STD_TORCH_CHECK(!b_up || w_up, "b_up: expected None where w_up is None (b_in holds both halves), got a tensor");
  if (b_up) check_tensor(*b_up, "b_up", s.dtype, {s.F}, place);
  s.form = form;
  return s;
}

// Whether the pre-activations [rows, F] were saved by `op`; an empty vector stands for "not saved".
inline bool check_saved(const std::string& op, const Tensor& gate, const Tensor& up, DType dtype, int64_t rows,
                        int64_t F, bool gated, Place place = {}) {
  if (gate.dim() == 1) return false;
  check_tensor(gate, "gate", dtype, {rows, F}, place);
  if (gated) check_tensor(up, "up", dtype, {rows, F}, place);
  STD_TORCH_CHECK(gate.is_contiguous() && up.is_contiguous(), "gate, up: expected the tensors that ", op, " saved");
  return true;
}

// ---- routed rows ----------------------------------------------------------------------------------------------------

// Of offsets [count + 1].
inline int64_t count_of(const Tensor& offsets, const char* name, Place place = {}) {
  check_indices_shape(offsets, name, {"R"}, place);
  STD_TORCH_CHECK(offsets.size(0) > 0, name, ": expected at least one element, got none");
  return offsets.size(0) - 1;
}

struct RoutesShape {
  int64_t T, E, R;
};

inline RoutesShape check_routes(const Tensor& token, const MaybeTensor& weight, DType dtype, const Tensor& offsets,
                                const Tensor& row, const Tensor& slot_offsets, Place place = {}) {
  check_indices_shape(token, "token", {"R"}, place);
  const RoutesShape s{count_of(slot_offsets, "slot_offsets", place), count_of(offsets, "offsets", place),
                      token.size(0)};
  check_indices_shape(row, "row", {s.R}, place);
  if (weight) check_tensor(*weight, "weight", arithmetic_dtype(dtype), {s.R}, place, nullptr);
  return s;
}

struct MoeShape {
  DType dtype;
  int64_t T, D, F, O, E, R;
  bool gated, interleaved, routed;  // not routed: x holds the rows themselves
  Gate form;

  int64_t hidden() const { return gated ? 2 * F : F; }
};

// Without offsets: one expert, which takes every row.
inline MoeShape check_moe(const Tensor& x, const MaybeTensor& token, const MaybeTensor& weight,
                          const MaybeTensor& offsets, const MaybeTensor& row, const MaybeTensor& slot_offsets,
                          const Tensor& w_in, const Tensor& w_down, const MaybeTensor& b_in, const MaybeTensor& b_down,
                          bool gated, bool interleaved, const Gate& form, Place place = {},
                          const MaybeTensor& w_up = {}) {
  MoeShape s;
  s.dtype = storage_dtype(x, "x");
  check_tensor(x, "x", s.dtype, {"T", "D"}, place);
  s.T = x.size(0);
  s.D = x.size(1);
  s.gated = gated;
  s.interleaved = interleaved;
  check_gated_form(form, gated);
  STD_TORCH_CHECK(gated || !w_up, "gated: expected True where w_up is given, got False");
  const bool one_weight = gated && !w_up;
  check_interleaved(interleaved, gated, one_weight);
  if (offsets) s.E = count_of(*offsets, "offsets", place);
  else s.E = 1;
  check_tensor(w_in, "w_in", s.dtype, {s.E, one_weight ? "2F" : "F", s.D}, place);
  STD_TORCH_CHECK(s.E > 0, "w_in: expected at least one expert, got ", shape_text(w_in));
  STD_TORCH_CHECK(!one_weight || w_in.size(1) % 2 == 0, "w_in: expected an even number of rows, of gate and up, got ",
                  shape_text(w_in));
  s.F = one_weight ? w_in.size(1) / 2 : w_in.size(1);
  if (w_up) check_tensor(*w_up, "w_up", s.dtype, {s.E, s.F, s.D}, place);
  check_tensor(w_down, "w_down", s.dtype, {s.E, "D_out", s.F}, place);
  s.O = w_down.size(1);
  if (b_in) check_tensor(*b_in, "b_in", s.dtype, {s.E, s.hidden()}, place);
  if (b_down) check_tensor(*b_down, "b_down", s.dtype, {s.E, s.O}, place);
  s.form = form;
  s.routed = token.has_value();
  STD_TORCH_CHECK(s.routed == weight.has_value() && s.routed == row.has_value() &&
                      s.routed == slot_offsets.has_value() && (offsets || !s.routed),
                  "routing: expected token, weight, row and slot_offsets together, or none of them");
  s.R = s.T;
  if (s.routed) {
    check_indices_shape(*slot_offsets, "slot_offsets", {s.T + 1}, place);
    s.R = check_routes(*token, weight, s.dtype, *offsets, *row, *slot_offsets, place).R;
  }
  return s;
}

// The gradient of a weight [E, N, K] is dense, and stored as [E, K, N] if the weight is, so that a transposed parameter
// gets a gradient without a copy.
inline bool is_transposed(const Tensor& w) { return w.stride(1) == 1 && w.stride(2) != 1; }

// Stored as [N, K, E], as PEFT stores b of an adapter; its gradient then is too.
inline bool is_expert_last(const Tensor& w) {
  const int64_t E = w.size(0), K = w.size(2);
  return E > 1 && w.stride(0) == 1 && w.stride(2) == E && w.stride(1) == K * E;
}

// Rows [2F] or [N, 2F] of gate and up alternating, as all gates and then all ups of each row; or the other way round.
inline Tensor gate_then_up(const Tensor& rows) {
  const int64_t F = rows.size(rows.dim() - 1) / 2, N = rows.dim() > 1 ? rows.size(0) : 1;
  return torch::stable::contiguous(torch::stable::transpose(torch::stable::reshape(rows, {N, F, 2}), 1, 2));
}
inline Tensor alternating(const Tensor& rows) {
  const int64_t F = rows.size(1) / 2;
  const Tensor pairs = torch::stable::transpose(torch::stable::reshape(rows, {rows.size(0), 2, F}), 1, 2);
  return torch::stable::reshape(torch::stable::contiguous(pairs), {rows.size(0), 2 * F});
}

// ---- routing --------------------------------------------------------------------------------------------------------

// Routing weights and scores are float32 or float64.
inline DType weight_dtype(const Tensor& t, const char* name) {
  const DType dtype = storage_dtype(t, name);
  STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64, name,
                  ": expected dtype float32 or float64, got ", kDTypeNames[static_cast<int>(dtype)]);
  return dtype;
}

// What decides on a choice of experts and its weights, as operators take it.
struct TopKOptions {
  int64_t shared = 0;
  std::string score;
  bool renormalize, by_logits;
  int64_t num_groups = 1, top_groups = 1, group_best = 2;
  double scale;
};

// Fills all but the pointers.
inline ChoiceOfExperts check_top_k(const Tensor& logits, int64_t k, const TopKOptions& o, Place place = {}) {
  ChoiceOfExperts job;
  check_tensor(logits, "logits", storage_dtype(logits, "logits"), {"T", "E"}, place);
  job.T = logits.size(0);
  job.E = logits.size(1);
  check_range("shared", o.shared, 0, job.E - 1);
  const int64_t experts = job.E - o.shared;
  check_range("k", k, 1, experts);
  job.K = k + o.shared;
  job.shared = o.shared;
  job.score = kScores.index(o.score);
  STD_TORCH_CHECK(job.score >= 0, "score: expected one of ", kScores.names(), ", got '", o.score, "'");
  job.of_row = kScores.rows[job.score].of_row;
  check_range("num_groups", o.num_groups, 1, experts);
  STD_TORCH_CHECK(experts % o.num_groups == 0, "num_groups: expected a divisor of the number of experts (", experts,
                  "), got ", o.num_groups);
  check_range("top_groups", o.top_groups, 1, o.num_groups);
  STD_TORCH_CHECK(k <= experts / o.num_groups * o.top_groups, "top_groups: expected groups that hold k = ", k,
                  " experts, got ", o.top_groups, " of ", o.num_groups);
  check_range("group_best", o.group_best, 1, 2);
  job.by_logits = o.by_logits;
  job.renormalize = o.renormalize && !(job.of_row && o.by_logits);
  job.num_groups = o.num_groups;
  job.top_groups = o.top_groups;
  job.group_best = o.group_best;
  job.scale = o.scale;
  return job;
}

// Experts that the caller has chosen; only the CPU looks at their values.
inline void check_given(const MaybeTensor& ids, const MaybeTensor& bias, const TopKOptions& o, int64_t T, int64_t k,
                        Place place = {}) {
  if (!ids) return;
  check_indices_shape(*ids, "ids", {T, k}, place);
  STD_TORCH_CHECK(!bias && o.num_groups == 1 && o.shared == 0, "ids: expected no bias, groups and shared experts");
}

// Entries [T, K], or with tokens [R]; gives the dtype of their weights.
inline DType check_sort(const Tensor& expert, const MaybeTensor& token, const Tensor& weight, int64_t num_experts,
                        int64_t num_tokens, Place place = {}) {
  const DType dtype = weight_dtype(weight, "weight");
  if (token) check_indices_shape(expert, "expert", {"R"}, place);
  else check_indices_shape(expert, "expert", {"T", "K"}, place);
  STD_TORCH_CHECK(num_experts >= 1, "num_experts: expected at least 1, got ", num_experts);
  STD_TORCH_CHECK(num_tokens >= 0 && (token || expert.size(0) == num_tokens), "num_tokens: expected ", expert.size(0),
                  " as expert has, got ", num_tokens);
  check_same(weight, "weight", expert, dtype, place, nullptr);
  if (token) check_indices_shape(*token, "token", {expert.size(0)}, place);
  return dtype;
}

struct RouteLinearShape {
  DType dtype, weight_dtype;
  int64_t T, D, E;

  DType arithmetic() const { return arithmetic_dtype(dtype); }
};

// weight and bias of x's dtype, or of its arithmetic's.
inline RouteLinearShape check_route_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                           Place place = {}) {
  RouteLinearShape s;
  s.dtype = storage_dtype(x, "x");
  check_tensor(x, "x", s.dtype, {"T", "D"}, place);
  s.T = x.size(0);
  s.D = x.size(1);
  s.weight_dtype = storage_dtype(weight, "weight");
  const bool known = s.weight_dtype == s.dtype || s.weight_dtype == s.arithmetic();
  STD_TORCH_CHECK(known, "weight: expected dtype ", kDTypeNames[static_cast<int>(s.dtype)],
                  s.dtype == s.arithmetic() ? "" : " or float32", ", got ", scalar_type_text(weight.scalar_type()));
  check_tensor(weight, "weight", s.weight_dtype, {"E", s.D}, place);
  s.E = weight.size(0);
  if (bias) check_tensor(*bias, "bias", s.weight_dtype, {s.E}, place, "weight");
  return s;
}

inline RouteLinearShape check_route_linear_gradient(const Tensor& d_logits, const Tensor& x, const Tensor& weight,
                                                    const std::vector<bool>& needs, Place place = {}) {
  const RouteLinearShape s = check_route_linear(x, weight, {}, place);
  check_needs(needs, 3);
  check_tensor(d_logits, "d_logits", s.arithmetic(), {s.T, s.E}, place, nullptr);
  return s;
}

struct ScoresShape {
  DType dtype;
  int64_t T, E;
};

inline ScoresShape check_scores(const Tensor& scores, Place place = {}) {
  const DType dtype = weight_dtype(scores, "scores");
  check_tensor(scores, "scores", dtype, {"T", "E"}, place);
  STD_TORCH_CHECK(scores.size(1) >= 1, "scores: expected at least one expert, got ", shape_text(scores));
  return {dtype, scores.size(0), scores.size(1)};
}

inline void check_mask(const Tensor& mask, int64_t T, Place place = {}) {
  STD_TORCH_CHECK(mask.scalar_type() == torch::headeronly::ScalarType::Bool, "mask: expected dtype bool, got ",
                  scalar_type_text(mask.scalar_type()));
  check_place(mask, "mask", place);
  check_extents(mask, "mask", {T});
}

}  // namespace ffn_ops
