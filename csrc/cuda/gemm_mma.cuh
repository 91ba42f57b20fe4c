// SPDX-License-Identifier: BSD-3-Clause
// The product of two tiles of bfloat16 or float16 in shared memory by tensor cores: mma.sync m16n8k16, float32
// accumulators. Eight warps, two along the rows of the output and four along its columns.
#pragma once

#include "gemm_load.cuh"

namespace ffn_ops::cuda {

// Shared tiles A [BLOCK_M lanes] and B [BLOCK_N lanes], each stored along k or along lanes, BLOCK_K of k.
template <class S, int BLOCK_M, int BLOCK_N, int BLOCK_K, bool kAAlongK, bool kBAlongK>
class MmaCore {
 public:
  using Scalar = float;
  using TileA = SharedTile<S, BLOCK_M, BLOCK_K, kAAlongK>;
  using TileB = SharedTile<S, BLOCK_N, BLOCK_K, kBAlongK>;

  FFN_FN MmaCore() {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) acc_[i][j][v] = 0.0f;
  }

  // acc += A · Bᵀ, k in steps of 16: the same steps for every shape of tile.
  FFN_FN void multiply(const char* a, const char* b) {
#pragma unroll
    for (int k = 0; k < BLOCK_K; k += 16) {
      uint32_t rA[kTilesM][4], rB[kTilesN / 2][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) load_a(rA[i], a, warp_m() * kWarpRows + i * 16, k);
#pragma unroll
      for (int j = 0; j < kTilesN / 2; ++j) load_b(rB[j], b, warp_n() * kWarpCols + j * 16, k);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          const uint32_t pair[2] = {rB[j / 2][j % 2 * 2], rB[j / 2][j % 2 * 2 + 1]};
          mma_16816<S>(acc_[i][j], rA[i], pair);
        }
    }
  }

  FFN_FN void hand_over(float* tile, int stride) const {
    struct alignas(8) Two {
      float values[2];
    };
    const int row = warp_m() * kWarpRows + lane() / 4, col = warp_n() * kWarpCols + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<Two*>(tile + (i * 16 + half * 8 + row) * stride + col +
                                  j * 8) = {{acc_[i][j][2 * half], acc_[i][j][2 * half + 1]}};
  }

 private:
  static constexpr int kWarpsM = 2, kWarpsN = 4;
  static constexpr int kWarpRows = BLOCK_M / kWarpsM;
  static constexpr int kWarpCols = BLOCK_N / kWarpsN;
  static constexpr int kTilesM = kWarpRows / 16;
  static constexpr int kTilesN = kWarpCols / 8;
  static_assert(kGemmThreads == 32 * kWarpsM * kWarpsN && kTilesN % 2 == 0 && kWarpRows % 16 == 0);

  static FFN_FN int lane() { return int(threadIdx.x) % 32; }
  static FFN_FN int warp_m() { return int(threadIdx.x) / 32 / kWarpsN; }
  static FFN_FN int warp_n() { return int(threadIdx.x) / 32 % kWarpsN; }

  // 16 lanes and 16 of k as four 8×8 matrices. A fragment of A wants lanes 0 to 7, then 8 to 15, of the first eight k,
  // then of the others; one of B the two halves of k for lanes 0 to 7, then for 8 to 15.
  static FFN_FN void load_a(uint32_t (&r)[4], const char* tile, int first, int k) {
    load<TileA, kAAlongK>(r, tile, first + lane() / 8 % 2 * 8, k + lane() / 16 * 8);
  }
  static FFN_FN void load_b(uint32_t (&r)[4], const char* tile, int first, int k) {
    load<TileB, kBAlongK>(r, tile, first + lane() / 16 * 8, k + lane() / 8 % 2 * 8);
  }
  // The 8×8 matrix that begins at (first, k): this lane points to one of its rows as it is stored.
  template <class Tile, bool kAlongK>
  static FFN_FN void load(uint32_t (&r)[4], const char* tile, int first, int k) {
    if constexpr (kAlongK) ldmatrix_x4(r, tile + Tile::offset(first + lane() % 8, k / 8));
    else ldmatrix_x4_trans(r, tile + Tile::offset(k + lane() % 8, first / 8));
  }

  float acc_[kTilesM][kTilesN][4];
};

}  // namespace ffn_ops::cuda
