// SPDX-License-Identifier: BSD-3-Clause
// Pure host functions that shape a grouped product: tiles, loaders, grid, shared memory, workspace. Everything follows
// from static shapes, strides and addresses, nothing from data; no torch, no CUDA.
#pragma once

#include "kernels.h"

namespace ffn_ops::cuda {

constexpr int kGemmThreads = 256;

// Whether this library has code for Hopper's own instructions.
#ifdef FFN_OPS_HOPPER
constexpr bool kHopperBuilt = true;
#else
constexpr bool kHopperBuilt = false;
#endif
// Rows of a finished tile stand this many elements apart from a multiple of 32 banks: pairs that a warp of accumulators
// writes, and quads that it reads, meet no bank twice.
constexpr int kTilePadding = 8;

// A block's part of the output, [rows, cols], what it reads of k at once, how many such stages its shared memory holds,
// and how many blocks a multiprocessor has room for.
struct GemmTile {
  int rows, cols, depth, stages, blocks;
};

// Tall tiles read less, short ones waste fewer rows, wide ones (Hopper) read least. The order of the sum over k, and
// thereby every bit of a row, is the same for all.
enum class GemmShape { kShort, kTall, kWide };

constexpr bool is_16_bit(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

// `hopper`: 16 bits multiplied by wgmma.
constexpr GemmTile gemm_tile(DType dtype, GemmShape shape, bool hopper) {
  const bool tall = shape != GemmShape::kShort;
  if (dtype == DType::kFloat64) return {tall ? 64 : 32, 64, 8, 4, 2};
  if (dtype == DType::kFloat32) return {tall ? 64 : 32, 128, 16, 4, 2};
  if (!hopper) return {tall ? 128 : 64, 128, 32, 4, 2};
  switch (shape) {
    case GemmShape::kShort:
      return {64, 128, 64, 4, 2};
    case GemmShape::kTall:
      return {128, 128, 64, 3, 2};
    default:
      return {128, 256, 64, 4, 1};
  }
}

// Columns of the output that one of Epilogue::row_dots sums: a quad of each lane of a warp or half of one, so that the
// order is the same for tiles of every shape.
constexpr int row_dots_cols(DType dtype) { return dtype == DType::kFloat64 ? 64 : 128; }
constexpr int64_t row_dots_parts(DType dtype, int64_t N) { return divide_up(N, row_dots_cols(dtype)); }

// One entry of the table that tells blocks their rows, in order: [row, row + rows) of `expert`. expert == E: no expert
// has them, they get zeros. No rows: nothing to do (kOuter: zeros).
struct RowTile {
  int64_t row, rows, expert;
};

// What a launch is made of. Blocks are numbered column tile by column tile within a group of row tiles, so that blocks
// that run at once share what they read.
struct GemmPlan {
  GemmShape shape = GemmShape::kShort;
  bool hopper = false;
  bool vector = false;     // 16-byte copies of both operands, else element by element
  bool b_along_k = false;  // kRows: how tiles of B lie in shared memory
  int64_t row_tiles = 0;   // at most: kRows of all experts, kOuter of one
  int64_t col_tiles = 0;
  int64_t blocks = 0;
  int64_t shared_bytes = 0;
  int64_t table_entries = 0;  // 0: no table, blocks count rows themselves
};

// Row tiles that R rows in E segments and one of dropped rows have at most: each segment has one that is not full.
constexpr int64_t max_row_tiles(int64_t R, int64_t E, int64_t tile_rows) {
  return R / tile_rows + (R < E + 1 ? R : E + 1);
}

namespace gemm_grid {

constexpr bool multiple_of_16(int64_t elements, DType dtype) { return elements * storage_size(dtype) % 16 == 0; }

// Whether 16-byte copies can fill a tile: each begins at a multiple of 16 bytes, and 32 bits count k. Ends may be
// ragged.
inline bool copies_fit(const Operand& o, DType dtype, bool along_k) {
  const auto small = [](int64_t value) { return -INT32_MAX <= value && value <= INT32_MAX; };
  if (!along_k && !(small(o.k_stride) && small(o.gather_limit))) return false;
  return reinterpret_cast<uintptr_t>(o.data) % 16 == 0 && (along_k ? o.k_stride : o.lane_stride) == 1 &&
         multiple_of_16(along_k ? o.lane_stride : o.k_stride, dtype) && multiple_of_16(o.expert_stride, dtype);
}

// With fewer rows per expert, a short tile saves more than it costs.
constexpr int64_t tall_rows(DType dtype, bool hopper) { return is_16_bit(dtype) && !hopper ? 256 : 128; }
// With fewer blocks, tall tiles would leave multiprocessors idle.
constexpr int64_t kTallBlocks = 256;
constexpr int64_t kWideK = 1024;

constexpr int64_t output_tiles(const GroupedGemm& g, GemmShape shape, bool hopper) {
  const GemmTile tile = gemm_tile(g.dtype, shape, hopper);
  const int64_t columns = divide_up(g.N, g.gated ? tile.cols / 2 : tile.cols);
  if (g.kind == GroupedGemm::Kind::kOuter) return g.E * divide_up(g.M, tile.rows) * columns;
  return (g.offsets ? max_row_tiles(g.R, g.E, tile.rows) : divide_up(g.R, tile.rows)) * columns;
}

}  // namespace gemm_grid

// Tiles of a Hopper GPU that are not short take 16-byte copies alone.
inline GemmShape gemm_shape(const GroupedGemm& g, bool hopper, bool vector) {
  const int64_t rows = g.kind == GroupedGemm::Kind::kOuter ? g.M : g.E > 0 ? g.R / g.E : 0;
  const auto fills = [&](GemmShape shape) {
    return gemm_grid::output_tiles(g, shape, hopper) >= gemm_grid::kTallBlocks;
  };
  if ((hopper && !vector) || rows < gemm_grid::tall_rows(g.dtype, hopper) || !fills(GemmShape::kTall))
    return GemmShape::kShort;
  // A wide tile is alone on its multiprocessor, which multiplies nothing during its epilogue. Long sums make up for
  // that, unless the gradient of an activation is to come, or the wide operand has its rows to look up.
  const bool outer = g.kind == GroupedGemm::Kind::kOuter;
  const bool long_sum = outer ? g.R / g.E >= 2 * gemm_grid::kWideK && !g.b.gather : g.K >= gemm_grid::kWideK;
  const bool wide = hopper && long_sum && g.epilogue.kind != Epilogue::Kind::kActivateGrad;
  return wide && fills(GemmShape::kWide) ? GemmShape::kWide : GemmShape::kTall;
}

// Bytes of shared memory: the stages of the pipeline, and after them the finished tile in the same place.
constexpr int64_t gemm_shared_bytes(DType dtype, GemmShape shape, bool hopper) {
  const GemmTile tile = gemm_tile(dtype, shape, hopper);
  const int64_t stages = tile.stages * int64_t{tile.rows + tile.cols} * tile.depth * storage_size(dtype);
  const int64_t finished = int64_t{tile.rows} * (tile.cols + kTilePadding) * storage_size(arithmetic_dtype(dtype));
  return stages > finished ? stages : finished;
}
// Smaller GPUs of the same compute capability major have no more for a block.
static_assert(gemm_shared_bytes(DType::kFloat64, GemmShape::kTall, false) <= 99 << 10 &&
              gemm_shared_bytes(DType::kFloat32, GemmShape::kTall, false) <= 99 << 10 &&
              gemm_shared_bytes(DType::kBFloat16, GemmShape::kTall, false) <= 99 << 10);
// A Hopper GPU has 228 KiB for all its blocks and their 1 KiB each.
static_assert(gemm_shared_bytes(DType::kBFloat16, GemmShape::kShort, true) <= 113 << 10 &&
              gemm_shared_bytes(DType::kBFloat16, GemmShape::kTall, true) <= 113 << 10 &&
              gemm_shared_bytes(DType::kBFloat16, GemmShape::kWide, true) <= 227 << 10);

// `hopper`: the GPU has wgmma. For tests, the shape can be given.
inline GemmPlan plan_gemm(const GroupedGemm& g, bool hopper, const GemmShape* shape = nullptr) {
  using gemm_grid::copies_fit;
  const bool outer = g.kind == GroupedGemm::Kind::kOuter;
  GemmPlan p;
  p.hopper = hopper && is_16_bit(g.dtype);
  const auto fits = [&](bool along_k) {
    return copies_fit(g.b, g.dtype, along_k) && (!g.gated || copies_fit(g.b_up, g.dtype, along_k));
  };
  p.vector =
      (!outer || g.R <= INT32_MAX) && copies_fit(g.a, g.dtype, !outer) && (fits(false) || (!outer && fits(true)));
  // Neighbouring threads read what is contiguous.
  p.b_along_k = !outer && (p.vector ? fits(true) : g.b.k_stride == 1 || g.b.lane_stride != 1);
  p.shape = shape ? *shape : gemm_shape(g, p.hopper, p.vector);
  const GemmTile tile = gemm_tile(g.dtype, p.shape, p.hopper);
  p.col_tiles = divide_up(g.N, g.gated ? tile.cols / 2 : tile.cols);
  if (outer) {
    p.row_tiles = divide_up(g.M, tile.rows);
    p.table_entries = g.offsets ? g.E : 0;
    p.blocks = g.E * p.row_tiles * p.col_tiles;
  } else {
    p.row_tiles = g.offsets ? max_row_tiles(g.R, g.E, tile.rows) : divide_up(g.R, tile.rows);
    p.table_entries = g.offsets ? p.row_tiles : 0;
    p.blocks = p.row_tiles * p.col_tiles;
  }
  p.shared_bytes = gemm_shared_bytes(g.dtype, p.shape, p.hopper);
  return p;
}

// What expert_tiles_kernel cuts segments into; 0: not at all.
constexpr int64_t table_tile_rows(const GroupedGemm& g, const GemmPlan& p) {
  return g.kind == GroupedGemm::Kind::kOuter ? 0 : gemm_tile(g.dtype, p.shape, p.hopper).rows;
}

// The table, and before it what expert_tiles_kernel works with: offsets as they are held, first tiles.
constexpr int64_t row_table_offset(int64_t E) { return (2 * E + 4) * int64_t{sizeof(int64_t)}; }
constexpr int64_t grouped_gemm_workspace_bytes(const GroupedGemm& g, const GemmPlan& p) {
  return p.table_entries ? row_table_offset(g.E) + p.table_entries * int64_t{sizeof(RowTile)} : 0;
}

// ---- quantised weights ----------------------------------------------------------------------------------------------

constexpr int kCodesAtOnce = 8;  // at most, of a thread; they have one scale

// Whether the kernels can read it.
constexpr bool has_even_blocks(const StackedCodes& w) {
  return w.first.block_cols >= w.K || w.first.block_cols % kCodesAtOnce == 0 || !w.first.scales;
}

inline CodedWeight coded_weight(const StackedCodes& w) {
  CodedWeight c{w};
  // One block for all elements counts as a power of two that no index reaches.
  const auto shift_of = [](int64_t block, int64_t elements) {
    if (block >= elements) return 63;
    int shift = 0;
    while (int64_t{1} << shift < block) ++shift;
    return int64_t{1} << shift == block ? shift : -1;
  };
  c.row_shift = shift_of(w.first.block_rows, w.N);
  c.col_shift = shift_of(w.first.block_cols, w.K);
  c.whole_words =
      reinterpret_cast<uintptr_t>(w.first.data) % 4 == 0 && w.first.row_bytes % 4 == 0 && w.data_bytes % 4 == 0;
  return c;
}

// Short tiles, multiplied as Ampere does it; `a` takes 16-byte copies.
inline GemmPlan plan_coded_gemm(const CodedGemm& g) {
  constexpr GemmShape kShape = GemmShape::kShort;
  GemmPlan p = plan_gemm(g, false, &kShape);
  p.vector = true;
  p.b_along_k = !g.transposed;
  return p;
}

constexpr int kDequantizeThreads = 256;
constexpr int64_t dequantize_blocks(const StackedCodes& w) {
  return divide_up(w.E * w.N * divide_up(w.K, kCodesAtOnce), kDequantizeThreads);
}

}  // namespace ffn_ops::cuda
