// SPDX-License-Identifier: BSD-3-Clause
// CUDA kernels on the host: csrc/cuda/device.cuh includes it if FFN_OPS_SIMT is defined. A kernel's threads are fibers
// of one OS thread, blocks run one after the other; this file holds the scheduler, builtins.h the functions that
// kernels call. Built with the address sanitizer.
//
// Order is random but follows from the seed. In some blocks one warp runs ahead as far as it can, in others
// all warps advance equally. A thread runs without interruption to its next barrier or warp-wide function, so a missing
// barrier gives a wrong result, or reads poison, under some seed. Code that hangs or is undefined on a GPU throws here:
// a barrier or warp-wide function that not every thread reaches, or that threads reach at different places.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "fiber.h"

namespace simt {

struct Dim {
  unsigned x;
};

}  // namespace simt

// One block runs at a time, and one thread of it: plain variables, set at each switch.
inline simt::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Grid {
  int64_t blocks = 1;
  int threads = 32;
  int64_t shared_bytes = 0;
  uint64_t seed = 1;
};

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxShared = 227 * 1024;  // of sm_90
constexpr size_t kMaxParameters = 4096;     // bytes of arguments to a kernel
using Place = std::source_location;

inline std::string format(const char* text, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(line, sizeof(line), text, arguments);
  va_end(arguments);
  return line;
}

inline std::string name_of(const void* function) {
  char name[512] = "";  // one byte on: the sanitizer takes it for a place to return to
  __sanitizer_symbolize_pc(static_cast<char*>(const_cast<void*>(function)) + 1, "%f", name, sizeof(name));
  return name;
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return static_cast<size_t>((next() >> 32) * n >> 32); }  // n < 2^32
  bool coin() { return next() >> 63; }

 private:
  uint64_t state_;
};

// One cp.async in flight.
struct Copy {
  char* to;
  const char* from;
  size_t bytes;
  int64_t group;
  bool read;  // already, into `data`
  alignas(16) char data[16];
};

// One wgmma in flight.
struct Product {
  void (*run)(const Product&);
  float* sums;
  uint64_t a, b;
  int64_t group;
};

struct Thread {
  std::unique_ptr<Fiber> fiber = std::make_unique<Fiber>();
  enum class State { kRunnable, kAtBarrier, kInWarp, kReturned } state;
  const char* function;  // where it waits, and from which place it was called
  Place place;
  void* exchange;  // what it gives to the warp and gets back
  std::vector<Copy> copies;
  int64_t groups;  // committed so far
  std::vector<Product> products;
  int64_t product_groups;
};

// A block of a running kernel.
class Block {
 public:
  Block(const Grid& grid, const void* kernel, void (*call)(void*), void* arguments)
      : grid_(grid), kernel_(kernel), call_(call), arguments_(arguments) {
    // The margins are never accessible. 1024 bytes is what device.cuh declares; the memory is aligned to no more.
    memory_.resize(static_cast<size_t>(kMargin + 2 * kAlign + grid.shared_bytes + kMargin));
    const auto start = reinterpret_cast<uintptr_t>(memory_.data()) + kMargin;
    shared_ = memory_.data() + kMargin + (2 * kAlign - start % (2 * kAlign)) % (2 * kAlign) + kAlign;
    while (pool().size() < static_cast<size_t>(grid.threads)) pool().emplace_back();
  }
  Block(const Block&) = delete;
  ~Block() {
    __asan_unpoison_memory_region(memory_.data(), memory_.size());
    running() = nullptr;
  }

  static Block*& running() {
    static Block* block = nullptr;
    return block;
  }

