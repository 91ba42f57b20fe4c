// SPDX-License-Identifier: BSD-3-Clause
// The parts that descriptions of work have in common on every device; cpu/kernels.h and cuda/kernels.h have the rest.
// No torch, no vectors, no CUDA.
#pragma once

#include <cstdint>

namespace ffn_ops {

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Element (r, c) is data[r * row_stride + c * col_stride].
struct StridedMatrix {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t col_stride = 1;
};

enum class EpilogueKind {
  kStore,         // out = acc + bias
  kActivate,      // out = sum over branches of act(gate) * up, or act(gate); saves gate and up where asked
  kActivateGrad,  // acc = dH: out = act'(gate) * up * dH, out_up = act(gate) * dH and h = act(gate) * up
};

// Tokens and their routed rows.
struct RowsOfTokens {
  int64_t tokens = 0;                     // T
  const int64_t* token = nullptr;         // [R]: of each row
  const int64_t* row = nullptr;           // [R]: the rows of token t: row[slot_offsets[t]] ..
  const int64_t* slot_offsets = nullptr;  // [T + 1]
};

// Scores of E experts for each token, the best K of them, and their weights.
struct ChoiceOfExperts {
  int64_t T = 0, E = 0, K = 0;     // K weights of a token: of chosen experts, then of the shared ones
  int64_t shared = 0;              // the last experts, this many, go to every token
  const void* bias = nullptr;      // [E - shared], of the arithmetic's dtype: added for the choice, not for the weight
  const int64_t* given = nullptr;  // [T, K], the experts, or null: they are chosen
  int score = 0;                   // its place in the list of scores.h
  bool of_row = true;              // the score's
  bool renormalize = false, by_logits = false;             // by_logits: they choose; of_row: scores of the chosen
  int64_t num_groups = 1, top_groups = 1, group_best = 2;  // a group's score: the sum of this many of its best
  double scale = 1.0;
  int64_t* ids = nullptr;    // [T, K]; read by backward
  void* weights = nullptr;   // [T, K], of the arithmetic's dtype; d_weights in backward
  void* d_logits = nullptr;  // [T, E]
};

}  // namespace ffn_ops
