// SPDX-License-Identifier: BSD-3-Clause
// What this machine can do: float32 multiply-adds per second for each instruction set, and bytes read per second.
// Compiled by peak.py at first use, together with csrc/cpu/isa/*.cpp, so one build runs on every x86-64.
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <thread>
#include <vector>

#include "peak.h"

namespace {

using namespace ffn_ops;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct NamedPeak {
  const char* name;
  const Peak& peak;
};

const std::vector<NamedPeak>& isas() {
  static const std::vector<NamedPeak> list = [] {
    std::vector<NamedPeak> found;
#define FFN_OPS_ADD(name, ...) \
  if (isa_supported(Isa::name)) found.push_back({#name, name::kPeak});
    FFN_OPS_BUILT_ISAS(FFN_OPS_ADD)
#undef FFN_OPS_ADD
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
  const Peak& it = isas()[isa].peak;
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
  const Peak& it = isas()[isa].peak;
  const float* data = static_cast<const float*>(buffer);
  const size_t part = bytes / sizeof(float) / threads / kReadStep * kReadStep;
  const double elapsed = together(threads, [&](int thread) { sink = it.read(data + thread * part, part); });
  return static_cast<double>(part * threads * sizeof(float)) / elapsed * 1e-9;
}
}