  void run(unsigned index) {
    running() = this;
    random_ = Random(grid_.seed * 0x100000001b3u + index);
    one_ahead_ = random_.coin();
    blockIdx = {index};
    __asan_unpoison_memory_region(memory_.data(), memory_.size());
    std::memset(shared_, 0xff, static_cast<size_t>(grid_.shared_bytes));
    __asan_poison_memory_region(memory_.data(), static_cast<size_t>(shared_ - memory_.data()));
    char* end = shared_ + grid_.shared_bytes;
    __asan_poison_memory_region(end, static_cast<size_t>(memory_.data() + memory_.size() - end));
    runnable_.clear();
    std::fill_n(arrived_, kMaxThreads / kWarp, 0);
    for (unsigned t = 0; t < static_cast<unsigned>(grid_.threads); ++t) {
      Thread& thread = pool()[t];
      thread.fiber->prepare(enter);
      thread.copies.clear();
      thread.groups = 0;
      thread.products.clear();
      thread.product_groups = 0;
      wake(t);
    }
    shuffle(0);
    while (!runnable_.empty()) {
      std::swap(runnable_[one_ahead_ ? runnable_.size() - 1 : random_.below(runnable_.size())], runnable_.back());
      current_ = runnable_.back();
      runnable_.pop_back();
      threadIdx = {current_};
      switch_context(scheduler_, pool()[current_].fiber->context());
      if (!error_.empty()) stop();
      if (runnable_.empty()) open_barrier();
    }
  }

  // ---- called by fibers ----

  Thread& thread() { return pool()[current_]; }
  char* shared() { return shared_; }
  bool coin() { return random_.coin(); }

  bool in_shared(const void* p, int64_t bytes) const {
    return p >= shared_ && static_cast<const char*>(p) + bytes <= shared_ + grid_.shared_bytes;
  }

  void barrier(const Place& place) { wait(Thread::State::kAtBarrier, "__syncthreads", place); }

  // The warp's 32 lanes each give one `Lane`; when all are there, `combine(lanes)` sets in each what it gets back.
  template <class Lane, class Combine>
  void exchange(const char* function, const Place& place, Lane& mine, Combine combine) {
    const unsigned first = current_ / kWarp * kWarp;
    Thread* warp = &pool()[first];
    thread().exchange = &mine;
    thread().function = function;
    thread().place = place;
    thread().state = Thread::State::kInWarp;
    if (++arrived_[first / kWarp] == kWarp) {
      arrived_[first / kWarp] = 0;
      Lane* lanes[kWarp];
      for (int lane = 0; lane < kWarp; ++lane) {
        if (!same_place(warp[lane], thread())) fail(function, "the lanes of a warp are at different functions");
        lanes[lane] = static_cast<Lane*>(warp[lane].exchange);
      }
      combine(lanes);
      for (unsigned lane = 0; lane < kWarp; ++lane) wake(first + lane);
      shuffle(runnable_.size() - kWarp);
    }
    switch_context(thread().fiber->context(), scheduler_);
  }

  // Stops the launch with an error that the calling thread made. Its frames are abandoned: no std::string in them.
  [[noreturn]] void fail(const char* function, const char* what) {
    error_ = format("%s: %s; seen by thread %u", function, what, current_);
    switch_context(thread().fiber->context(), scheduler_);
    std::abort();
  }

 private:
  static constexpr int64_t kMargin = 1 << 14, kAlign = 1024;

  // Stacks outlive launches: making one costs more than running a small kernel.
  static std::vector<Thread>& pool() {
    static std::vector<Thread> threads;
    return threads;
  }

  // Never returns, so the sanitizer must not mark its frame: the next call finds the stack clean.
  [[gnu::noinline, gnu::no_sanitize("address")]] static void enter() {
    running()->call();
    switch_context(running()->thread().fiber->context(), running()->scheduler_, true);
  }
  [[gnu::noinline]] void call() {
    entered(scheduler_);
    call_(arguments_);
    thread().state = Thread::State::kReturned;
  }

  static bool same_place(const Thread& a, const Thread& b) {
    return a.function == b.function && a.place.line() == b.place.line() && a.place.column() == b.place.column() &&
           std::strcmp(a.place.file_name(), b.place.file_name()) == 0;
  }

  void wait(Thread::State state, const char* function, const Place& place) {
    thread().state = state;
    thread().function = function;
    thread().place = place;
    switch_context(thread().fiber->context(), scheduler_);
  }

