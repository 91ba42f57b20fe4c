// Tests of the host's way to run kernels itself: known kernels give the right result under every seed, and kernels with
// one mistake are caught.
#include <algorithm>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.cuh"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::Buffer;
using simt::check;

constexpr unsigned kAll = 0xffffffffu;
constexpr uint64_t kSeeds = 20;

// ---- kernels; with the mistake that a parameter names, if any -------------------------------------------------------

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
__global__ void scan_kernel(const int* in, int* out) {
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
__global__ void warp_kernel(unsigned* out) {
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
__global__ void order_kernel(unsigned* next, unsigned* order) {
  order[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(next, 1u);
}

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
              {"wrong_kernel", "seed 11", "not every thread", "simt_test.cpp", "thread 7"});
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
