// Tiles of operands from global into shared memory: gathered, ragged, of any stride, by 16-byte copies in flight or
// element by element into the same places.
#pragma once

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

// A thread fills the same chunks of every stage: along k those of several lanes, else those of several k of the same
// lanes.
template <class S, int kLanes, int kDepth, bool kAlongK, bool kVector>
class TileLoader {
 public:
  using Tile = SharedTile<S, kLanes, kDepth, kAlongK>;

  FFN_FN explicit TileLoader(const OperandPart& part) : safe_(static_cast<const S*>(part.operand.data)) {
    const int64_t* gather = part.operand.gather;
    limit_ = part.operand.gather_limit;
    next_ = !kAlongK && part.gather_k && gather ? gather + part.k_begin : nullptr;
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
      if (kAlongK && gather && lanes > 0) {
        at = gather[at];
        lanes_[i] = at >= 0 && at < limit_;
      } else {
        lanes_[i] = lanes < 0 ? 0 : lanes < Tile::kWide ? int(lanes) : Tile::kWide;
      }
      if (lanes_[i] == 0) at = 0;
      from_[i] = static_cast<const S*>(data) + part.expert * expert_stride + at * lane_stride +
                 (!kAlongK && next_ ? 0 : (part.k_begin + first_k(i)) * k_stride);
      if constexpr (!kVector || !kAlongK) k_stride_[i] = k_stride;
      if constexpr (!kVector && !kAlongK) lane_stride_[i] = lane_stride;
    }
    fetch_rows(part.k_end - part.k_begin);
  }

  // Starts to read the next kDepth of k, `left` being left of it: copies into `stage`, or elements into registers.
  FFN_FN void load(char* stage, int64_t left) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!owned(i)) continue;
      const int own = kAlongK ? i : 0;
      const S* from = from_[own];
      const int64_t k = left - first_k(i);  // from the chunk's first on
      bool valid = k > 0 && lanes_[own] > 0;
      if constexpr (!kAlongK) {
        if (next_) {
          valid = valid && rows_[i] >= 0 && rows_[i] < limit_;
          from += valid ? rows_[i] * k_stride_[own] : 0;
        } else {
          from += int64_t{i * kRowStep} * k_stride_[own];
        }
      }
      const int most = kAlongK ? (k < Tile::kWide ? int(k) : Tile::kWide) : lanes_[own];
      const int count = valid ? most : 0;
      if constexpr (kVector) {
        cp_async_16(stage + Tile::offset(row(i), chunk()), valid ? from : safe_, count * int(sizeof(S)));
      } else {
        const int64_t step = kAlongK ? k_stride_[own] : lane_stride_[own];
#pragma unroll
        for (int e = 0; e < Tile::kWide; ++e) held_[i].elements[e] = e < count ? from[e * step] : S{};
      }
    }
    advance(left - kDepth);
  }

  // What the last load() holds in registers goes to `stage`.
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
  struct alignas(16) Chunk {
    S elements[Tile::kWide];
  };

  static FFN_FN int chunk() { return int(threadIdx.x) % Tile::kRowChunks; }
  static FFN_FN int row(int i) { return int(threadIdx.x) / Tile::kRowChunks + i * kRowStep; }
  static FFN_FN bool owned(int i) { return kChunks % kGemmThreads == 0 || row(i) < Tile::kRows; }
  static FFN_FN int first_k(int i) { return kAlongK ? chunk() * Tile::kWide : row(i); }

  FFN_FN void advance(int64_t left) {
    if (!kAlongK && next_) {
      next_ += kDepth;
    } else {
#pragma unroll
      for (int i = 0; i < kOwnLanes; ++i) {
        if constexpr (kVector && kAlongK) from_[i] += kDepth;
        else from_[i] += kDepth * k_stride_[i];
      }
    }
    fetch_rows(left);
  }

  // Of the next load, whose copies would else wait for them.
  FFN_FN void fetch_rows(int64_t left) {
    if constexpr (!kAlongK) {
      if (!next_) return;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) rows_[i] = first_k(i) < left ? next_[first_k(i)] : -1;
    }
  }

  const S* safe_;             // where copies of nothing point to
  const S* from_[kOwnLanes];  // the first element of the next load
  int64_t k_stride_[kOwnLanes], lane_stride_[kOwnLanes];
  int lanes_[kOwnLanes];  // along k: 0 or not; else lanes of the chunk that exist
  const int64_t* next_;   // gather of k: rows of the next load
  int64_t limit_;
  int64_t rows_[kOwn];
  Chunk held_[kVector ? 1 : kOwn];
};

}  // namespace ffn_ops::cuda
