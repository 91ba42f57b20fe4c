// SPDX-License-Identifier: BSD-3-Clause
// Products for the kernel tests: a plain description, and a run as the scheduler would make it.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "../../csrc/cpu/plan.h"
#include "kernel_buffer.h"

namespace ffn_ops {

struct Shape {
  int64_t M, N, K;
};

inline void run(const KernelTable& table, const Gemm& whole, int64_t workers = 2) {
  std::vector<ScheduledGemm> parts;
  for (const std::vector<ScheduledGemm>& group : plan_products({whole}, table, workers))
    parts.insert(parts.end(), group.begin(), group.end());
  for (ScheduledGemm& g : parts) {
    std::vector<char> packed(static_cast<size_t>(g.panels_m * g.mr * g.packed_length() * g.element()));
    std::vector<double> scratch(static_cast<size_t>(gemm_scratch_bytes(g, table)) / sizeof(double) + 1,
                                std::numeric_limits<double>::quiet_NaN());
    g.packed_a = packed.data();
    // Last panels first: a store over a panel's end must not touch its neighbour.
    for (int64_t c = g.k_blocks() - 1; c >= 0; --c)
      for (int64_t p = g.panels_m - 1; p >= 0; --p) table.pack_a(g, c, p, p + 1);
    if (g.kernel == Schedule::Kernel::kPacked) {  // all panels at once are the same
      std::vector<char> together(packed.size());
      g.packed_a = together.data();
      for (int64_t c = 0; c < g.k_blocks(); ++c) table.pack_a(g, c, 0, g.panels_m);
      if (together != packed && ++failures <= 20) std::printf("packed together: %s\n", to_string(g).c_str());
      g.packed_a = packed.data();
    }
    for (int64_t t = 0; t < g.tasks_m() * g.tasks_n(); ++t) table.gemm(g, t, scratch.data());
  }
}

inline Gemm product(const Shape& s, DType dtype) {
  Gemm g;
  g.M = s.M;
  g.N = s.N;
  g.K = s.K;
  g.epilogue.dtype = dtype;
  g.epilogue.out_stride = s.N;
  return g;
}

}  // namespace ffn_ops
