// SPDX-License-Identifier: BSD-3-Clause
// Element-wise passes over a matrix, cut into tasks.
#pragma once

#include <algorithm>

#include "ops.h"

namespace ffn_ops {

// Rows, or the columns of a few long rows, in tasks of about 32 Ki elements. The cut depends on shapes and strides
// alone.
class ElementwiseTasks {
 public:
  // Rows that lie without a gap, in every operand, become one row.
  explicit ElementwiseTasks(GatedAct& g) {
    if (g.rows == 0 || g.cols == 0) return;
    const bool flat = [&] {
      for (const Matrix* m : {&g.gate, &g.up, &g.d_out, &g.dd_gate, &g.dd_up})
        if (m->data && (m->col_stride != 1 || m->row_stride != g.cols)) return false;
      return true;
    }();
    if (flat) {
      g.cols *= g.rows;
      g.rows = 1;
    }
    rows_ = g.rows;
    cols_ = g.cols;
    col_step_ = std::min(cols_, kGrainSize);
    row_step_ = std::max<int64_t>(1, kGrainSize / cols_);
    col_tasks_ = divide_up(cols_, col_step_);
    count_ = divide_up(rows_, row_step_) * col_tasks_;
  }

  int64_t count() const { return count_; }

  template <class Run>
  void run(const Run& kernel) const {
    if (count_ == 0) return;
    Phases phases;
    phases.add(count_, [&](int64_t task, int64_t) {
      const int64_t r = task / col_tasks_ * row_step_, c = task % col_tasks_ * col_step_;
      kernel(Range{r, std::min(rows_, r + row_step_), c, std::min(cols_, c + col_step_)}, task);
    });
    phases.run(workers_for(static_cast<double>(count_), 1, threads()));
  }

 private:
  static constexpr int64_t kGrainSize = 1 << 15;
  int64_t rows_ = 0, cols_ = 0, row_step_ = 1, col_step_ = 1, col_tasks_ = 0, count_ = 0;
};

inline void run_elementwise(GatedAct& g, void (*kernel)(const GatedAct&, const Range&)) {
  g.nontemporal = past_caches(g.rows * g.cols * storage_size(g.gate.dtype));
  ElementwiseTasks(g).run([&](const Range& range, int64_t) { kernel(g, range); });
}

}  // namespace ffn_ops
