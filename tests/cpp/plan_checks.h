// SPDX-License-Identifier: BSD-3-Clause
// Schedules, which are a pure function of the problem, the table's sizes and the number of workers.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "kernel_run.h"

namespace ffn_ops {

// A table of known sizes: a schedule needs no kernels.
inline KernelTable known_table() {
  KernelTable table = {};
  table.lanes = 8;
  table.mr = 6;
  table.nr_vectors = 2;
  table.axpy_rows = 8;
  table.bfloat16_kr = 2;
  return table;
}

// What a debugger prints: the problem, and the schedule that a table of known sizes leads to.
inline void test_printing() {
  const KernelTable table = known_table();
  Operand b[2];
  const auto expect_text = [&](const Gemm& g, const std::string& wanted) {
    const std::string printed = to_string(plan_products({g}, table, 1)[0][0]);
    if (printed != wanted && ++failures <= 20)
      std::printf("printed\n  %s\nin place of\n  %s\n", printed.c_str(), wanted.c_str());
  };
  Gemm g = product({40, 70, 131}, DType::kBFloat16);
  g.b = b;
  expect_text(g,
              "gemm: M 40, N 70, K 131, bfloat16, store; schedule: packed, first row 0, mr 6, nr 16, kr 2, "
              "7 panels of A, 5 of B, mc 7 panels, nc 5 panels");
  g.mixed = true;
  g.M = 100;
  g.K = 2048;
  expect_text(g,
              "gemm: M 70, N 100, K 2048, bfloat16, mixed, store; schedule: packed, transposed, first row 0, mr 6, "
              "nr 16, kr 1, 12 panels of A, 7 of B, mc 12 panels, nc 7 panels");
  g = product({40, 8, 131}, DType::kFloat32);
  g.b = b;
  expect_text(g,
              "gemm: M 8, N 40, K 131, float32, store; schedule: dot, transposed, first row 0, mr 8, nr 8, kr 1, "
              "1 panels of A, 5 of B, mc 1 panels, guided 1");
  g = product({2, 70, 131}, DType::kFloat32);
  g.b = b;
  g.num_b = 2;
  g.gated = true;
  g.epilogue.kind = Epilogue::Kind::kActivate;
  expect_text(g,
              "gemm: M 2, N 70, K 131, float32, activate, gated, 1 branches; schedule: dot, first row 0, mr 2, nr 8, "
              "kr 1, 1 panels of A, 9 of B, mc 1 panels, guided 1");
}

// A thread has a product to itself where there are so many that all threads end at about the same time.
inline void test_alone() {
  const KernelTable table = known_table();
  Operand b;
  std::vector<Gemm> products(16, product({70, 40, 131}, DType::kFloat32));
  for (Gemm& g : products) g.b = &b;
  const auto expect_alone = [&](int64_t workers, bool wanted) {
    const std::vector<std::vector<ScheduledGemm>> groups = plan_products(products, table, workers);
    bool right = groups.size() == 1 && groups[0].size() == products.size();
    for (const ScheduledGemm& g : groups[0]) right = right && g.alone == wanted;
    if (!right && ++failures <= 20) std::printf("alone: expected %d with %d workers\n", wanted, int(workers));
  };
  expect_alone(1, true);
  expect_alone(2, true);
  expect_alone(3, false);
  products[3].M *= 3;
  expect_alone(1, true);
  expect_alone(2, false);
}

// A product of few rows falls into tasks of columns, each of which packs its part of B once for all rows. More rows are
// cut where the columns do not suffice.
inline void test_few_rows() {
  const KernelTable table = known_table();
  Operand b;
  const auto expect_tasks = [&](int64_t M, int64_t workers, int64_t tasks_m, int64_t tasks_n) {
    Gemm g = product({M, 128, 2048}, DType::kFloat32);
    g.b = &b;
    g.epilogue.kind = Epilogue::Kind::kActivateGrad;  // never transposed
    const ScheduledGemm planned = plan_products({g}, table, workers)[0][0];
    if ((planned.tasks_m() != tasks_m || planned.tasks_n() != tasks_n) && ++failures <= 20)
      std::printf("%d rows on %d workers: %d by %d tasks, expected %d by %d\n", int(M), int(workers),
                  int(planned.tasks_m()), int(planned.tasks_n()), int(tasks_m), int(tasks_n));
  };
  expect_tasks(64, 1, 1, 1);
  expect_tasks(64, 2, 1, 8);
  expect_tasks(96, 2, 1, 8);
  expect_tasks(96, 4, 2, 8);
  expect_tasks(960, 2, 8, 1);
}

}  // namespace ffn_ops