  void wake(unsigned t) {
    pool()[t].state = Thread::State::kRunnable;
    runnable_.push_back(t);
  }

  void shuffle(size_t first) {
    for (size_t i = runnable_.size(); i > first + 1; --i)
      std::swap(runnable_[i - 1], runnable_[first + random_.below(i - first)]);
  }

  // No thread can continue: all have returned, or all wait at one barrier, or the kernel is wrong.
  void open_barrier() {
    const auto threads = static_cast<unsigned>(grid_.threads);
    unsigned returned = 0;
    for (unsigned t = 0; t < threads; ++t) returned += pool()[t].state == Thread::State::kReturned;
    if (returned == threads) return;
    for (unsigned t = 0; t < threads; ++t) {
      if (pool()[t].state == Thread::State::kAtBarrier && same_place(pool()[t], pool()[0])) continue;
      error_ = "not every thread reaches the same __syncthreads, or not every lane of a warp the same function";
      stop();
    }
    for (unsigned t = 0; t < threads; ++t) wake(t);
    shuffle(0);
  }

  // Ends the launch with an error that lists where its threads wait, each place once.
  [[noreturn]] void stop() {
    std::string text = name_of(kernel_) + format(": %s; block %u of %u, seed %llu", error_.c_str(), blockIdx.x,
                                                 gridDim.x, static_cast<unsigned long long>(grid_.seed));
    const auto describe = [&](const Thread& t) -> std::string {
      if (t.state == Thread::State::kReturned) return "returned";
      if (t.state == Thread::State::kRunnable) return "running";
      return format("in %s at %s:%u", t.function, t.place.file_name(), t.place.line());
    };
    std::vector<std::string> seen;
    for (unsigned t = 0; t < static_cast<unsigned>(grid_.threads); ++t) {
      const std::string state = describe(pool()[t]);
      pool()[t].fiber->unpoison();
      if (std::find(seen.begin(), seen.end(), state) != seen.end()) continue;
      seen.push_back(state);
      text += format("\n  thread %u and others: ", t) + state;
    }
    throw Error(text);
  }

  const Grid& grid_;
  const void* kernel_;
  void (*call_)(void*);
  void* arguments_;
  std::vector<char> memory_;
  char* shared_;
  Context scheduler_;
  Random random_{0};
  bool one_ahead_ = false;
  std::vector<unsigned> runnable_;  // the next one to run is the last, or any
  unsigned current_ = 0;
  int arrived_[kMaxThreads / kWarp];  // lanes of each warp that wait at its function
  std::string error_;
};

// Runs kernel<<<blocks, threads, shared_bytes>>>(args...), blocks in random order.
template <class... Parameters, class... Args>
void launch(const Grid& grid, void (*kernel)(Parameters...), Args&&... args) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...) && (sizeof(Parameters) + ... + 0) <= kMaxParameters);
  const auto address = reinterpret_cast<const void*>(kernel);
  if (grid.blocks < 1 || grid.threads < 1 || grid.threads > kMaxThreads || grid.threads % kWarp != 0 ||
      grid.shared_bytes < 0 || grid.shared_bytes > kMaxShared)
    throw Error(name_of(address) + format(": cannot launch %lld blocks of %d threads and %lld shared bytes",
                                          static_cast<long long>(grid.blocks), grid.threads,
                                          static_cast<long long>(grid.shared_bytes)));
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {std::forward<Args>(args)...}};
  blockDim = {static_cast<unsigned>(grid.threads)};
  gridDim = {static_cast<unsigned>(grid.blocks)};
  Block block(
      grid, address, [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->parameters); },
      &call);
  std::vector<unsigned> order(static_cast<size_t>(grid.blocks));
  for (unsigned i = 0; i < gridDim.x; ++i) order[i] = i;
  Random random(grid.seed);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  for (const unsigned index : order) block.run(index);
}

}  // namespace simt

#include "builtins.h"
