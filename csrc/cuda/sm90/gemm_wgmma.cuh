// SPDX-License-Identifier: BSD-3-Clause
// The product of two tiles of bfloat16 or float16 in shared memory by a Hopper GPU's wgmma, float32 accumulators: two
// groups of four warps, one above the other or, for 64 rows, beside each other.
#pragma once

#include "../gemm_grid.h"
#include "instructions.cuh"

namespace ffn_ops::cuda {

// As SharedTile, in the order that wgmma_operand() describes: rows of 128 bytes, of wide rows one panel after another.
template <class S, int kLanes, int kDepth, bool kAlongK>
struct WgmmaTile {
  static constexpr int kWide = 16 / int(sizeof(S));  // elements of a chunk
  static constexpr int kRows = kAlongK ? kLanes : kDepth;
  static constexpr int kRowChunks = (kAlongK ? kDepth : kLanes) / kWide;
  static constexpr int kBytes = kRows * kRowChunks * 16;
  static constexpr int kPanelBytes = kRows * 128;
  static_assert(sizeof(S) == 2 && kRows % 8 == 0 && kRowChunks % 8 == 0 && (!kAlongK || kRowChunks == 8));

  static constexpr FFN_FN int offset(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
  }
  // Lanes from `first` on, a multiple of 64, and 16 of k from `k` on.
  static FFN_FN uint64_t operand(const char* tile, int first, int k) {
    constexpr int kEight = 8 * 128;
    if constexpr (kAlongK) return wgmma_operand(tile + first * 128 + k * int(sizeof(S)), 16, kEight);
    else return wgmma_operand(tile + first / 64 * kPanelBytes + k * 128, kPanelBytes, kEight);
  }
};

// Shared tiles A [BLOCK_M lanes] and B [BLOCK_N lanes], each stored along k or along lanes, BLOCK_K of k.
template <class S, int BLOCK_M, int BLOCK_N, int BLOCK_K, bool kAAlongK, bool kBAlongK>
class WgmmaCore {
 public:
  using Scalar = float;
  using TileA = WgmmaTile<S, BLOCK_M, BLOCK_K, kAAlongK>;
  using TileB = WgmmaTile<S, BLOCK_N, BLOCK_K, kBAlongK>;

  FFN_FN WgmmaCore() {
#pragma unroll
    for (float& sum : acc_) sum = 0.0f;
  }

  // Begins acc += A · Bᵀ, k in steps of 16: the same steps for every shape of tile. The tiles are read until the group
  // has been waited for.
  FFN_FN void start(const char* a, const char* b) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BLOCK_K; k += 16)
      wgmma<S, kCols, !kAAlongK, !kBAlongK>(acc_, TileA::operand(a, first_row(), k), TileB::operand(b, first_col(), k));
    wgmma_commit();
  }

  FFN_FN void hand_over(float* tile, int stride) const {
    struct alignas(8) Two {
      float values[2];
    };
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32 % 4;
    float* const at = tile + (first_row() + warp * 16 + lane / 4) * stride + first_col() + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<Two*>(at + half * 8 * stride +
                                j * 8) = {{acc_[4 * j + 2 * half], acc_[4 * j + 2 * half + 1]}};
  }

 private:
  static constexpr int kGroupsM = BLOCK_M / 64, kGroupsN = kGemmThreads / 128 / kGroupsM;
  static constexpr int kCols = BLOCK_N / kGroupsN;
  static_assert(kGroupsM * kGroupsN * 128 == kGemmThreads && (kCols == 64 || kCols == 128 || kCols == 256));

  static FFN_FN int group() { return int(threadIdx.x) / 128; }
  static FFN_FN int first_row() { return kGroupsM == 1 ? 0 : group() * 64; }
  static FFN_FN int first_col() { return kGroupsN == 1 ? 0 : group() * kCols; }

  float acc_[kCols / 2];
};

}  // namespace ffn_ops::cuda
