// SPDX-License-Identifier: BSD-3-Clause
// Cuts element-wise work, sums and routing into blocks, and sizes their memory: pure functions of shapes and strides,
// tested without a GPU. No torch, no CUDA.
#pragma once

#include "kernels.h"

namespace ffn_ops::cuda {

constexpr int kWarpSize = 32;

inline bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---- rows of packs --------------------------------------------------------------------------------------------------

// A pack is what a thread handles at once: the columns that 16 bytes hold, or one. A block of 256 threads covers a
// rectangle of packs, 2^shift of them along a row, and each thread as many rectangles as it has steps, one after the
// other along columns or rows.
struct PackGrid {
  int64_t blocks = 0;
  int32_t shift = 0;
  bool along_cols = false;
  bool plain = false;       // gated_act_kernel: none of the options
  uint32_t col_blocks = 1;  // of one row
  uint32_t vector = 0;      // what is accessed 16 bytes at a time
};

constexpr int kPackThreads = 256;
constexpr int kVectorSteps = 2;  // of a thread, where packs are of 16 bytes: at least 4 such loads are on their way
constexpr int kScalarSteps = 4;  // where they are single columns

constexpr int32_t ceil_log2(int64_t value, int32_t most) {
  int32_t bits = 0;
  while (bits < most && (int64_t{1} << bits) < value) ++bits;
  return bits;
}

// `most`: the largest shift.
constexpr PackGrid pack_grid(int64_t rows, int64_t cols, int64_t pack, int64_t steps, int32_t most = 8) {
  PackGrid g;
  const int64_t packs = divide_up(cols, pack);
  g.shift = ceil_log2(packs, most);
  const int64_t width = int64_t{1} << g.shift, height = kPackThreads / width;
  g.along_cols = packs > width;
  const int64_t col_blocks = divide_up(packs, width * (g.along_cols ? steps : 1));
  const int64_t row_blocks = divide_up(rows, height * (g.along_cols ? 1 : steps));
  g.col_blocks = static_cast<uint32_t>(col_blocks);
  g.blocks = col_blocks * row_blocks;
  return g;
}

// Whether packs of a matrix of `size`-byte elements start at multiples of 16 bytes and lie densely.
inline bool packs_are_aligned(const Matrix& m, int64_t rows, int64_t size) {
  return m.col_stride == 1 && aligned_16(m.data) && (rows <= 1 || m.row_stride * size % 16 == 0);
}

// What gated_act_kernel reads.
enum GatedActInput : int { kGate, kUp, kDOut, kDdGate, kDdUp, kGatedActInputs };

constexpr Matrix gated_act_input(const GatedAct& g, int input) {
  switch (input) {
    case kGate:
      return g.gate;
    case kUp:
      return g.up;
    case kDOut:
      return g.d_out;
    case kDdGate:
      return g.dd_gate;
    default:
      return g.dd_up;
  }
}

// One long row, where every operand's rows follow each other without a gap.
inline void flatten(GatedAct& g) {
  if (g.kept || g.row_weight) return;
  for (int i = 0; i < kGatedActInputs; ++i) {
    const Matrix m = gated_act_input(g, i);
    if (m.data && (m.col_stride != 1 || m.row_stride != g.cols)) return;
  }
  for (int i = 0; i < 3; ++i)
    if (g.out[i] && g.out_stride[i] != g.cols) return;
  g.cols *= g.rows;
  g.rows = 1;
}

// Vector access where every operand allows it. Else a thread takes single columns; where some operand is contiguous
// along rows, blocks are squares of 16, so that it and the outputs are accessed by whole sectors.
inline PackGrid gated_act_grid(const GatedAct& g) {
  const int64_t size = storage_size(g.dtype), wide = storage_size(arithmetic_dtype(g.dtype));
  bool vector = !g.sum || packs_are_aligned({g.sum, g.cols, 1}, g.rows, wide), by_rows = false;
  for (int i = 0; i < kGatedActInputs; ++i) {
    const Matrix m = gated_act_input(g, i);
    vector = vector && (!m.data || packs_are_aligned(m, g.rows, size));
    by_rows = by_rows || (m.data && m.row_stride == 1 && m.col_stride > 1 && g.rows > 1);
  }
  for (int i = 0; i < 3; ++i)
    vector = vector && (!g.out[i] || packs_are_aligned({g.out[i], g.out_stride[i], 1}, g.rows, size));
  PackGrid grid = vector ? pack_grid(g.rows, g.cols, 16 / size, kVectorSteps)
                         : pack_grid(g.rows, g.cols, 1, kScalarSteps, by_rows ? 4 : 8);
  grid.vector = vector;
  grid.plain = !g.kept && !g.row_weight && !g.sum && !g.own_values;
  return grid;
}

// Each thread of own_sums_kernel adds at least kOwnSumRun elements, and no more blocks run than fill a GPU.
constexpr int64_t kOwnSumRun = 16, kOwnSumBlocks = 1024;
constexpr int64_t own_sums_blocks(const GatedAct& g) {
  const int64_t blocks = divide_up(g.rows * g.cols, kOwnSumRun * kPackThreads);
  return blocks < kOwnSumBlocks ? blocks : kOwnSumBlocks;
}

// Bit 0: in, bit 1: out.
inline PackGrid move_rows_grid(const MoveRows& m, int64_t out_rows) {
  const int64_t size = storage_size(m.dtype);
  PackGrid grid = pack_grid(out_rows, m.cols, 16 / size, kVectorSteps);
  grid.vector =
      uint32_t{packs_are_aligned(m.in, 2, size)} | uint32_t{packs_are_aligned({m.out, m.out_stride, 1}, 2, size)} << 1;
  return grid;
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// Segments are cut into parts of kPartRows rows each, counted from the segment's first row. Part p of segment e, which
// begins at row b, is held in slot b / kPartRows + e + p: no two meet, and slots need no table.
constexpr int64_t kPartRows = 128;
constexpr int kSumHeight = 8;  // rows that a block reads at a time: one for each warp

constexpr int64_t column_sum_slots(const ColumnSum& s) { return s.rows / kPartRows + s.experts; }
constexpr int64_t column_sum_bytes(const ColumnSum& s) {
  return column_sum_slots(s) * s.cols * storage_size(arithmetic_dtype(s.dtype));
}

struct ColumnSumGrid {
  int64_t blocks = 0, final_blocks = 0;
  uint32_t col_blocks = 1;
  int64_t shared_bytes = 0;
  bool vector = false;
};

inline ColumnSumGrid column_sum_grid(const ColumnSum& s) {
  ColumnSumGrid g;
  const int64_t size = storage_size(s.dtype), width = kWarpSize * 16 / size;
  const int64_t col_blocks = divide_up(s.cols, width);
  g.col_blocks = static_cast<uint32_t>(col_blocks);
  g.blocks = column_sum_slots(s) * col_blocks;
  g.final_blocks = divide_up(s.experts * s.cols, kPackThreads);
  g.shared_bytes = kSumHeight * width * storage_size(arithmetic_dtype(s.dtype));
  g.vector = packs_are_aligned(s.matrix, 2, size);
  return g;
}

// One warp for each row.
constexpr int64_t row_dots_blocks(const RowDots& d) { return divide_up(d.routes.rows, kPackThreads / kWarpSize); }
// Bit 0: a, bit 1: b.
inline uint32_t row_dots_vector(const RowDots& d) {
  const int64_t size = storage_size(d.dtype);
  return uint32_t{packs_are_aligned(d.a, 2, size)} | uint32_t{packs_are_aligned(d.b, 2, size)} << 1;
}

// ---- top k ----------------------------------------------------------------------------------------------------------

// One warp for each token, which keeps E scores and the scores of the groups: in shared memory, or where not even one
// token's fit, in `scratch`.
struct TopKGrid {
  int64_t blocks = 0;
  int threads = kWarpSize;
  int64_t shared_bytes = 0;   // of a block; 0: in scratch
  int64_t scratch_bytes = 0;  // all tokens
};

constexpr int64_t kSharedBytes = 48 << 10;  // what a block has without asking for more

constexpr int64_t top_k_values(const TopK& k) { return divide_up(k.E + k.num_groups, 4) * 4; }  // of one token

constexpr TopKGrid top_k_grid(const TopK& k) {
  TopKGrid g;
  const int64_t bytes = top_k_values(k) * storage_size(arithmetic_dtype(k.dtype));
  int64_t warps = 4;
  while (warps > 1 && warps * bytes > kSharedBytes) warps /= 2;
  if (warps * bytes <= kSharedBytes) g.shared_bytes = warps * bytes;
  else g.scratch_bytes = k.T * bytes, warps = 4;
  g.threads = static_cast<int>(warps * kWarpSize);
  g.blocks = divide_up(k.T, warps);
  return g;
}

}  // namespace ffn_ops::cuda
