// SPDX-License-Identifier: BSD-3-Clause
// What launches and kernels agree on: plain descriptions of one piece of work, as those of cpu/kernels.h for the CPU.
// What depends on data stays on the device: the rows of an expert are read from offsets, never known to the host. No
// torch, no CUDA.
#pragma once

#include <cstdint>

#include "../common/descriptors.h"
#include "../common/dtypes.h"
#include "../common/formats.h"
#include "../common/gate.h"

namespace ffn_ops::cuda {

using Matrix = StridedMatrix;

// Element-wise passes over [rows, cols]. What is null is not there.
struct GatedAct : Gate {
  int64_t rows = 0, cols = 0;
  DType dtype = DType::kFloat32;
  const int64_t* kept = nullptr;     // rows from *kept on are not read, and zero in every output; null: all are there
  Matrix gate, up, d_out;            // up.data null: plain
  Matrix dd_gate, dd_up;             // double backward: cotangents of d_gate and d_up; null: zero
  const void* row_weight = nullptr;  // [rows], of the arithmetic's dtype: backward, a factor of h alone; null: 1
  // forward: out alone. backward: d_gate, d_up, h = act(gate) * up.
  // double backward: d_d_out, d_gate, d_up. Columns are dense.
  void* out[3] = {};
  int64_t out_stride[3] = {};  // between rows of each
  // Branches of a gated linear layer add up in `sum` [rows, cols], of the arithmetic's dtype: read where `accumulate`,
  // written where given. out, where given, is the rounded sum.
  void* sum = nullptr;
  bool accumulate = false;
  const void* own_values = nullptr;  // own parameters in device memory, of the arithmetic's dtype; null: those of Gate
};

// Sums over all elements of d_out (times dd_gate, where given) times each of own_factors of the value (or slope).
struct OwnSums : GatedAct {
  void* partial = nullptr;  // [blocks, own parameters], of the arithmetic's dtype: those that are not learned get 0
};

// out[e, c] = sum over the rows r of segment e, offsets[e] <= r < offsets[e + 1] (offsets null: one segment of all
// rows), of weight[r] * matrix(gather ? gather[r] : r, c).
struct ColumnSum {
  int64_t rows = 0, cols = 0, experts = 1;
  DType dtype = DType::kFloat32;
  Matrix matrix;
  const int64_t* gather = nullptr;  // token of each row; one outside [0, gather_limit) adds nothing
  int64_t gather_limit = 0;
  const int64_t* offsets = nullptr;  // [experts + 1], in [0, rows], never falling (else any rows within)
  const void* weight = nullptr;      // [rows], of the arithmetic's dtype; null: 1
  void* partial = nullptr;           // workspace of column_sum_bytes()
  void* out = nullptr;               // [experts, cols]
};

// Rows from *kept on are neither read nor computed.
struct Routes : RowsOfTokens {
  int64_t rows = 0;               // R
  const int64_t* kept = nullptr;  // &offsets[E]
};

// dispatch: out[r] = weight[r] * in[token[r]], zero from *kept on. combine: out[t] = sum of weight[r] * in[r] over the
// rows of t in their order, by fma from zero.
struct MoveRows {
  Routes routes;
  int64_t cols = 0;
  DType dtype = DType::kFloat32;
  Matrix in;
  const void* weight = nullptr;  // [R], of the arithmetic's dtype; null: 1
  void* out = nullptr;
  int64_t out_stride = 0;
};

// out[r] = sum over c of a(token[r], c) * b(r, c) (offsets given: b(expert of r, c)), plus the sum of the `parts` of
// row r, all in one order; zero from *kept on.
struct RowDots {
  Routes routes;
  int64_t cols = 0;
  Matrix a, b;  // a.data null: only the parts
  DType dtype = DType::kFloat32;
  const int64_t* offsets = nullptr;  // [experts + 1]
  int64_t experts = 0;
  const void* parts = nullptr;  // [R, num_parts], like out of the arithmetic's dtype
  int64_t num_parts = 0;
  void* out = nullptr;  // [R]
};

// Logits of float32 or float64.
struct TopK : ChoiceOfExperts {
  Matrix logits;
  DType dtype = DType::kFloat32;
  void* scratch = nullptr;  // global workspace of top_k_scratch_bytes(), null where none is needed
};

// The stable counting sort of R entries (pairs of token and expert) by expert, with capacity; see moe_sort on the CPU.
// sort_plan() says what to launch.
struct Sort {
  int64_t R = 0, E = 0, T = 0, K = 0;  // without `token`, entry i belongs to token i / K
  const int64_t* expert = nullptr;     // [R], outside [0, E): skipped
  const int64_t* token = nullptr;      // [R] or null, outside [0, T): skipped
  const void* weight = nullptr;        // [R]
  DType weight_dtype = DType::kFloat32;
  int64_t capacity = -1;  // < 0: none
  bool by_weight = false;
  void* out_weight = nullptr;           // [R]
  int64_t* out_token = nullptr;         // [R]
  int64_t* out_offsets = nullptr;       // [E + 1]
  int64_t* out_row = nullptr;           // [R]
  int64_t* out_slot_offsets = nullptr;  // [T + 1]
  int64_t* out_counts = nullptr;        // [E]
  int64_t* out_place = nullptr;         // [R] with `token`
  void* scratch = nullptr;
};

// Each expert's tokens, their number rounded to a multiple of `tile`; see round_tokens on the CPU. round_plan() says
// what to launch.
struct RoundTokens {
  int64_t T = 0, E = 0, K = 0, tile = 1;
  const void* scores = nullptr;  // [T, E]
  DType dtype = DType::kFloat32;
  const int64_t* ids = nullptr;   // [T, K], outside [0, E): skipped
  int64_t* out_expert = nullptr;  // [rounded_rows()]
  int64_t* out_token = nullptr;
  void* scratch = nullptr;
};

constexpr int64_t rounded_rows(const RoundTokens& r) { return r.T * r.K + r.E * (r.tile / 2 < r.T ? r.tile / 2 : r.T); }

// ---- products over experts ------------------------------------------------------------------------------------------

// One operand of a product, element (lane, k) of expert e: data[e * expert_stride + lane * lane_stride + k * k_stride].
// Where the lanes (kRows: of A) or k (kOuter: of A and B) run over routed rows r, `gather` replaces r by gather[r].
struct Operand {
  const void* data = nullptr;
  int64_t lane_stride = 0, k_stride = 1, expert_stride = 0;
  const int64_t* gather = nullptr;  // in [0, gather_limit), else the row counts as zeros
  int64_t gather_limit = 0;
};

struct Epilogue : Gate {
  using Kind = EpilogueKind;
  Kind kind = Kind::kStore;
  void* out = nullptr;  // kRows: [R, N]; kOuter: [E, M, N]
  void* out_up = nullptr;
  int64_t out_stride = 0;
  void* h = nullptr;     // kActivateGrad: strides of the pre-activations; times row_weight where given and weigh_h
  void* gate = nullptr;  // [R, N], written by kActivate, read by kActivateGrad
  void* up = nullptr;
  int64_t pre_stride = 0;
  double scale = 1;  // kStore: a factor of the product
  // [R, added_stride], of the arithmetic's dtype: joins the product (of gate) or of up before all else
  const void* added = nullptr;
  const void* added_up = nullptr;
  int64_t added_stride = 0;
  bool unrounded = false;      // kStore: out is of the arithmetic's dtype, and may be `added`
  const void* bias = nullptr;  // of the output or of gate: [E, bias_stride]
  const void* bias_up = nullptr;
  int64_t bias_stride = 0;           // between experts
  const void* row_weight = nullptr;  // [R], of the arithmetic's dtype: kActivateGrad
  bool weigh_h = true;               // h as well
  // [R, row_dots_stride], part p = sum over the p-th row_dots_cols() columns of dA' * act(gate) * up
  void* row_dots = nullptr;
  int64_t row_dots_stride = 0;
  bool interleaved = false;  // kActivateGrad, gated: d_gate and d_up alternate along rows of out, there is no out_up
};

// kRows: for each expert e and each of its rows r, out[r, n] = sum over k of A(r, k) * B_e(n, k).
// kOuter: for each expert e, out[e, m, n] = sum over its rows r, in order, of A(m, r) * B(n, r); zeros where it has
// none.
struct GroupedGemm {
  enum class Kind { kRows, kOuter };
  Kind kind = Kind::kRows;
  int64_t E = 1, R = 0;  // R: rows there may be at most
  const int64_t* offsets =
      nullptr;  // [E + 1], from 0 on in [0, R], never falling (else held there); null: E = 1, all R rows
  int64_t M = 0, N = 0, K = 0;  // kRows: M unused; kOuter: K unused
  bool gated = false;           // kRows, kActivate: b_up holds the weights of up
  DType dtype = DType::kFloat32;
  Operand a, b, b_up;
  Epilogue epilogue;
};

// ---- quantised weights ----------------------------------------------------------------------------------------------

// As kernels read it. Blocks of 2^shift rows or columns; shift < 0: of another number.
struct CodedWeight : StackedCodes {
  int row_shift = -1, col_shift = -1;
  bool whole_words = false;  // the codes of eight elements begin at a multiple of 4 bytes
};

// kRows, of a weight in codes instead of b and b_up. Its rows are lanes, and its columns k, or the other way round.
struct CodedGemm : GroupedGemm {
  CodedWeight weights[2];  // one below the other
  int64_t split = 0;       // rows of the first
  bool transposed = false;
  int64_t first = 0;               // row or column that is lane 0
  int64_t step = 1, up_first = 0;  // gated: gate of lane n is row n * step, up is row up_first + n * step
};

// out [E, N, K] = the weight's values.
struct Dequantize {
  CodedWeight w;
  DType dtype = DType::kFloat32;
  void* out = nullptr;
};

}  // namespace ffn_ops::cuda
