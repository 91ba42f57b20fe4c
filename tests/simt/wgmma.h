// SPDX-License-Identifier: BSD-3-Clause
// csrc/cuda/sm90/instructions.cuh on the host. Products are done as late as they may be, when their group is waited
// for: operands that are overwritten before show as a copy in flight, as poison, or in the result.
#pragma once

#include "builtins.h"

namespace ffn_ops::cuda {

inline void fence_async() {}
inline void wgmma_fence() {}
inline void wgmma_commit() { ++simt::Block::running()->thread().product_groups; }

template <int N>
void wgmma_wait() {
  simt::Thread& thread = simt::Block::running()->thread();
  while (!thread.products.empty() && thread.products.front().group < thread.product_groups - N) {
    thread.products.front().run(thread.products.front());
    thread.products.erase(thread.products.begin());
  }
}

// Element (lane, k) of an operand: its field `bytes` times 16 each; the 16-byte chunks of 128 are exchanged by address.
inline uint16_t wgmma_element(uint64_t operand, bool lanes, int lane, int k) {
  const auto field = [&](int bit) { return int64_t(operand >> bit & 0x3fff) * 16; };
  int64_t at = field(0);
  if (lanes) at += lane / 64 * field(16) + k / 8 * field(32) + k % 8 * 128 + lane % 64 * 2;
  else at += lane / 8 * field(32) + lane % 8 * 128 + k * 2;
  at ^= (at >> 7 & 7) << 4;
  simt::Block& block = *simt::Block::running();
  const char* const p = block.shared() + at;
  if (operand >> 62 != 1) block.fail("wgmma", "operands whose chunks are not exchanged in rows of 128 bytes");
  if (!block.in_shared(p, 2)) block.fail("wgmma", "an operand is outside shared memory");
  if (__asan_address_is_poisoned(p)) block.fail("wgmma", "an operand is still being copied to");
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return bits;
}

template <class S, int N, bool kALanes, bool kBLanes>
void wgmma_run(const simt::Product& p) {
  const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32 % 4 * 16 + lane / 4;
  const auto line = [](uint64_t operand, bool lanes, int of, float (&values)[16]) {
    for (int k = 0; k < 16; ++k) values[k] = Codec<S>::decode(S{wgmma_element(operand, lanes, of, k)});
  };
  float a[2][16], b[16];
  for (int half = 0; half < 2; ++half) line(p.a, kALanes, row + 8 * half, a[half]);
  for (int j = 0; j < N / 8; ++j)
    for (int i = 0; i < 2; ++i) {
      line(p.b, kBLanes, 8 * j + lane % 4 * 2 + i, b);
      for (int half = 0; half < 2; ++half) {
        float& sum = p.sums[4 * j + 2 * half + i];
        sum = fragment_sum(sum, a[half], b);
      }
    }
}

template <class S, int N, bool kALanes, bool kBLanes>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
  simt::Thread& thread = simt::Block::running()->thread();
  thread.products.push_back({&wgmma_run<S, N, kALanes, kBLanes>, d, a, b, thread.product_groups});
}

}  // namespace ffn_ops::cuda
