// SPDX-License-Identifier: BSD-3-Clause
// Loads tiles of operands from global into shared memory: gathered, ragged, with any stride, by asynchronous 16-byte
// copies or element by element into the same places.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "gemm_grid.h"

namespace ffn_ops::cuda {

// A tile in shared memory is rows of 16-byte chunks: a row is a lane and runs along k, or is a k and runs along lanes.
// Chunks change places within a row, so that eight rows' chunks of one column, as ldmatrix reads them, meet all banks.
template <class S, int kLanes, int kDepth, bool kAlongK>
struct SharedTile {
  static constexpr int kWide = 16 / int(sizeof(S));  // elements of a chunk
  static constexpr int kRows = kAlongK ? kLanes : kDepth;
  static constexpr int kRowChunks = (kAlongK ? kDepth : kLanes) / kWide;
  static constexpr int kBytes = kRows * kRowChunks * 16;
  static_assert(kRowChunks == 4 || kRowChunks % 8 == 0);

  static constexpr FFN_FN int swizzle(int row) { return kRowChunks == 4 ? row / 2 % 4 : row % 8; }
  static constexpr FFN_FN int offset(int row, int chunk) { return (row * kRowChunks + (chunk ^ swizzle(row))) * 16; }
};

// The part of an operand that a block reads. Lanes from `split` on are those of a second matrix (up), which begins
// anew at `first`.
struct OperandPart {
  Operand operand, second;
  int split;
  int64_t expert;
  int64_t first, end;  // lanes
  int64_t k_begin, k_end;
  bool gather_k;  // the operand's gather replaces k, else lanes
};

// Fills tiles in the order of their class, SharedTile or another of its interface. A thread fills the same chunks of
// every stage: along k those of several lanes, else those of several k of the same lanes. What is the same for all
// stages is computed before the first.
template <class Tile, class S, int kDepth, bool kAlongK, bool kVector>
class TileLoader {
 public:
  FFN_FN explicit TileLoader(const OperandPart& part) {
    const int64_t* gather = part.operand.gather;
    limit_ = part.operand.gather_limit;
    next_ = !kAlongK && part.gather_k && gather ? gather + part.k_begin + first_k(0) : nullptr;
#pragma unroll
    for (int i = 0; i < kOwnLanes; ++i) {
      const int lane = kAlongK ? row(i) : chunk() * Tile::kWide;
      const bool second = lane >= part.split;
      // Field by field: a reference to one of the two would move both to memory.
      const void* const data = second ? part.second.data : part.operand.data;
      const int64_t expert_stride = second ? part.second.expert_stride : part.operand.expert_stride;
      const int64_t lane_stride = second ? part.second.lane_stride : part.operand.lane_stride;
      const int64_t k_stride = second ? part.second.k_stride : part.operand.k_stride;
      int64_t at = part.first + (second ? lane - part.split : lane);
      const int64_t lanes = kAlongK && !owned(i) ? 0 : part.end - at;
      bool there = lanes > 0;
      if (kAlongK && gather && there) {
        at = gather[at];
        there = at >= 0 && at < limit_;
      }
      if constexpr (kAlongK) lanes_[i] = there ? -1 : 0;
      else lanes_[i] = held_between(lanes, Tile::kWide) * kUnit;
      from_[i] = static_cast<const S*>(data) + part.expert * expert_stride + (there ? at : 0) * lane_stride;
      if (!next_) from_[i] += (part.k_begin + first_k(i)) * k_stride;
      k_stride_[i] = Stride(k_stride);
      if constexpr (!kVector && !kAlongK) lane_stride_[i] = lane_stride;
    }
    if constexpr (!kAlongK) {
      if (next_) fetch_rows(part.k_end - part.k_begin);
    }
  }

