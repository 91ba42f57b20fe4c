// SPDX-License-Identifier: BSD-3-Clause
// Maps the blocks of a grouped product to tiles: the device makes a table of row tiles from offsets, and a block finds
// its tile by its number. This file reads no matrix.
#pragma once

#include "device.cuh"
#include "gemm_grid.h"

namespace ffn_ops::cuda {

constexpr int kTableThreads = 512;
constexpr int64_t kTableSharedBytes = kTableThreads / 32 * int64_t{sizeof(int64_t)};
// Ranking experts by their rows takes E² comparisons: beyond, they stay in order.
constexpr int64_t kMostRanked = 1024;

// combine(values of threads 0 .. this), and of all threads into `total`. Every thread of the block calls it.
template <class Combine>
FFN_FN int64_t block_scan(int64_t value, int64_t* warp_totals, Combine combine, int64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int by = 1; by < 32; by *= 2) {
    const int64_t before = __shfl_up_sync(0xffffffffu, value, by);
    if (lane >= by) value = combine(before, value);
  }
  __syncthreads();  // the totals of the previous call have been read
  if (lane == 31) warp_totals[warp] = value;
  __syncthreads();
  int64_t sum = warp_totals[0];
  for (int w = 1; w < kTableThreads / 32; ++w) {
    if (w == warp) value = combine(sum, value);
    sum = combine(sum, warp_totals[w]);
  }
  total = sum;
  return value;
}

// held[0 .. E]: offsets clamped to start at 0, stay in [0, R] and never fall, even for a wrong hand-made routing, so
// that every row has a tile.
FFN_FN void hold_offsets(const int64_t* offsets, int64_t E, int64_t R, int64_t* held, int64_t* warp_totals) {
  const auto larger = [](int64_t a, int64_t b) { return a < b ? b : a; };
  int64_t before = 0;
  for (int64_t first = 0; first <= E; first += kTableThreads) {
    const int64_t e = first + threadIdx.x;
    const int64_t offset = 0 < e && e <= E ? offsets[e] : 0;
    int64_t total;
    const int64_t most = block_scan(offset < 0 ? 0 : offset > R ? R : offset, warp_totals, larger, total);
    if (e <= E) held[e] = larger(before, most);
    before = larger(before, total);
  }
  __syncthreads();
}

// first[0 .. E + 1]: the first tile of each expert, then of the rows that no expert has, then the number of tiles.
FFN_FN void count_tiles(const int64_t* held, int64_t E, int64_t R, int64_t tile_rows, int64_t* first,
                        int64_t* warp_totals) {
  const auto add = [](int64_t a, int64_t b) { return a + b; };
  int64_t before = 0;
  if (threadIdx.x == 0) first[0] = 0;
  for (int64_t begin = 0; begin <= E; begin += kTableThreads) {
    const int64_t e = begin + threadIdx.x;
    const int64_t rows = e > E ? 0 : (e == E ? R : held[e + 1]) - held[e];
    int64_t total;
    const int64_t tiles = block_scan((rows + tile_rows - 1) / tile_rows, warp_totals, add, total);
    if (e <= E) first[e + 1] = before + tiles;
    before += total;
  }
  __syncthreads();
}

// One block. kRows: tiles of at most tile_rows rows, expert by expert. kOuter (tile_rows 0): one entry for each expert,
// those with most rows first, as their blocks take longest.
template <int kThreads = kTableThreads>
__global__ void FFN_KERNEL_BOUNDS(kThreads, 1)
    expert_tiles_kernel(const int64_t* offsets, int64_t E, int64_t R, int64_t tile_rows, int64_t entries,
                        int64_t* scratch, RowTile* table) {
  auto* warp_totals = reinterpret_cast<int64_t*>(dynamic_shared());
  int64_t* const held = scratch;
  int64_t* const first = scratch + E + 1;
  hold_offsets(offsets, E, R, held, warp_totals);
  if (tile_rows == 0) {
    for (int64_t e = threadIdx.x; e < E; e += kTableThreads) {
      const int64_t rows = held[e + 1] - held[e];
      int64_t rank = E <= kMostRanked ? 0 : e;
      for (int64_t other = 0; E <= kMostRanked && other < E; ++other) {
        const int64_t more = held[other + 1] - held[other] - rows;
        rank += more > 0 || (more == 0 && other < e);
      }
      table[rank] = {held[e], rows, e};
    }
    return;
  }
  count_tiles(held, E, R, tile_rows, first, warp_totals);
  for (int64_t tile = threadIdx.x; tile < entries; tile += kTableThreads) {
    if (tile >= first[E + 1]) {
      table[tile] = {0, 0, E};
      continue;
    }
    int64_t e = 0, end = E + 1;  // first[e] <= tile < first[end]
    while (end - e > 1) {
      const int64_t middle = e + (end - e) / 2;
      if (first[middle] <= tile) e = middle;
      else end = middle;
    }
    const int64_t row = held[e] + (tile - first[e]) * tile_rows;
    const int64_t left = (e == E ? R : held[e + 1]) - row;
    table[tile] = {row, left < tile_rows ? left : tile_rows, e};
  }
}

// A block's part of the output: rows of one expert (kOuter: all of them) and the first row (kOuter) and column.
struct TileCoord {
  RowTile rows;
  int64_t m, n;
};

// Row tiles whose column tiles are numbered together: their blocks run at once and share reads of both operands.
constexpr unsigned kGroupTiles = 8;

FFN_FN TileCoord find_tile(const GroupedGemm& job, const GemmPlan& plan, const RowTile* table, int64_t tile_rows,
                           int64_t tile_cols) {
  const bool outer = job.kind == GroupedGemm::Kind::kOuter;
  const auto row_tiles = static_cast<unsigned>(plan.row_tiles), col_tiles = static_cast<unsigned>(plan.col_tiles);
  const unsigned expert = outer ? blockIdx.x / (row_tiles * col_tiles) : 0;
  const unsigned block = blockIdx.x - expert * row_tiles * col_tiles;
  const unsigned group = block / (kGroupTiles * col_tiles);
  const unsigned in_group = block - group * kGroupTiles * col_tiles;
  const unsigned left = row_tiles - group * kGroupTiles;
  const unsigned height = left < kGroupTiles ? left : kGroupTiles;
  const int64_t row_tile = group * kGroupTiles + in_group % height;
  TileCoord coord{{0, job.R, 0}, row_tile * tile_rows, in_group / height * tile_cols};
  if (table) {
    coord.rows = table[outer ? expert : row_tile];
  } else if (!outer) {
    coord.rows = {coord.m, job.R - coord.m < tile_rows ? job.R - coord.m : tile_rows, 0};
  }
  return coord;
}

}  // namespace ffn_ops::cuda
