// See schedule.h. The only file that owns threads and memory; kernels get pointers and ranges.
#include "schedule.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

#include <torch/csrc/stable/ops.h>

namespace ffn_ops {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kKeepBytes = size_t{128} << 20;
constexpr int64_t kPackedBytes = int64_t{32} << 20;
constexpr int64_t kTileBytes = int64_t{1} << 20;  // partial sums of one task: they stay in L2 or L3
constexpr int64_t kGroupLanes = 256;              // columns of B that a task packs at a time: 256 KiB in L2

std::mutex kept_mutex;
void* kept_data = nullptr;
size_t kept_bytes = 0;

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }
int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
  constexpr size_t kWorthwhile = size_t{4} << 20;
  if (bytes < kWorthwhile) return;
  const auto begin = round_up(reinterpret_cast<uintptr_t>(data), kHugePage);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
#ifdef MADV_HUGEPAGE
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Workspace::Block Workspace::fresh(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(kept_mutex);
    if (kept_data && kept_bytes >= bytes) {
      const Block block{static_cast<char*>(kept_data), kept_bytes};
      kept_data = nullptr;
      kept_bytes = 0;
      return block;
    }
  }
  bytes = round_up(bytes, kHugePage);
  void* data = std::aligned_alloc(kHugePage, bytes);
  if (!data) throw std::bad_alloc();
  advise_huge_pages(data, bytes);
  return {static_cast<char*>(data), bytes};
}

void* Workspace::take(size_t bytes) {
  bytes = round_up(std::max<size_t>(bytes, 1), 128);
  if (blocks_.empty() || used_ + bytes > blocks_.back().bytes) {
    blocks_.push_back(fresh(bytes));
    used_ = 0;
  }
  void* data = blocks_.back().data + used_;
  used_ += bytes;
  total_ += bytes;
  return data;
}

Workspace::~Workspace() {
  // One block large enough for the whole call serves the next one; several are replaced by one such.
  if (blocks_.size() > 1 && total_ <= kKeepBytes) {
    for (const Block& block : blocks_) std::free(block.data);
    const size_t bytes = round_up(total_, kHugePage);
    void* data = std::aligned_alloc(kHugePage, bytes);
    blocks_.clear();
    if (!data) return;
    advise_huge_pages(data, bytes);
    blocks_.push_back({static_cast<char*>(data), bytes});
  }
  for (const Block& block : blocks_) {
    void* unwanted = block.data;
    if (block.bytes <= kKeepBytes) {
      const std::lock_guard<std::mutex> lock(kept_mutex);
      if (block.bytes > kept_bytes) {
        unwanted = kept_data;
        kept_data = block.data;
        kept_bytes = block.bytes;
      }
    }
    std::free(unwanted);
  }
}

void Phases::add(int64_t tasks, Task run) {
  const int64_t begin = phases_.empty() ? 0 : phases_.back().end;
  phases_.push_back({begin, begin + tasks, std::move(run)});
}

void Phases::run(int64_t workers) const {
  if (phases_.empty()) return;
  if (workers <= 1) {
    for (const Phase& phase : phases_)
      for (int64_t t = phase.begin; t < phase.end; ++t) phase.run(t - phase.begin, 0);
    return;
  }
  // Tasks are handed out in order, so whoever waits for an earlier phase waits for tasks that are already running:
  // this ends even where all workers run one after the other on a single thread.
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  const auto work = [&](int64_t worker) {
    size_t p = 0;
    for (;;) {
      const int64_t t = next.fetch_add(1, std::memory_order_relaxed);
      if (t >= phases_.back().end) return;
      while (t >= phases_[p].end) ++p;
      for (int spins = 0; done.load(std::memory_order_acquire) < phases_[p].begin; ++spins)
        if (spins > 2000) std::this_thread::yield();
      phases_[p].run(t - phases_[p].begin, worker);
      done.fetch_add(1, std::memory_order_release);
    }
  };
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work(worker);
  });
}

void Steps::pass(int64_t tasks, Phases::Task run) { steps_.push_back({{}, tasks, std::move(run)}); }

