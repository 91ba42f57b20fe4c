// Pure host functions that shape a grouped product: tiles, loaders, grid, shared memory, workspace. Everything follows
// from static shapes, strides and addresses, nothing from data; no torch, no CUDA.
#pragma once

#include "kernels.h"

namespace ffn_ops::cuda {

constexpr int kGemmThreads = 256;
constexpr int kGemmStages = 4;
// Rows of a finished tile stand this many elements apart from a multiple of 32 banks: pairs that a warp of accumulators
// writes, and quads that it reads, meet no bank twice.
constexpr int kTilePadding = 8;

// A block's part of the output, [rows, cols], and what it reads of k at once: 64 bytes where k is contiguous.
struct GemmTile {
  int rows, cols, depth;
};

// Tall tiles read less, short ones waste fewer rows. The order of the sum over k and the columns of a tile, and thereby
// every bit of a row, are the same for both.
constexpr GemmTile gemm_tile(DType dtype, bool tall) {
  switch (dtype) {
    case DType::kFloat64:
      return {tall ? 64 : 32, 64, 8};
    case DType::kFloat32:
      return {tall ? 64 : 32, 128, 16};
    default:
      return {tall ? 128 : 64, 128, 32};
  }
}

// Columns of Epilogue::row_dots.
constexpr int64_t row_dots_parts(DType dtype, int64_t N) { return divide_up(N, gemm_tile(dtype, false).cols); }

// One entry of the table that tells blocks their rows, in order: [row, row + rows) of `expert`. expert == E: no expert
// has them, they get zeros. No rows: nothing to do (kOuter: zeros).
struct RowTile {
  int64_t row, rows, expert;
};

// What a launch is made of. Blocks are numbered column tile by column tile within a group of row tiles, so that blocks
// that run at once share what they read.
struct GemmPlan {
  bool tall = false;
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

// Whether 16-byte copies can fill a tile: each begins at a multiple of 16 bytes. Ends may be ragged.
inline bool copies_fit(const Operand& o, DType dtype, bool along_k) {
  return reinterpret_cast<uintptr_t>(o.data) % 16 == 0 && (along_k ? o.k_stride : o.lane_stride) == 1 &&
         multiple_of_16(along_k ? o.lane_stride : o.k_stride, dtype) && multiple_of_16(o.expert_stride, dtype);
}

// With fewer rows per expert, a short tile wastes less than it costs.
constexpr int64_t tall_rows(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? 256 : 128; }
// With fewer blocks, tall tiles would leave multiprocessors idle.
constexpr int64_t kTallBlocks = 256;

constexpr int64_t output_tiles(const GroupedGemm& g, bool tall) {
  const GemmTile tile = gemm_tile(g.dtype, tall);
  const int64_t columns = divide_up(g.N, g.gated ? tile.cols / 2 : tile.cols);
  if (g.kind == GroupedGemm::Kind::kOuter) return g.E * divide_up(g.M, tile.rows) * columns;
  return (g.offsets ? max_row_tiles(g.R, g.E, tile.rows) : divide_up(g.R, tile.rows)) * columns;
}

}  // namespace gemm_grid

inline bool takes_tall_tiles(const GroupedGemm& g) {
  const int64_t rows = g.kind == GroupedGemm::Kind::kOuter ? g.M : g.E > 0 ? g.R / g.E : 0;
  return rows >= gemm_grid::tall_rows(g.dtype) && gemm_grid::output_tiles(g, true) >= gemm_grid::kTallBlocks;
}

// Bytes of shared memory: the stages of the pipeline, and after them the finished tile in the same place.
constexpr int64_t gemm_shared_bytes(DType dtype, bool tall) {
  const GemmTile tile = gemm_tile(dtype, tall);
  const int64_t stages = kGemmStages * int64_t{tile.rows + tile.cols} * 64;
  const int64_t finished = int64_t{tile.rows} * (tile.cols + kTilePadding) * storage_size(arithmetic_dtype(dtype));
  return stages > finished ? stages : finished;
}
// Smaller GPUs of the same compute capability major have no more for a block.
static_assert(gemm_shared_bytes(DType::kFloat64, true) <= 99 << 10 &&
              gemm_shared_bytes(DType::kFloat32, true) <= 99 << 10 &&
              gemm_shared_bytes(DType::kBFloat16, true) <= 99 << 10);

// For tests, `tall` can be given.
inline GemmPlan plan_gemm(const GroupedGemm& g, bool tall) {
  using gemm_grid::copies_fit;
  const GemmTile tile = gemm_tile(g.dtype, tall);
  const bool outer = g.kind == GroupedGemm::Kind::kOuter;
  GemmPlan p;
  p.tall = tall;
  const auto fits = [&](bool along_k) {
    return copies_fit(g.b, g.dtype, along_k) && (!g.gated || copies_fit(g.b_up, g.dtype, along_k));
  };
  p.vector = copies_fit(g.a, g.dtype, !outer) && (fits(false) || (!outer && fits(true)));
  // Neighbouring threads read what is contiguous.
  p.b_along_k = !outer && (p.vector ? fits(true) : g.b.k_stride == 1 || g.b.lane_stride != 1);
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
  p.shared_bytes = gemm_shared_bytes(g.dtype, tall);
  return p;
}

inline GemmPlan plan_gemm(const GroupedGemm& g) { return plan_gemm(g, takes_tall_tiles(g)); }

// What expert_tiles_kernel cuts segments into; 0: not at all.
constexpr int64_t table_tile_rows(const GroupedGemm& g, const GemmPlan& p) {
  return g.kind == GroupedGemm::Kind::kOuter ? 0 : gemm_tile(g.dtype, p.tall).rows;
}

// The table, and before it what expert_tiles_kernel works with: offsets as they are held, first tiles.
constexpr int64_t row_table_offset(int64_t E) { return (2 * E + 4) * int64_t{sizeof(int64_t)}; }
inline int64_t grouped_gemm_workspace_bytes(const GroupedGemm& g) {
  const GemmPlan p = plan_gemm(g);
  return p.table_entries ? row_table_offset(g.E) + p.table_entries * int64_t{sizeof(RowTile)} : 0;
}

}  // namespace ffn_ops::cuda
