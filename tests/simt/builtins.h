// SPDX-License-Identifier: BSD-3-Clause
// The functions that kernels call, on the host: CUDA's qualifiers and built-in functions that csrc/cuda uses, and the
// primitives of csrc/cuda/device.cuh. Warp-wide functions need all 32 lanes, as the kernels promise.
#pragma once

#include "../../csrc/common/dtypes.h"
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define FFN_KERNEL_BOUNDS(threads, blocks)
#define FFN_IN_PLACE

// ---- barriers and warp-wide functions -------------------------------------------------------------------------------

inline void __syncthreads(simt::Place place = simt::Place::current()) { simt::Block::running()->barrier(place); }
inline void __threadfence() {}

namespace simt {

// Every lane gives `value`; `pick(lanes' values, lane)` is what it gets.
template <class T, class Pick>
auto warp_wide(const char* function, const Place& place, unsigned mask, T value, Pick pick) {
  using Result = decltype(pick(static_cast<const T*>(nullptr), 0u));
  struct Lane {
    T value;
    Pick pick;
    Result result;
  } mine{value, pick, {}};
  Block& block = *Block::running();
  if (mask != 0xffffffffu) block.fail(function, "a mask of a part of the warp");
  block.exchange(function, place, mine, [](Lane*(&lanes)[kWarp]) {
    T values[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) values[lane] = lanes[lane]->value;
    for (unsigned lane = 0; lane < kWarp; ++lane) lanes[lane]->result = lanes[lane]->pick(values, lane);
  });
  return mine.result;
}

template <class T>
T shuffle(const char* function, const Place& place, unsigned mask, T value, auto source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  return warp_wide(function, place, mask, value, [source](const T* values, unsigned lane) {
    const unsigned from = source(lane);
    return values[from < kWarp ? from : lane];
  });
}

}  // namespace simt

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Place place = simt::Place::current()) {
  simt::warp_wide("__syncwarp", place, mask, 0, [](const int*, unsigned) { return 0; });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, simt::Place place = simt::Place::current()) {
  return simt::shuffle("__shfl_sync", place, mask, value, [=](unsigned) { return unsigned(source) % simt::kWarp; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, simt::Place place = simt::Place::current()) {
  return simt::shuffle("__shfl_xor_sync", place, mask, value, [=](unsigned lane) { return lane ^ unsigned(lanes); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, simt::Place place = simt::Place::current()) {
  return simt::shuffle("__shfl_up_sync", place, mask, value, [=](unsigned lane) { return lane - by; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, simt::Place place = simt::Place::current()) {
  return simt::shuffle("__shfl_down_sync", place, mask, value, [=](unsigned lane) { return lane + by; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Place place = simt::Place::current()) {
  return simt::warp_wide("__ballot_sync", place, mask, predicate, [](const int* all, unsigned) {
    unsigned bits = 0;
    for (int lane = 0; lane < simt::kWarp; ++lane) bits |= unsigned(all[lane] != 0) << lane;
    return bits;
  });
}
inline int __any_sync(unsigned mask, int predicate, simt::Place place = simt::Place::current()) {
  return __ballot_sync(mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Place place = simt::Place::current()) {
  return __ballot_sync(mask, predicate, place) == 0xffffffffu;
}
// The lanes that gave the same value.
inline unsigned __match_any_sync(unsigned mask, unsigned value, simt::Place place = simt::Place::current()) {
  return simt::warp_wide("__match_any_sync", place, mask, value, [](const unsigned* all, unsigned mine) {
    unsigned bits = 0;
    for (int lane = 0; lane < simt::kWarp; ++lane) bits |= unsigned(all[lane] == all[mine]) << lane;
    return bits;
  });
}
template <class T>
unsigned __match_any_sync(unsigned, T, simt::Place = simt::Place::current()) = delete;  // other types: not narrowed

// ---- functions of one thread ----------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

// Integers only, as sums of floats would depend on the order.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  const T old = *address;
  *address = T(static_cast<unsigned long long>(old) + static_cast<unsigned long long>(value));
  return old;
}

// ---- device.cuh's primitives ----------------------------------------------------------------------------------------

namespace ffn_ops::cuda {

constexpr bool runs_here(bool) { return true; }
inline void refuse() {}

inline char* dynamic_shared() { return simt::Block::running()->shared(); }
inline uint32_t shared_address(const void* shared) {
  return uint32_t(static_cast<const char*>(shared) - dynamic_shared());
}

// Until its group is waited for, the destination may not be touched; the source is read now or at the end.
inline void cp_async_16(void* shared, const void* global, int bytes) {
  simt::Block& block = *simt::Block::running();
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    block.fail("cp_async_16", "an address is not a multiple of 16");
  if (bytes < 0 || bytes > 16) block.fail("cp_async_16", "bytes outside 0 to 16");
  if (!block.in_shared(shared, 16)) block.fail("cp_async_16", "the destination is outside shared memory");
  if (__asan_address_is_poisoned(shared)) block.fail("cp_async_16", "the destination is still being copied to");
  simt::Copy copy{static_cast<char*>(shared),
                  static_cast<const char*>(global),
                  static_cast<size_t>(bytes),
                  block.thread().groups,
                  block.coin(),
                  {}};
  if (copy.read) std::memcpy(copy.data, copy.from, copy.bytes);
  block.thread().copies.push_back(copy);
  __asan_poison_memory_region(shared, 16);
}
inline void cp_async_commit() { ++simt::Block::running()->thread().groups; }
// Waits for all but the last N committed groups.
template <int N>
void cp_async_wait() {
  simt::Thread& thread = simt::Block::running()->thread();
  std::erase_if(thread.copies, [&](simt::Copy& copy) {
    if (copy.group >= thread.groups - N) return false;
    if (!copy.read) std::memcpy(copy.data, copy.from, copy.bytes);
    __asan_unpoison_memory_region(copy.to, 16);
    std::memcpy(copy.to, copy.data, 16);
    return true;
  });
}

template <bool kTransposed>
void load_matrices(const char* function, const simt::Place& place, uint32_t (&r)[4], const void* shared_row) {
  simt::Block& block = *simt::Block::running();
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 || !block.in_shared(shared_row, 16))
    block.fail(function, "a row's address is not a multiple of 16, or outside shared memory");
  struct Lane {
    const char* row;
    uint32_t (&r)[4];
  } mine{static_cast<const char*>(shared_row), r};
  // Lane 8·i + j points to row j of matrix i, eight 16-bit elements; lane 4·g + p gets elements 2p and 2p + 1 of row g
  // (transposed: column g) of each matrix, the first in the lower half.
  block.exchange(function, place, mine, [](Lane*(&lanes)[simt::kWarp]) {
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      for (int j = 0; j < 8; ++j) std::memcpy(matrix[j], lanes[8 * i + j]->row, 16);
      for (int lane = 0; lane < simt::kWarp; ++lane) {
        const int g = lane / 4, p = lane % 4;
        const uint16_t low = kTransposed ? matrix[2 * p][g] : matrix[g][2 * p];
        const uint16_t high = kTransposed ? matrix[2 * p + 1][g] : matrix[g][2 * p + 1];
        lanes[lane]->r[i] = uint32_t(high) << 16 | low;
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, simt::Place place = simt::Place::current()) {
  load_matrices<false>("ldmatrix_x4", place, r, shared_row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, simt::Place place = simt::Place::current()) {
  load_matrices<true>("ldmatrix_x4_trans", place, r, shared_row);
}

// Not under the sanitizers: half of all time would go here.
[[gnu::no_sanitize("address", "undefined")]] inline float fragment_sum(float sum, const float (&a)[16],
                                                                       const float (&b)[16]) {
  for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
  return sum;
}

// d[16, 8] += a[16, 16] · b[16, 8] of one warp, in PTX's fragments: lane 4·g + p holds of a rows g and g + 8, of b and
// d column g and columns 2p, 2p + 1. Products are exact; a GPU's own order of the sum over k is not documented.
template <class S>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               simt::Place place = simt::Place::current()) {
  struct Lane {
    float (&d)[4];
    const uint32_t (&a)[4];
    const uint32_t (&b)[2];
  } mine{d, a, b};
  simt::Block::running()->exchange("mma_16816", place, mine, [](Lane*(&lanes)[simt::kWarp]) {
    float a[16][16], b[8][16];  // b by columns
    const auto half = [](uint32_t pair, int i) { return Codec<S>::decode(S{uint16_t(pair >> (16 * i))}); };
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      const int g = lane / 4, p = lane % 4;
      for (int i = 0; i < 2; ++i) {
        for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * p + i + r / 2 * 8] = half(lanes[lane]->a[r], i);
        for (int r = 0; r < 2; ++r) b[g][2 * p + i + r * 8] = half(lanes[lane]->b[r], i);
      }
    }
    for (int lane = 0; lane < simt::kWarp; ++lane)
      for (int i = 0; i < 4; ++i)
        lanes[lane]->d[i] = fragment_sum(lanes[lane]->d[i], a[lane / 4 + i / 2 * 8], b[lane % 4 * 2 + i % 2]);
  });
}

}  // namespace ffn_ops::cuda
