// SPDX-License-Identifier: BSD-3-Clause
// The machine's limits, measured: float32 multiply-adds per second of each instruction set, and bytes read per second.
// The threads are its own: it measures the machine, not torch's pool.
#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace ffn_ops {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kReadStep = 256;  // floats: a multiple of what a pass of peak_read takes

volatile float sink;  // keeps the sums

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

const KernelTable& table_of(const std::string& name) {
  const IsaChoice choice = choose_isa(name.c_str());
  STD_TORCH_CHECK(choice.error.empty(), choice.error);
  return *kernel_table(choice.isa);
}

// Runs work(thread) on every thread at once; returns the seconds from the common start to the last one's end.
template <class Work>
double together(int64_t threads, const Work& work) {
  std::atomic<int64_t> waiting{threads};
  Clock::time_point start;
  std::vector<std::thread> others;
  const auto body = [&](int64_t thread) {
    if (waiting.fetch_sub(1) == 1) start = Clock::now();
    while (waiting.load(std::memory_order_acquire) > 0) std::this_thread::yield();
    work(thread);
  };
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(body, t);
  body(0);
  for (auto& other : others) other.join();
  return seconds_since(start);
}

// GFLOP/s of `threads` threads that each multiply and add for about `seconds`.
double peak_fma(std::string isa, int64_t threads, double seconds) {
  const KernelTable& table = table_of(isa);
  constexpr int64_t kPasses = 20000;
  std::vector<int64_t> rounds(threads, 0);
  const double elapsed = together(threads, [&](int64_t thread) {
    const auto start = Clock::now();
    int64_t done = 0;
    do {
      sink = table.peak_fma(kPasses);
      ++done;
    } while (seconds_since(start) < seconds);
    rounds[thread] = done;
  });
  int64_t total = 0;
  for (const int64_t each : rounds) total += each;
  return 2.0 * table.lanes * kPeakChains * kPasses * static_cast<double>(total) / elapsed * 1e-9;
}

// GB/s of `threads` threads that read the buffer once, each its own part.
double peak_read(const Tensor& buffer, std::string isa, int64_t threads) {
  const KernelTable& table = table_of(isa);
  const float* data = static_cast<const float*>(buffer.const_data_ptr());
  const int64_t part = buffer.numel() / threads / kReadStep * kReadStep;
  const double elapsed = together(threads, [&](int64_t thread) { sink = table.peak_read(data + thread * part, part); });
  return static_cast<double>(part * threads) * sizeof(float) / elapsed * 1e-9;
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CompositeExplicitAutograd, m) { m.impl("_peak_fma", TORCH_BOX(&ffn_ops::peak_fma)); }
STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) { m.impl("_peak_read", TORCH_BOX(&ffn_ops::peak_read)); }
