// SPDX-License-Identifier: BSD-3-Clause
// wgmma on the host: its layouts of operands and sums, as PTX documents them, on exact products; and that it reads its
// operands until it is waited for.
#include "../../csrc/cuda/sm90/instructions.cuh"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::Buffer;
using simt::check;

constexpr int kDepth = 64;
constexpr int kEight = 1024, kPanel = kDepth * 128;  // bytes of eight rows of 128, of 64 lanes

// Where element (lane, k) stands: rows of 128 bytes, chunks of 16 exchanged within eight of them.
constexpr int place(bool lanes, int lane, int k) {
  const int row = lanes ? k : lane, column = lanes ? lane % 64 : k;
  return (lanes ? lane / 64 * kPanel : 0) + row * 128 + (column / 8 ^ row % 8) * 16 + column % 8 * 2;
}

template <class S>
void spread(char* tile, bool lanes, const S* from, int count) {
  for (int i = int(threadIdx.x); i < count * kDepth; i += 128)
    *reinterpret_cast<S*>(tile + place(lanes, i / kDepth, i % kDepth)) = from[i];
}

// d[64, N] = a[64, 64] · b[N, 64]ᵀ. `early`: an operand is overwritten before the products have been waited for.
template <class S, int N, bool kALanes, bool kBLanes>
__global__ void wgmma_kernel(const S* a, const S* b, float* d, bool early) {
  char* const tile_a = dynamic_shared();
  char* const tile_b = tile_a + 64 * kDepth * 2;
  spread(tile_a, kALanes, a, 64);
  spread(tile_b, kBLanes, b, N);
  fence_async();
  __syncthreads();
  float sums[N / 2] = {};
  wgmma_fence();
  for (int k = 0; k < kDepth; k += 16)
    wgmma<S, N, kALanes, kBLanes>(sums, wgmma_operand(tile_a + (kALanes ? k * 128 : k * 2), kPanel, kEight),
                                  wgmma_operand(tile_b + (kBLanes ? k * 128 : k * 2), kPanel, kEight));
  wgmma_commit();
  if (early) *reinterpret_cast<S*>(tile_a + place(kALanes, int(threadIdx.x) % 64, 5)) = S{};
  wgmma_wait<0>();
  const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32 * 16 + lane / 4;
  for (int j = 0; j < N / 8; ++j)
    for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * N + 8 * j + lane % 4 * 2 + i % 2] = sums[4 * j + i];
}

// How many elements are wrong. The operands are multiples of 1/16: every sum is exact in any order.
template <class S, int N, bool kALanes, bool kBLanes>
int wrong(uint64_t seed, bool early) {
  simt::Random random(seed);
  Buffer<S> a(64 * kDepth), b(N * kDepth);
  for (auto* operand : {&a, &b})
    for (S& x : *operand) x = Codec<S>::encode(float(random.below(255)) / 16 - 7);
  Buffer<float> d(64 * N);
  simt::launch({1, 128, (64 + N) * kDepth * 2, seed}, wgmma_kernel<S, N, kALanes, kBLanes>, a.data(), b.data(),
               d.data(), early);
  int count = 0;
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < N; ++n) {
      double sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += Codec<S>::decode(a[m * kDepth + k]) * Codec<S>::decode(b[n * kDepth + k]);
      count += d[m * N + n] != sum;
    }
  return count;
}

template <class S, int N>
void test_layouts(const char* type) {
  const auto right = [&](int found, const char* layout) {
    check(found == 0, "wgmma n%d %s, %s: %d are wrong", N, type, layout, found);
  };
  right(wrong<S, N, false, false>(1, false), "both along k");
  right(wrong<S, N, false, true>(2, false), "b along lanes");
  right(wrong<S, N, true, false>(3, false), "a along lanes");
  right(wrong<S, N, true, true>(4, false), "both along lanes");
}

}  // namespace

int main() {
  test_layouts<BFloat16, 64>("bfloat16");
  test_layouts<BFloat16, 128>("bfloat16");
  test_layouts<BFloat16, 256>("bfloat16");
  test_layouts<Half, 64>("float16");
  check(wrong<Half, 64, false, false>(5, true) > 0, "an operand that is overwritten too early is not seen");
  return simt::report("wgmma_test");
}
