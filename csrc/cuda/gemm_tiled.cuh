// SPDX-License-Identifier: BSD-3-Clause
// The product of two tiles of float or double in shared memory by fused multiply-adds, in the order of k, summed in
// runs as on the CPU: a long sum would lose more than a blocked one. A grid of threads, each with a tile of
// accumulators in registers.
#pragma once

#include "gemm_load.cuh"
#include "scalar.cuh"

namespace ffn_ops::cuda {

constexpr int kSumBlock = 64;  // of k, added before they join the total

// Shared tiles as in MmaCore. Threads form a grid with kThreadsM rows.
template <class T, int BLOCK_M, int BLOCK_N, int BLOCK_K, int kThreadsM, bool kAAlongK, bool kBAlongK>
class TiledCore {
 public:
  using Scalar = T;
  using TileA = SharedTile<T, BLOCK_M, BLOCK_K, kAAlongK>;
  using TileB = SharedTile<T, BLOCK_N, BLOCK_K, kBAlongK>;

  FFN_FN TiledCore() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) acc_[i][j] = total_[i][j] = 0;
  }

  FFN_FN void multiply(const char* a, const char* b) {
    // Not unrolled: loads of many steps ahead would take more registers than there are.
#pragma unroll 1
    for (int k = 0; k < BLOCK_K; k += kWide) {
      T rA[kRows][kWide], rB[kCols][kWide];
      load<TileA, kAAlongK, kThreadsM>(rA, a, thread_m(), k);
      load<TileB, kBAlongK, kThreadsN>(rB, b, thread_n(), k);
#pragma unroll
      for (int step = 0; step < kWide; ++step)
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kCols; ++j)
            acc_[i][j] = fma(Lane<T>(rA[i][step]), Lane<T>(rB[j][step]), Lane<T>(acc_[i][j])).value;
    }
    in_run_ += BLOCK_K;
    if (in_run_ < kSumBlock) return;
    in_run_ = 0;
    end_run();
  }

  FFN_FN void hand_over(T* tile, int stride) {
    end_run();
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        tile[lane_of<kAAlongK, kThreadsM>(thread_m(), i) * stride + lane_of<kBAlongK, kThreadsN>(thread_n(), j)] =
            total_[i][j];
  }

 private:
  static constexpr int kWide = TileA::kWide;
  static constexpr int kThreadsN = kGemmThreads / kThreadsM;
  static constexpr int kRows = BLOCK_M / kThreadsM;
  static constexpr int kCols = BLOCK_N / kThreadsN;
  static_assert(kRows * kThreadsM == BLOCK_M && kCols * kThreadsN == BLOCK_N && BLOCK_K % kWide == 0);
  static_assert((kAAlongK || kRows % kWide == 0) && (kBAlongK || kCols % kWide == 0));

  static_assert(kSumBlock % BLOCK_K == 0);

  FFN_FN void end_run() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        total_[i][j] += acc_[i][j];
        acc_[i][j] = 0;
      }
  }

  static FFN_FN int thread_m() { return int(threadIdx.x) / kThreadsN; }
  static FFN_FN int thread_n() { return int(threadIdx.x) % kThreadsN; }

  // The i-th lane of a thread: neighbouring threads read neighbouring chunks, a chunk being kWide of k of one lane, or
  // kWide lanes of one k.
  template <bool kAlongK, int kThreads>
  static FFN_FN int lane_of(int thread, int i) {
    return kAlongK ? thread + i * kThreads : (thread + i / kWide * kThreads) * kWide + i % kWide;
  }

  template <class Tile, bool kAlongK, int kThreads, int kLanes>
  static FFN_FN void load(T (&r)[kLanes][kWide], const char* tile, int thread, int k) {
    struct alignas(16) Chunk {
      T elements[kWide];
    };
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      // Along lanes, kWide chunks of k are read for kWide lanes.
      const int lane = lane_of<kAlongK, kThreads>(thread, kAlongK ? i : i / kWide * kWide);
      const int at = kAlongK ? Tile::offset(lane, k / kWide) : Tile::offset(k + i % kWide, lane / kWide);
      const Chunk chunk = *reinterpret_cast<const Chunk*>(tile + at);
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        if constexpr (kAlongK) r[i][e] = chunk.elements[e];
        else r[i / kWide * kWide + e][i % kWide] = chunk.elements[e];
      }
    }
  }

  T acc_[kRows][kCols], total_[kRows][kCols];
  int in_run_ = 0;
};

}  // namespace ffn_ops::cuda
