// SPDX-License-Identifier: BSD-3-Clause
// See parallel.h. The only file that owns threads; kernels get pointers and ranges.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include <torch/csrc/stable/ops.h>

namespace ffn_ops {
namespace {

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

// Task `task` of several items with `ends[i]` tasks up to and with item i.
struct TaskOf {
  size_t item;
  int64_t task;
};
TaskOf find_task(const std::vector<int64_t>& ends, int64_t task) {
  const auto item = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), task) - ends.begin());
  return {item, item ? task - ends[item - 1] : task};
}

// Weights that a product reads, each as often as it takes that time: up to 8 rows take about the time of reading them.
double work_of(const Gemm& g) {
  if (g.M <= 0) return 0;
  const auto weights = static_cast<double>(g.N * std::max<int64_t>(g.K, 1) * (g.gated ? g.num_b : 1));
  return weights * std::max(1.0, static_cast<double>(g.M) / 8);
}

// Work of this size, about 10 microseconds, is worth another thread.
constexpr double kWorkerWeights = 1 << 16;

// The shared operand, if it is one row that packing would only copy; else null.
void* packed_row(const ScheduledGemm& g) {
  const Operand& shared = g.transposed ? g.b[0] : g.a;
  const Matrix& m = shared.matrix;
  if (g.kernel != Schedule::Kernel::kDot || g.M != 1 || shared.k_along_rows || m.col_stride != 1) return nullptr;
  if (m.dtype != g.epilogue.arithmetic()) return nullptr;
  const int64_t row = m.rows ? m.rows[g.first_row] : g.first_row;
  return static_cast<char*>(const_cast<void*>(m.data)) + row * m.row_stride * g.element();
}

constexpr int kLooks = 2000;            // before a thread sleeps: about as long as waking it takes, or a little longer
constexpr int64_t kLongWait = 500'000;  // nanoseconds: tasks are shorter, so a worker that takes that long does not run
constexpr int64_t kLateRegion = 2'000'000;   // the same of torch's region, whose threads may have to be woken,
constexpr int kLateRegions = 2;              // in so many calls that follow each other
constexpr int64_t kAlone = 32;               // times such a wait is how long callers then work alone,
constexpr int64_t kMostAlone = 100'000'000;  // nanoseconds, at most
std::atomic<int64_t> alone_until{0};
std::atomic<int> late_regions{0};

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Returns when `value` is at least `least`, which whoever reaches it notifies. Gives the nanoseconds that it slept.
int64_t wait_for(const std::atomic<int64_t>& value, int64_t least) {
  for (int i = 0; i < kLooks; ++i) {
    if (value.load(std::memory_order_acquire) >= least) return 0;
    relax();
  }
  const int64_t begun = now();
  for (int64_t seen; (seen = value.load(std::memory_order_acquire)) < least;)
    value.wait(seen, std::memory_order_acquire);
  return now() - begun;
}

}  // namespace

void Phases::add(int64_t tasks, Task run) {
  const int64_t begin = phases_.empty() ? 0 : phases_.back().end;
  phases_.push_back({begin, begin + tasks, std::move(run)});
}

