// SPDX-License-Identifier: BSD-3-Clause
// The grouped product whose weight is in codes: a loader that decodes it into the tiles of shared memory, and the
// instances of the one kernel with it. 16-bit products round the weight's values to their dtype.
#pragma once

#include "codes.cuh"
#include "gemm_kernel.cuh"

namespace ffn_ops::cuda {

struct CodedPart {
  const CodedGemm& job;
  int64_t expert, n;  // its first lane
  int split;          // lanes of the tile from here on are those of up
};

// As TileLoader: load() reads codes into registers, store() decodes them. kAlongK: the weight's rows are lanes, else k.
template <class Tile, class S, int kDepth, bool kAlongK>
class CodedLoader {
 public:
  FFN_FN explicit CodedLoader(const CodedPart& part) : job_(part.job), expert_(part.expert) {
    if constexpr (kAlongK) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const bool up = row(i) >= part.split;
        const int64_t lane = part.n + (up ? row(i) - part.split : row(i));
        there_[i] = lane < job_.N;
        if (there_[i]) rows_[i] = find_row(i, job_.first + (up ? job_.up_first : 0) + lane * job_.step);
      }
    } else {
      const int64_t lanes = job_.N - part.n - chunk() * kWide;
      lanes_ = lanes < kWide ? int(lanes) : kWide;
      col_ = job_.first + part.n + chunk() * kWide;
    }
  }

  FFN_FN void load(char*, int64_t left) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if constexpr (kAlongK) {
        const int64_t there = left - chunk() * kWide;
        chunks_[i] = read_chunk<kWide>(weight(i), rows_[i], next_ + chunk() * kWide,
                                       !there_[i]      ? 0
                                       : there < kWide ? int(there)
                                                       : kWide);
      } else if (row(i) < left) {
        const CodedRow found = find_row(i, next_ + row(i));
        chunks_[i] = read_chunk<kWide>(weight(i), found, col_, lanes_);
      } else {
        chunks_[i] = {};
      }
    }
    next_ += kDepth;
  }

  FFN_FN void store(char* stage) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float values[kWide];
      decode_chunk(weight(i).first.format, chunks_[i], values);
      *reinterpret_cast<Pack<S>*>(stage + Tile::offset(row(i), chunk())) = Pack<S>::of(values);
    }
  }

 private:
  static constexpr int kWide = Tile::kWide;
  static constexpr int kOwn = Tile::kRows * Tile::kRowChunks / kGemmThreads;  // chunks of a thread
  static_assert(kOwn * kGemmThreads == Tile::kRows * Tile::kRowChunks && kCodesAtOnce % kWide == 0);

  static FFN_FN int chunk() { return int(threadIdx.x) % Tile::kRowChunks; }
  static FFN_FN int row(int i) { return int(threadIdx.x) / Tile::kRowChunks + i * (kGemmThreads / Tile::kRowChunks); }
  FFN_FN const CodedWeight& weight(int i) const { return job_.weights[second_[i]]; }
  FFN_FN CodedRow find_row(int i, int64_t n) {
    second_[i] = n >= job_.split;
    return coded_row(weight(i), expert_, second_[i] ? n - job_.split : n);
  }

  const CodedGemm& job_;
  int64_t expert_, next_ = 0, col_ = 0;
  int lanes_ = 0;
  bool second_[kOwn] = {};
  bool there_[kAlongK ? kOwn : 1];
  CodedRow rows_[kAlongK ? kOwn : 1] = {};
  CodedChunk<kWide> chunks_[kOwn];
};

template <class S, bool kBAlongK>
struct CodedInstance {
  using Base = GemmInstance<S, GemmShape::kShort, false, false, kBAlongK, true>;
  using Storage = S;
  using Job = CodedGemm;
  static constexpr bool kHopper = false, kOuter = false;
  static constexpr GemmTile kTile = Base::kTile;
  static constexpr int BLOCK_M = kTile.rows, BLOCK_N = kTile.cols, BLOCK_K = kTile.depth;
  using Core = typename Base::Core;
  using LoaderA = typename Base::LoaderA;
  using LoaderB = CodedLoader<typename Core::TileB, S, BLOCK_K, kBAlongK>;
  static constexpr int kStageBytes = Base::kStageBytes, kRunning = 0, kEpilogueRows = Base::kEpilogueRows;
};

template <class I>
FFN_FN CodedPart part_b(const CodedGemm& job, const TileCoord& coord) {
  return {job, coord.rows.expert, coord.n, job.gated ? I::BLOCK_N / 2 : I::BLOCK_N};
}

template <class I>
__global__ void FFN_KERNEL_BOUNDS(kGemmThreads, I::kTile.blocks)
    coded_gemm_kernel(const FFN_IN_PLACE CodedGemm job, GemmPlan plan, const RowTile* table) {
  make_tile<I>(job, plan, table);
}

template <class S, class F>
void dispatch_coded_gemm(const GemmPlan& plan, const F& f) {
  if (plan.b_along_k) f(Tag<CodedInstance<S, true>>{});
  else f(Tag<CodedInstance<S, false>>{});
}

}  // namespace ffn_ops::cuda
