// SPDX-License-Identifier: BSD-3-Clause
// Tests of the host's way to run kernels itself: known kernels give the right result under every seed, and kernels with
// one mistake are caught.
#include <algorithm>
#include <string>
#include <vector>

#include "known_kernels.h"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::Buffer;
using simt::check;

constexpr uint64_t kSeeds = 20;

// ---- right kernels --------------------------------------------------------------------------------------------------

template <class T>
Buffer<T> numbers(int64_t n, uint64_t seed) {
  simt::Random random(seed);
  Buffer<T> values(n);
  for (T& value : values) {
    const int small = int(random.below(33)) - 16;
    if constexpr (std::is_arithmetic_v<T>) {
      value = T(small);
    } else {
      value = Codec<T>::encode(float(small) + float(random.below(16)) / 16);
    }
  }
  return values;
}

template <Mistake M>
bool sum_is_right(uint64_t seed) {
  Buffer<float> in = numbers<float>(512, seed), out(2);
  simt::launch({2, 256, 256 * 4, seed}, sum_kernel<M, float>, in.data(), out.data());
  float sums[2] = {};
  for (int i = 0; i < 512; ++i) sums[i / 256] += in[i];
  return out[0] == sums[0] && out[1] == sums[1];
}

template <Mistake M>
bool transposition_is_right(uint64_t seed) {
  Buffer<float> in = numbers<float>(1024, seed), out(1024);
  simt::launch({1, 256, 32 * 33 * 4, seed}, transpose_kernel<M>, in.data(), out.data());
  bool right = true;
  for (int i = 0; i < 1024; ++i) right = right && out[i] == in[i % 32 * 32 + i / 32];
  return right;
}

template <Mistake M>
bool ranks_are_right(uint64_t seed) {
  constexpr unsigned kKeys = 7;
  Buffer<unsigned> keys(128), rank(128), count(kKeys);
  simt::Random random(seed);
  for (unsigned& key : keys) key = unsigned(random.below(kKeys));
  std::fill(count.begin(), count.end(), 0u);
  simt::launch({1, 128, kKeys * 4, seed}, rank_kernel<M>, keys.data(), kKeys, rank.data(), count.data());
  std::vector<unsigned> seen(kKeys);
  bool right = true;
  for (int i = 0; i < 128; ++i) right = right && rank[i] == seen[keys[i]]++;
  for (unsigned k = 0; k < kKeys; ++k) right = right && count[k] == seen[k];
  return right;
}

template <Mistake M>
bool copy_is_right(uint64_t seed) {
  constexpr unsigned kTiles = 5, kThreads = 64, kPieces = kTiles * kThreads;
  constexpr int kTail = 6;
  Buffer<char> in((kPieces - 1) * 16 + kTail), out(kPieces * 16);
  simt::Random random(seed);
  for (char& byte : in) byte = char(random.next());
  simt::launch({1, kThreads, 2 * kThreads * 16, seed}, copy_kernel<M>, in.data(), out.data(), kTiles, kTail);
  bool right = true;
  for (unsigned i = 0; i < kPieces * 16; ++i) {
    const unsigned from = (i / 16 / kThreads * kThreads + kThreads - 1 - i / 16 % kThreads) * 16 + i % 16;
    right = right && out[i] == (from < in.size() ? in[from] : 0);
  }
  return right;
}

void test_scan_and_warp(uint64_t seed) {
  Buffer<int> in = numbers<int>(256, seed), out(256);
  simt::launch({1, 256, 8 * 4, seed}, scan_kernel, in.data(), out.data());
  int sum = 0;
  for (int i = 0; i < 256; ++i) {
    sum += in[i];
    check(out[i] == sum, "scan: %d at %d, expected %d", out[i], i, sum);
  }
  Buffer<unsigned> right(32);
  simt::launch({1, 32, 0, seed}, warp_kernel, right.data());
  for (int i = 0; i < 32; ++i) check(right[i] == 0x3ff, "warp functions of lane %d: %x", i, right[i]);
}

template <class S>
void test_mma(const char* type, uint64_t seed) {
  Buffer<S> a = numbers<S>(256, seed), b = numbers<S>(256, seed + 1);
  Buffer<float> c = numbers<float>(128, seed), fragments = numbers<float>(128, seed);
  simt::launch({1, 32, 0, seed}, fragments_kernel<S>, a.data(), b.data(), fragments.data());
  Buffer<float> kn(256), nk(256);
  simt::launch({1, 32, 1024, seed}, product_kernel<S, true>, a.data(), b.data(), kn.data());
  simt::launch({1, 32, 1024, seed}, product_kernel<S, false>, a.data(), b.data(), nk.data());
  // The operands are multiples of 1/16 up to 17: every sum is exact in any order.
  const auto product = [&](int m, int n, int k_stride, int n_stride) {
    double sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += Codec<S>::decode(a[m * 16 + k]) * Codec<S>::decode(b[k * k_stride + n * n_stride]);
    return sum;
  };
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      check(kn[m * 16 + n] == product(m, n, 16, 1), "%s ldmatrix.trans: %g at %d, %d", type, kn[m * 16 + n], m, n);
      check(nk[m * 16 + n] == product(m, n, 1, 16), "%s ldmatrix: %g at %d, %d", type, nk[m * 16 + n], m, n);
      if (n < 8)
        check(fragments[m * 8 + n] == c[m * 8 + n] + product(m, n, 8, 1), "%s fragments: %g at %d, %d", type,
              fragments[m * 8 + n], m, n);
    }
  }
}