void Phases::run(int64_t workers) const {
  if (phases_.empty()) return;
  int64_t most = 1;
  for (const Phase& phase : phases_) most = std::max(most, phase.end - phase.begin);
  workers = std::min(workers, most);
  const int64_t begun = workers > 1 ? now() : 0;
  if (workers <= 1 || begun < alone_until.load(std::memory_order_relaxed)) {
    for (const Phase& phase : phases_)
      for (int64_t t = phase.begin; t < phase.end; ++t) phase.run(t - phase.begin, 0);
    return;
  }
  // A worker takes a task only when its phase has begun. So one that the system does not run holds at most a task that
  // it has begun, and the others take all that is left. This ends even if all workers run one after the other on a
  // single thread: the tasks of an earlier phase have all been taken, so they run.
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::atomic<int64_t> ended{0};
  int64_t waited = 0, inside = 0;  // nanoseconds of the caller: for workers, and in all within torch's region
  const auto work = [&](int64_t worker) {
    size_t p = 0;
    for (;;) {
      int64_t t = next.load(std::memory_order_relaxed);
      if (t >= phases_.back().end) return;
      while (t >= phases_[p].end) ++p;
      const int64_t slept = wait_for(done, phases_[p].begin);
      if (worker == 0) waited += slept;
      if (!next.compare_exchange_strong(t, t + 1, std::memory_order_relaxed)) continue;
      phases_[p].run(t - phases_[p].begin, worker);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == phases_[p].end) done.notify_all();
    }
  };
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const int64_t entered = begin == 0 ? now() : 0;
    for (int64_t worker = begin; worker < end; ++worker) work(worker);
    // The end of torch's parallel region looks for the others for milliseconds before it sleeps. This thread sleeps
    // sooner: its core is then free for one that waits for a core.
    if (ended.fetch_add(end - begin, std::memory_order_acq_rel) + end - begin == workers) ended.notify_all();
    if (begin != 0) return;
    waited += wait_for(ended, workers);
    inside = now() - entered;
  });
  // Other processes keep the cores busy: for some time a call takes less on this thread alone.
  const int64_t at = now(), region = at - begun - inside;  // torch's region begins and ends when all its threads come
  const int late = region > kLateRegion ? late_regions.load(std::memory_order_relaxed) + 1 : 0;
  late_regions.store(late, std::memory_order_relaxed);
  if ((waited > kLongWait && 3 * waited > at - begun) || late >= kLateRegions)
    alone_until.store(at + std::min(kAlone * std::max(waited, region), kMostAlone), std::memory_order_relaxed);
}

void Steps::pass(int64_t tasks, Phases::Task run) { steps_.push_back({{}, tasks, std::move(run), Step::Kind::kPass}); }

void Steps::beside(int64_t tasks, Phases::Task run) {
  steps_.push_back({{}, tasks, std::move(run), Step::Kind::kBeside});
}

void Steps::products(const std::vector<Gemm>& gemms) { steps_.push_back({gemms, 0, nullptr, Step::Kind::kProducts}); }

// A phase of these tasks and of those that wait.
void Steps::add_phase(Phases& phases, int64_t tasks, Phases::Task run) {
  if (tasks > 0) beside_.emplace_back(tasks, std::move(run));
  if (beside_.empty()) return;
  if (beside_.size() == 1) {
    phases.add(beside_[0].first, std::move(beside_[0].second));
  } else {
    std::vector<int64_t> ends;
    std::vector<Phases::Task> runs;
    int64_t all = 0;
    for (auto& [count, task] : beside_) {
      ends.push_back(all += count);
      runs.push_back(std::move(task));
    }
    phases.add(all, [ends = std::move(ends), runs = std::move(runs)](int64_t task, int64_t worker) {
      const TaskOf at = find_task(ends, task);
      runs[at.item](at.task, worker);
    });
  }
  beside_.clear();
}

// Each product by one worker, whose caches hold what it packs.
void Steps::add_products_alone(std::vector<ScheduledGemm>& gemms, Phases& phases, char* packed, size_t packed_each,
                               char* scratch, size_t scratch_bytes) {
  add_phase(phases, 0, nullptr);
  phases.add(static_cast<int64_t>(gemms.size()), [=, this, &gemms](int64_t product, int64_t worker) {
    ScheduledGemm& g = gemms[static_cast<size_t>(product)];
    g.packed_a = packed_row(g);
    if (product + 1 < static_cast<int64_t>(gemms.size())) g.then = &g + 1;
    if (!g.packed_a) {
      g.packed_a = packed + static_cast<size_t>(worker) * packed_each;
      for (int64_t k = 0; k < g.k_blocks(); ++k) table_.pack_a(g, k, 0, g.panels_m);
    }
    for (int64_t task = 0; task < g.tasks_m() * g.tasks_n(); ++task)
      table_.gemm(g, task, scratch + static_cast<size_t>(worker) * scratch_bytes);
  });
}

