// SPDX-License-Identifier: BSD-3-Clause
// Threads of one operator call: phases of tasks in a single parallel region. It never changes a bit of a result.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "memory.h"
#include "plan.h"

namespace ffn_ops {

// As many workers as `work` fills with `least` each, of `threads`; 1 where it is too little to wake them. A parallel
// region of torch wakes all of its threads, however few get work, so the more there are, the more work they need.
inline int64_t workers_for(double work, double least, int64_t threads) {
  const auto filled = static_cast<int64_t>(work / least);
  return filled < 2 + threads / 8 ? 1 : std::min(filled, threads);
}

// Tasks of a phase start when every task of the phases before it has ended. One parallel region; workers take the next
// task as they become free. Which worker runs a task never matters to its result.
class Phases {
 public:
  using Task = std::function<void(int64_t task, int64_t worker)>;
  void add(int64_t tasks, Task run);
  void run(int64_t workers) const;

 private:
  struct Phase {
    int64_t begin;
    int64_t end;
    Task run;
  };
  std::vector<Phase> phases_;
};

// The steps of one call in order: products, which it cuts into tiles, and plain passes. Products of one step do not
// depend on each other. Packed A operands live only for their step, so all share one region.
class Steps {
 public:
  Steps(const KernelTable& table, Workspace& workspace, int64_t threads)
      : table_(table), workspace_(workspace), threads_(threads) {}
  void product(const Gemm& g) { products({g}); }
  void products(const std::vector<Gemm>& gemms);
  void pass(int64_t tasks, Phases::Task run);
  // A pass that shares a phase with the next step, or with its packing where that step is products: one wait less.
  // Those products and all later steps may use its results; a pass that shares the phase may not.
  void beside(int64_t tasks, Phases::Task run);
  // What was added beside nothing yet ends here.
  void join() { pass(0, nullptr); }
  void run();

 private:
  struct Step {
    std::vector<Gemm> gemms;  // scheduled by run(), which knows how many workers all steps fill
    int64_t tasks;
    Phases::Task task;
    enum class Kind { kProducts, kPass, kBeside } kind;
  };
  void add_phase(Phases& phases, int64_t tasks, Phases::Task run);
  void add_products(std::vector<ScheduledGemm>& gemms, Phases& phases, char* packed, char* scratch,
                    size_t scratch_bytes, int64_t workers);
  void add_products_alone(std::vector<ScheduledGemm>& gemms, Phases& phases, char* packed, size_t packed_each,
                          char* scratch, size_t scratch_bytes);

  const KernelTable& table_;
  Workspace& workspace_;
  int64_t threads_;
  std::vector<Step> steps_;
  std::vector<std::pair<int64_t, Phases::Task>> beside_;  // that wait for the next phase
};

}  // namespace ffn_ops