  // Starts to read the next kDepth of k, of which `left` remain: copies into `stage`, or elements into registers.
  FFN_FN void load(char* stage, int64_t left) {
    if constexpr (kAlongK) {
      // The thread's chunks begin at one k.
      const int count = held_between(left - first_k(0), Tile::kWide) * kUnit;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        read(stage, i, from_[i], count & lanes_[i]);
        from_[i] += kVector ? kDepth : kDepth * k_stride_[i];
      }
    } else if (next_) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        if (owned(i)) read(stage, i, from_[0] + int64_t{rows_[i]} * k_stride_[0], rows_[i] < 0 ? 0 : lanes_[0]);
      fetch_rows(left - kDepth);
    } else {
      const bool whole = left >= kDepth;
      const S* from = from_[0];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        read(stage, i, from, whole || first_k(i) < left ? lanes_[0] : 0);
        from += int64_t{kRowStep} * k_stride_[0];
      }
      from_[0] += int64_t{kDepth} * k_stride_[0];
    }
  }

  // Writes the registers of the last load() to `stage`.
  FFN_FN void store(char* stage) {
    if constexpr (!kVector) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        if (owned(i)) *reinterpret_cast<Chunk*>(stage + Tile::offset(row(i), chunk())) = held_[i];
    }
  }

 private:
  static constexpr int kChunks = Tile::kRows * Tile::kRowChunks;
  static constexpr int kOwn = (kChunks + kGemmThreads - 1) / kGemmThreads;  // chunks of a thread
  static constexpr int kOwnLanes = kAlongK ? kOwn : 1;                      // first lanes of them
  static constexpr int kRowStep = kGemmThreads / Tile::kRowChunks;          // from one to the next
  static_assert(kGemmThreads % Tile::kRowChunks == 0, "a thread's chunks lie below each other");
  static constexpr int kUnit = kVector ? int(sizeof(S)) : 1;  // copies count bytes
  struct alignas(16) Chunk {
    S elements[Tile::kWide];
  };
  // Copies along lanes: of fewer than 2^31 rows that are fewer than 2^31 elements apart, one multiplication finds one.
  using Row = std::conditional_t<kVector, int32_t, int64_t>;
  using Stride = std::conditional_t<kVector && !kAlongK, int32_t, int64_t>;

  static FFN_FN int held_between(int64_t value, int most) { return value < 0 ? 0 : value < most ? int(value) : most; }
  static FFN_FN int chunk() { return int(threadIdx.x) % Tile::kRowChunks; }
  static FFN_FN int row(int i) { return int(threadIdx.x) / Tile::kRowChunks + i * kRowStep; }
  static FFN_FN bool owned(int i) { return kChunks % kGemmThreads == 0 || row(i) < Tile::kRows; }
  static FFN_FN int first_k(int i) { return kAlongK ? chunk() * Tile::kWide : row(i); }

  // Chunk i: its first `count` elements (times kUnit), zeros behind. A copy of nothing reads nothing, wherever it
  // points.
  FFN_FN void read(char* stage, int i, const S* from, int count) {
    if (!owned(i)) return;
    if constexpr (kVector) {
      cp_async_16(stage + Tile::offset(row(i), chunk()), from, count);
    } else {
      const int64_t step = kAlongK ? k_stride_[kAlongK ? i : 0] : lane_stride_[0];
#pragma unroll
      for (int e = 0; e < Tile::kWide; ++e) held_[i].elements[e] = e < count ? from[e * step] : S{};
    }
  }

  // Gathered rows of the next load, whose copies would else wait for them, `left` being left. -1: none, or outside.
  FFN_FN void fetch_rows(int64_t left) {
    const auto fetch = [&](int i) {
      const int64_t r = next_[i * kRowStep];
      rows_[i] = static_cast<uint64_t>(r) < static_cast<uint64_t>(limit_) ? Row(r) : Row(-1);
    };
    if (left >= kDepth) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        if (owned(i)) fetch(i);
    } else {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        rows_[i] = -1;
        if (owned(i) && first_k(i) < left) fetch(i);
      }
    }
    next_ += kDepth;
  }

  const S* from_[kOwnLanes];  // the first element of the next load; with a gather, of row 0
  Stride k_stride_[kOwnLanes];
  int64_t lane_stride_[kOwnLanes];
  int lanes_[kOwnLanes];  // along k: whether there is one, -1 or 0; else how much of the chunk
  const int64_t* next_;   // gather of k: rows of the next load, from the thread's first on
  int64_t limit_;
  Row rows_[kOwn];
  Chunk held_[kVector ? 1 : kOwn];
};

}  // namespace ffn_ops::cuda