void Steps::add_products(std::vector<ScheduledGemm>& gemms, Phases& phases, char* packed, char* scratch,
                         size_t scratch_bytes, int64_t workers) {
  const auto count = static_cast<int64_t>(gemms.size());
  std::vector<int64_t> grain(gemms.size());  // A panels of a packing task
  std::vector<int64_t> pack_ends, gemm_ends;
  int64_t packing = 0, multiplying = 0;
  for (size_t i = 0; i < gemms.size(); ++i) {
    ScheduledGemm& g = gemms[i];
    gemm_ends.push_back(multiplying += g.tasks_m() * g.tasks_n());
    g.packed_a = packed_row(g);
    if (g.packed_a) {
      pack_ends.push_back(packing);
      continue;
    }
    g.packed_a = packed;
    packed += packed_bytes(g);
    // Panels are cut from rows along k in whole pages, from columns in long runs of each row.
    const bool by_rows = (g.transposed ? g.b[0] : g.a).k_along_rows;
    const int64_t even_grain = divide_up(count * g.panels_m * g.k_blocks(), 4 * workers);
    grain[i] = std::min(g.panels_m, std::min<int64_t>(by_rows ? 96 : 16, even_grain));
    pack_ends.push_back(packing += g.k_blocks() * divide_up(g.panels_m, grain[i]));
  }
  add_phase(phases, packing, [this, &gemms, grain, pack_ends](int64_t task, int64_t) {
    const TaskOf at = find_task(pack_ends, task);
    const ScheduledGemm& g = gemms[at.item];
    const int64_t grains = divide_up(g.panels_m, grain[at.item]);
    const int64_t begin = at.task % grains * grain[at.item];
    table_.pack_a(g, at.task / grains, begin, std::min(g.panels_m, begin + grain[at.item]));
  });
  phases.add(multiplying, [this, &gemms, gemm_ends, scratch, scratch_bytes](int64_t task, int64_t worker) {
    const TaskOf at = find_task(gemm_ends, task);
    table_.gemm(gemms[at.item], at.task, scratch + static_cast<size_t>(worker) * scratch_bytes);
  });
}

void Steps::run() {
  double work = 0;
  for (const Step& step : steps_)
    for (const Gemm& g : step.gemms) work += work_of(g);
  const int64_t workers = workers_for(work, kWorkerWeights, threads_);

  size_t most_packed = 0;  // of products that workers share
  size_t packed_each = 0;  // of one that a worker computes alone
  size_t scratch_bytes = 0;
  std::vector<std::vector<std::vector<ScheduledGemm>>> plans;  // the groups of each step
  for (const Step& step : steps_) {
    plans.push_back(plan_products(step.gemms, table_, workers));
    for (const std::vector<ScheduledGemm>& group : plans.back()) {
      size_t packed = 0;
      for (const ScheduledGemm& g : group) {
        if (g.alone) packed_each = std::max(packed_each, round_up(packed_bytes(g), 4096));
        else packed += static_cast<size_t>(packed_bytes(g));
        scratch_bytes = std::max(scratch_bytes, round_up(gemm_scratch_bytes(g, table_), 4096));
      }
      most_packed = std::max(most_packed, packed);
    }
  }
  most_packed = std::max(most_packed, packed_each * static_cast<size_t>(workers));
  char* packed = static_cast<char*>(workspace_.take(most_packed, "packed operands"));
  char* scratch =
      static_cast<char*>(workspace_.take(scratch_bytes * static_cast<size_t>(workers), "scratch of each thread"));

  Phases phases;
  for (size_t i = 0; i < steps_.size(); ++i) {
    Step& step = steps_[i];
    for (std::vector<ScheduledGemm>& group : plans[i]) {
      if (group[0].alone) add_products_alone(group, phases, packed, packed_each, scratch, scratch_bytes);
      else add_products(group, phases, packed, scratch, scratch_bytes, workers);
    }
    if (step.kind == Step::Kind::kPass) add_phase(phases, step.tasks, std::move(step.task));
    else if (step.tasks > 0) beside_.emplace_back(step.tasks, std::move(step.task));
  }
  add_phase(phases, 0, nullptr);
  phases.run(workers);
}

}  // namespace ffn_ops
