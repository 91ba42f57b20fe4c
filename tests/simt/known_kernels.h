// SPDX-License-Identifier: BSD-3-Clause
// Kernels of well-known algorithms, each with the mistake that a parameter names: simt_test.cpp runs them.
#pragma once

#include "../../csrc/cuda/device.cuh"

namespace ffn_ops::cuda {

inline constexpr unsigned kAll = 0xffffffffu;

// What a kernel does wrong, if anything.
enum class Mistake {
  kNone,
  kNoBarrier,
  kNoInit,
  kNoWait,
  kNoArrival,
  kTwice,
  kMisaligned,
  kPastEnd,
  kDivergent,
  kEarlyReturn,
  kHalfWarp,
  kMixed
};

// out[block] = sum of the block's part.
template <Mistake M, class T>
__global__ void sum_kernel(const T* in, T* out) {
  T* shared = reinterpret_cast<T*>(dynamic_shared());
  const unsigned t = threadIdx.x;
  if (M != Mistake::kNoInit || t % 2) shared[t + (M == Mistake::kPastEnd)] = in[blockIdx.x * blockDim.x + t];
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (t < n) shared[t] += shared[t + n];
    if constexpr (M != Mistake::kNoBarrier) __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = shared[0];
}

// Inclusive sums of one block, warp by warp.
static __global__ void scan_kernel(const int* in, int* out) {
  int* totals = reinterpret_cast<int*>(dynamic_shared());
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int value = in[threadIdx.x];
  for (unsigned by = 1; by < 32; by *= 2) {
    const int before = __shfl_up_sync(kAll, value, by);
    if (lane >= by) value += before;
  }
  if (lane == 31) totals[warp] = value;
  __syncthreads();
  for (unsigned w = 0; w < warp; ++w) value += totals[w];
  out[threadIdx.x] = value;
}

// out[x][y] = in[y][x], 32×32 in tiles of 32×8 threads.
template <Mistake M>
__global__ void transpose_kernel(const float* in, float* out) {
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  const unsigned x = threadIdx.x % 32;
  for (unsigned y = threadIdx.x / 32; y < 32; y += 8) tile[y * 33 + x] = in[y * 32 + x];
  if constexpr (M != Mistake::kNoBarrier) __syncthreads();
  for (unsigned y = threadIdx.x / 32; y < 32; y += 8) out[y * 32 + x] = tile[x * 33 + y];
}

// One warp. out[lane] has a bit for each function that gave the right value.
static __global__ void warp_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x;
  unsigned right = 0;
  right |= unsigned(__shfl_sync(kAll, int(lane) * 3, 7) == 21) << 0;
  right |= unsigned(__shfl_sync(kAll, lane, int(lane + 40)) == (lane + 8) % 32) << 1;
  right |= unsigned(__shfl_xor_sync(kAll, float(lane), 5) == float(lane ^ 5)) << 2;
  right |= unsigned(__shfl_up_sync(kAll, double(lane), 3) == double(lane < 3 ? lane : lane - 3)) << 3;
  right |= unsigned(__shfl_down_sync(kAll, int64_t(lane) << 40, 3) == int64_t(lane > 28 ? lane : lane + 3) << 40) << 4;
  right |= unsigned(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u) << 5;
  right |= unsigned(__any_sync(kAll, lane == 9) && !__any_sync(kAll, lane == 32)) << 6;
  right |= unsigned(__all_sync(kAll, lane < 32) && !__all_sync(kAll, lane != 9)) << 7;
  right |= unsigned(__match_any_sync(kAll, lane % 4) == 0x11111111u << lane % 4) << 8;
  right |= unsigned(__popc(0xf0u) == 4 && __ffs(8) == 4 && __ffs(0) == 0 && __clz(1) == 31 && __clz(0) == 32) << 9;
  out[lane] = right;
}

// Each thread's place among the equal keys: by rank in the warp, in warps one after the other, and counts by an atomic.
template <Mistake M>
__global__ void rank_kernel(const unsigned* keys, unsigned keys_end, unsigned* rank, unsigned* count) {
  unsigned* used = reinterpret_cast<unsigned*>(dynamic_shared());
  for (unsigned k = threadIdx.x; k < keys_end; k += blockDim.x) used[k] = 0;
  __syncthreads();
  const unsigned lane = threadIdx.x % 32, key = keys[threadIdx.x];
  const unsigned peers = __match_any_sync(kAll, key);
  const unsigned before = unsigned(__popc(peers & ((1u << lane) - 1)));
  const bool last = peers >> lane == 1;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
    if (warp == threadIdx.x / 32) {
      rank[threadIdx.x] = used[key] + before;
      if constexpr (M != Mistake::kNoBarrier) __syncwarp();
      if (last) used[key] += before + 1;
    }
    __syncthreads();
  }
  if (last) atomicAdd(&count[key], unsigned(__popc(peers)));
}