// Rows [begin, end) of a product.
Gemm slice_rows(const Gemm& g, int64_t begin, int64_t end) {
  Gemm part = g;
  part.M = end - begin;
  Matrix& a = part.a.matrix;
  if (a.rows && !part.a.k_along_rows) {
    a.rows += begin;
  } else {
    const int64_t step = part.a.k_along_rows ? a.col_stride : a.row_stride;
    a.data = static_cast<const char*>(a.data) + begin * step * storage_size(a.dtype);
  }
  Epilogue& e = part.epilogue;
  const auto advance = [&](void* p, int64_t stride) -> void* {
    return p ? static_cast<char*>(p) + begin * stride * storage_size(e.dtype) : nullptr;
  };
  e.out = advance(e.out, e.out_stride);
  e.out_up = advance(e.out_up, e.out_stride);
  e.gate = advance(e.gate, e.pre_stride);
  e.up = advance(e.up, e.pre_stride);
  return part;
}

void Steps::product(Gemm g) {
  if (g.M == 0 || g.N == 0) return;
  const int64_t element = compute_size(g.wide);
  const int64_t fit_rows = kPackedBytes / std::max<int64_t>(1, g.K * element);
  const int64_t fit = std::max<int64_t>(1, fit_rows / table_.tile_rows) * table_.tile_rows;
  if (g.M > fit) {
    const int64_t rows = divide_up(divide_up(g.M, divide_up(g.M, fit)), table_.tile_rows) * table_.tile_rows;
    for (int64_t m = 0; m < g.M; m += rows) product(slice_rows(g, m, std::min(g.M, m + rows)));
    return;
  }
  const int64_t lanes = table_.lanes * 4 / element;
  g.panels_m = divide_up(g.M, table_.tile_rows);
  g.panel_rows = divide_up(g.M, g.panels_m);
  g.panels_m = divide_up(g.M, g.panel_rows);
  g.panels_n = divide_up(g.N, g.gated ? lanes : 2 * lanes);

  // A few rows: weights are streamed, each read once, so a task takes whole rows of them from end to end.
  const bool streamed = g.panels_m == 1 && !g.b[0].k_along_rows;
  g.group_n = streamed ? 1 : std::min(g.panels_n, std::max<int64_t>(1, kGroupLanes * 4 / element / (2 * lanes)));
  const int64_t tile = g.panel_rows * 2 * lanes * element;
  int64_t most = std::max<int64_t>(1, kTileBytes / (tile * g.group_n));
  if (workers_ > 1) {
    const int64_t cuts = divide_up(4 * workers_, g.tasks_n());
    most = std::min(most, std::max<int64_t>(1, divide_up(g.panels_m, cuts)));
  }
  g.block_m = divide_up(g.panels_m, divide_up(g.panels_m, most));
  steps_.push_back({g, 0, nullptr});
}

void Steps::run() {
  size_t packed_bytes = 0;
  size_t scratch_bytes = 0;
  double work = 0;
  for (const Step& step : steps_) {
    if (step.task) continue;
    const Gemm& g = step.gemm;
    const size_t bytes = static_cast<size_t>(g.panels_m * g.panel_rows * g.K * compute_size(g.wide)) + kPanelPad;
    packed_bytes = std::max(packed_bytes, bytes);
    scratch_bytes = std::max(scratch_bytes, round_up(gemm_scratch_bytes(g, table_), 4096));
    work += static_cast<double>(g.M) * static_cast<double>(g.N * std::max<int64_t>(g.K, 1));
  }
  constexpr double kParallelWork = 1 << 17;  // multiply-adds worth waking a second thread for
  const int64_t workers = work < kParallelWork && !steps_.empty() ? 1 : workers_;
  char* packed = static_cast<char*>(workspace_.take(packed_bytes));
  char* scratch = static_cast<char*>(workspace_.take(scratch_bytes * static_cast<size_t>(workers)));

  Phases phases;
  for (Step& step : steps_) {
    if (step.task) {
      phases.add(step.tasks, step.task);
      continue;
    }
    Gemm& g = step.gemm;
    g.packed_a = packed;
    const int64_t bundle = std::max<int64_t>(1, std::min<int64_t>(16, divide_up(g.panels_m, 4 * workers)));
    phases.add(divide_up(g.panels_m, bundle), [this, &g, bundle](int64_t task, int64_t) {
      table_.pack_a(g, task * bundle, std::min(g.panels_m, (task + 1) * bundle));
    });
    phases.add(g.tasks_m() * g.tasks_n(), [this, &g, scratch, scratch_bytes](int64_t task, int64_t worker) {
      table_.gemm(g, task, scratch + static_cast<size_t>(worker) * scratch_bytes);
    });
  }
  phases.run(workers);
}

}  // namespace ffn_ops