// Blocks and threads run in an order that the seed, and nothing else, decides.
void test_order() {
  const auto order = [](uint64_t seed) {
    Buffer<unsigned> next(std::vector<unsigned>{0}), numbers(8 * 64);
    simt::launch({8, 64, 0, seed}, order_kernel, next.data(), numbers.data());
    return std::vector<unsigned>(numbers.begin(), numbers.end());
  };
  const std::vector<unsigned> first = order(1);
  std::vector<unsigned> sorted = first;
  std::sort(sorted.begin(), sorted.end());
  for (unsigned i = 0; i < sorted.size(); ++i) check(sorted[i] == i, "not every thread runs once");
  check(first != sorted, "threads run in their order");
  check(!std::is_sorted(first.begin(), first.end(), [](unsigned a, unsigned b) { return a / 64 < b / 64; }),
        "blocks run in their order");
  check(first == order(1) && first != order(2), "the order does not follow from the seed");
}

// ---- wrong kernels --------------------------------------------------------------------------------------------------

void test_caught(const char* what, const std::string& message, std::initializer_list<const char*> parts) {
  for (const char* part : parts)
    check(message.find(part) != std::string::npos, "%s: not caught, or without \"%s\": %s", what, part,
          message.c_str());
}

template <Mistake M>
std::string error_of_wrong_kernel() {
  Buffer<unsigned> out(64);
  return simt::error_of([&] { simt::launch({1, 64, 0, 11}, wrong_kernel<M>, out.data()); });
}

void test_mistakes() {
  int sums = 0, transpositions = 0, ranks = 0;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    sums += !sum_is_right<Mistake::kNoBarrier>(seed);
    transpositions += !transposition_is_right<Mistake::kNoBarrier>(seed);
    ranks += !ranks_are_right<Mistake::kNoBarrier>(seed);
    check(!sum_is_right<Mistake::kNoInit>(seed), "uninitialised shared memory not seen, seed %d", int(seed));
  }
  check(sums > 0, "a reduction without barriers passes");
  check(transpositions == int(kSeeds), "a transposition without a barrier passes for some seed");
  check(ranks > 0, "ranks without __syncwarp pass");
  test_caught("a barrier missing before a buffer is filled again", simt::death_of([] {
                for (uint64_t seed = 1; seed <= kSeeds; ++seed) copy_is_right<Mistake::kNoBarrier>(seed);
              }),
              {"use-after-poison", "copy_kernel"});
  test_caught("cp.async without a wait", simt::death_of([] { copy_is_right<Mistake::kNoWait>(1); }),
              {"use-after-poison", "copy_kernel"});
  test_caught("a barrier missing before what others copied is read",
              simt::death_of([] { copy_is_right<Mistake::kNoArrival>(1); }), {"use-after-poison", "copy_kernel"});
  const auto error_of_copy = [](auto copy) { return simt::error_of([&] { copy(1); }); };
  test_caught("two copies to one place", error_of_copy(copy_is_right<Mistake::kTwice>),
              {"copy_kernel", "still being copied"});
  test_caught("a misaligned copy", error_of_copy(copy_is_right<Mistake::kMisaligned>),
              {"cp_async_16", "multiple of 16"});
  test_caught("global memory past its end", simt::death_of([] {
                Buffer<float> in = numbers<float>(255, 1), out(1);
                simt::launch({1, 256, 1024, 1}, sum_kernel<Mistake::kNone, float>, in.data(), out.data());
              }),
              {"heap-buffer-overflow", "sum_kernel"});
  test_caught("shared memory past its end", simt::death_of([] { sum_is_right<Mistake::kPastEnd>(1); }),
              {"use-after-poison", "sum_kernel"});
  test_caught("divergent barriers", error_of_wrong_kernel<Mistake::kDivergent>(),
              {"wrong_kernel", "seed 11", "not every thread", "known_kernels.h", "thread 7"});
  test_caught("a thread that returned", error_of_wrong_kernel<Mistake::kEarlyReturn>(),
              {"wrong_kernel", "thread 5 and others: returned"});
  test_caught("half a warp", error_of_wrong_kernel<Mistake::kHalfWarp>(), {"__ballot_sync", "__syncthreads"});
  test_caught("two functions", error_of_wrong_kernel<Mistake::kMixed>(), {"different functions", "__shfl_sync"});
  check(error_of_wrong_kernel<Mistake::kNone>().empty(), "a right kernel fails after wrong ones");
  test_caught("half a warp of threads", simt::error_of([] { simt::launch({1, 48, 0, 1}, warp_kernel, nullptr); }),
              {"warp_kernel", "48 threads"});
}

}  // namespace

int main() {
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const int s = int(seed);
    check(sum_is_right<Mistake::kNone>(seed), "sum, seed %d", s);
    check(transposition_is_right<Mistake::kNone>(seed), "transposition, seed %d", s);
    check(ranks_are_right<Mistake::kNone>(seed), "ranks, seed %d", s);
    check(copy_is_right<Mistake::kNone>(seed), "copy, seed %d", s);
    test_scan_and_warp(seed);
    test_mma<Half>("float16", seed);
    test_mma<BFloat16>("bfloat16", seed);
  }
  test_order();
  test_mistakes();
  return simt::report("simt_test");
}