// out = in with each tile of blockDim.x 16-byte pieces reversed; two tiles in flight. The last piece is `tail` bytes.
template <Mistake M>
__global__ void copy_kernel(const char* in, char* out, unsigned tiles, int tail) {
  const unsigned t = threadIdx.x, n = blockDim.x;
  char* shared = dynamic_shared();
  const auto load = [&](unsigned tile) {
    const unsigned piece = tile * n + t;
    if (tile < tiles) cp_async_16(shared + (tile % 2 * n + t) * 16, in + piece * 16, piece + 1 < tiles * n ? 16 : tail);
    cp_async_commit();
  };
  if constexpr (M == Mistake::kMisaligned) in += 8;
  if constexpr (M == Mistake::kTwice) load(0);
  load(0);
  for (unsigned tile = 0; tile < tiles; ++tile) {
    load(tile + 1);
    if constexpr (M != Mistake::kNoWait) cp_async_wait<1>();
    if constexpr (M != Mistake::kNoArrival) __syncthreads();
    const char* piece = shared + (tile % 2 * n + n - 1 - t) * 16;
    for (unsigned i = 0; i < 16; ++i) out[(tile * n + t) * 16 + i] = piece[i];
    if constexpr (M != Mistake::kNoBarrier) __syncthreads();
  }
}

// out[16, 8] += a[16, 16] · b[16, 8], the fragments filled as the PTX manual numbers their elements.
template <class S>
__global__ void fragments_kernel(const S* a, const S* b, float* out) {
  const int group = int(threadIdx.x) / 4, in_group = int(threadIdx.x) % 4;
  uint32_t ra[4] = {}, rb[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
    ra[i / 2] |= uint32_t(a[row * 16 + column].bits) << (i & 1) * 16;
  }
  for (int i = 0; i < 4; ++i)
    rb[i / 2] |= uint32_t(b[(in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)) * 8 + group].bits) << (i & 1) * 16;
  float d[4];
  const auto index = [&](int i) { return (i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) d[i] = out[index(i)];
  mma_16816<S>(d, ra, rb);
  for (int i = 0; i < 4; ++i) out[index(i)] = d[i];
}

// out[16, 16] = a[16, 16] · b[16, 16] through shared memory: b lies as [k][n] and is transposed on the way, or as
// [n][k].
template <class S, bool kTransposed>
__global__ void product_kernel(const S* a, const S* b, float* out) {
  S* sA = reinterpret_cast<S*>(dynamic_shared());
  S* sB = sA + 256;
  const int lane = int(threadIdx.x);
  cp_async_16(sA + lane * 8, a + lane * 8, 16);
  cp_async_16(sB + lane * 8, b + lane * 8, 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t ra[4], rb[4];
  ldmatrix_x4(ra, sA + lane % 16 * 16 + lane / 16 * 8);
  if constexpr (kTransposed) {
    ldmatrix_x4_trans(rb, sB + lane % 16 * 16 + lane / 16 * 8);
  } else {
    ldmatrix_x4(rb, sB + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
  }
  for (int half = 0; half < 2; ++half) {
    float d[4] = {};
    mma_16816<S>(d, ra, {rb[2 * half], rb[2 * half + 1]});
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

template <Mistake M>
__global__ void wrong_kernel(unsigned* out) {
  const unsigned t = threadIdx.x;
  if (M == Mistake::kEarlyReturn && t == 5) return;
  if (M == Mistake::kHalfWarp && t < 16) {
    out[t] = __ballot_sync(kAll, 1);
  } else if (M == Mistake::kMixed && t < 16) {
    out[t] = __shfl_sync(kAll, t, 0);
  } else if (M == Mistake::kMixed) {
    out[t] = __shfl_sync(kAll, t, 1);
  }
  if (M == Mistake::kDivergent && t == 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[t] = t;
}

// Each thread draws a number: the order in which they ran.
static __global__ void order_kernel(unsigned* next, unsigned* order) {
  order[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(next, 1u);
}

}  // namespace ffn_ops::cuda
