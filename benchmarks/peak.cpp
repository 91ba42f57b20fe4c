// What this machine can do: float32 multiply-adds per second for each instruction set, and bytes read per second.
// Compiled at first use by peak.py. Every instruction set is a function attribute, so one build runs on every x86-64.
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Enough independent chains to cover latency times throughput of every core so far (4 to 8 cycles, 2 per cycle).
// The fixed point of z * kScale + kShift is 1: no overflow, no denormals.
constexpr int kChains = 12;
constexpr float kScale = 0.999f, kShift = 0.001f;

// A pass over kChains chains; returns something that depends on all of them.
using Fma = float (*)(long passes);
using Read = float (*)(const float* data, size_t count);  // count: a multiple of 256

struct Isa {
  const char* name;
  int lanes;
  Fma fma;
  Read read;
};

typedef float Vec4 __attribute__((vector_size(16)));

// Multiplication and addition where the processor's baseline has no fused one.
float fma_baseline(long passes) {
  Vec4 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = Vec4{} + static_cast<float>(i);
  for (long p = 0; p < passes; ++p) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * kScale + kShift;
  }
  Vec4 sum = {};
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  return sum[0] + sum[1] + sum[2] + sum[3];
}

float read_baseline(const float* data, size_t count) {
  Vec4 sum[8] = {};
  for (size_t k = 0; k < count; k += 32) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] += *reinterpret_cast<const Vec4*>(data + k + 4 * i);
  }
  Vec4 total = {};
  for (int i = 0; i < 8; ++i) total += sum[i];
  return total[0] + total[1] + total[2] + total[3];
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) float fma_avx2(long passes) {
  __m256 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = _mm256_set1_ps(static_cast<float>(i));
  const __m256 scale = _mm256_set1_ps(kScale), shift = _mm256_set1_ps(kShift);
  for (long p = 0; p < passes; ++p) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = _mm256_fmadd_ps(chain[i], scale, shift);
  }
  __m256 sum = _mm256_setzero_ps();
  for (int i = 0; i < kChains; ++i) sum = _mm256_add_ps(sum, chain[i]);
  return _mm256_cvtss_f32(sum);
}

__attribute__((target("avx2,fma"))) float read_avx2(const float* data, size_t count) {
  __m256 sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_ps();
  for (size_t k = 0; k < count; k += 64) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] = _mm256_add_ps(sum[i], _mm256_loadu_ps(data + k + 8 * i));
  }
  for (int i = 1; i < 8; ++i) sum[0] = _mm256_add_ps(sum[0], sum[i]);
  return _mm256_cvtss_f32(sum[0]);
}

__attribute__((target("avx512f"))) float fma_avx512(long passes) {
  __m512 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512 scale = _mm512_set1_ps(kScale), shift = _mm512_set1_ps(kShift);
  for (long p = 0; p < passes; ++p) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_fmadd_ps(chain[i], scale, shift);
  }
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < kChains; ++i) sum = _mm512_add_ps(sum, chain[i]);
  return _mm512_cvtss_f32(sum);
}

__attribute__((target("avx512f"))) float read_avx512(const float* data, size_t count) {
  __m512 sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = _mm512_setzero_ps();
  for (size_t k = 0; k < count; k += 128) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] = _mm512_add_ps(sum[i], _mm512_loadu_ps(data + k + 16 * i));
  }
  for (int i = 1; i < 8; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  return _mm512_cvtss_f32(sum[0]);
}
#endif

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = [] {
    std::vector<Isa> found = {{"baseline", 4, fma_baseline, read_baseline}};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back({"avx2", 8, fma_avx2, read_avx2});
    }
    if (__builtin_cpu_supports("avx512f")) found.push_back({"avx512", 16, fma_avx512, read_avx512});
#endif
    return found;
  }();
  return list;
}

volatile float sink;  // keeps the sums

// Runs work(thread) on every thread at once; returns the seconds from the common start to the last one's end.
template <class Work>
double together(int threads, const Work& work) {
  std::atomic<int> waiting{threads};
  Clock::time_point start;
  std::vector<std::thread> others;
  const auto body = [&](int thread) {
    if (waiting.fetch_sub(1) == 1) start = Clock::now();
    while (waiting.load(std::memory_order_acquire) > 0) std::this_thread::yield();
    work(thread);
  };
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
  body(0);
  for (auto& other : others) other.join();
  return seconds_since(start);
}

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kReadStep = 256;  // floats

}  // namespace

extern "C" {

int peak_isa_count() { return static_cast<int>(isas().size()); }

const char* peak_isa_name(int isa) { return isas()[isa].name; }

// GFLOP/s of `threads` threads that each multiply and add for about `seconds`.
double peak_fma(int isa, int threads, double seconds) {
  const Isa& it = isas()[isa];
  constexpr long kPasses = 20000;
  std::vector<long> rounds(threads, 0);
  const double elapsed = together(threads, [&](int thread) {
    const auto start = Clock::now();
    long done = 0;
    do {
      sink = it.fma(kPasses);
      ++done;
    } while (seconds_since(start) < seconds);
    rounds[thread] = done;
  });
  long total = 0;
  for (long r : rounds) total += r;
  return 2.0 * it.lanes * kChains * kPasses * static_cast<double>(total) / elapsed * 1e-9;
}

// A buffer on huge pages where the system grants them, every page written; null where memory is short.
void* peak_buffer(size_t bytes) {
  void* memory = std::aligned_alloc(kHugePage, (bytes + kHugePage - 1) / kHugePage * kHugePage);
  if (memory == nullptr) return nullptr;
#if defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  float* data = static_cast<float*>(memory);
  for (size_t k = 0; k < bytes / sizeof(float); ++k) data[k] = 1.0f;
  return memory;
}

// GB/s of `threads` threads that read the buffer once, each its own part.
double peak_read(int isa, int threads, const void* buffer, size_t bytes) {
  const Isa& it = isas()[isa];
  const float* data = static_cast<const float*>(buffer);
  const size_t part = bytes / sizeof(float) / threads / kReadStep * kReadStep;
  const double elapsed = together(threads, [&](int thread) { sink = it.read(data + thread * part, part); });
  return static_cast<double>(part * threads * sizeof(float)) / elapsed * 1e-9;
}
}
