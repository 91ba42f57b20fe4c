// SPDX-License-Identifier: BSD-3-Clause
// See plan.h.
#include "plan.h"

#include <algorithm>
#include <utility>

namespace ffn_ops {
namespace {

constexpr int64_t kPackedBytes = int64_t{32} << 20;  // a packed A operand, shared by all tasks
constexpr int64_t kTileBytes = int64_t{1} << 20;     // partial sums of one task: they stay in L2 or L3
constexpr int64_t kGroupBytes = int64_t{256} << 10;  // packed B of one task: it stays in L2
constexpr int64_t kShares = 8;                       // products of a worker that end at about the same time
constexpr int64_t kLongK = 1024;
constexpr int64_t kLongPiece = 2048;  // elements of a row of weights that are read together

// The shared packed operand should be the small one: a plain product with more rows than columns is computed as its
// transpose. Every element is the same sum in the same order, and a product of two factors does not know their order.
// The transpose writes parts of cache lines, which costs more than it saves where k is below kLongK, unless most of a
// tile's width would stay empty otherwise, as with a router's logits or x times an adapter's a.
ScheduledGemm small_operand_first(const Gemm& wanted, const KernelTable& table) {
  ScheduledGemm g{wanted, {}};
  const bool narrow = g.N * 2 * g.element() <= table.nr_vectors * table.lanes * 4;
  if (g.epilogue.kind != Epilogue::Kind::kStore || g.epilogue.small || g.M <= g.N || (g.K < kLongK && !narrow))
    return g;
  if (g.quantised()) return g;  // packed, a quantised weight would be as large as the dequantised one
  std::swap(g.M, g.N);
  g.transposed = true;
  return g;
}

// Rows [begin, end) of a product.
ScheduledGemm slice_rows(const ScheduledGemm& g, int64_t begin, int64_t end) {
  ScheduledGemm part = g;
  part.M = end - begin;
  part.first_row = begin;
  Epilogue& e = part.epilogue;
  const auto advance = [&](void* p, int64_t stride, DType dtype) -> void* {
    return p ? static_cast<char*>(p) + begin * stride * storage_size(dtype) : nullptr;
  };
  const int64_t out_rows = begin * (g.transposed ? 1 : e.out_stride);
  e.out = static_cast<char*>(e.out) + (e.out ? out_rows * storage_size(e.out_dtype()) : 0);
  e.out_up = advance(e.out_up, e.out_stride, e.dtype);
  e.gate = advance(e.gate, e.pre_stride, e.dtype);
  e.up = advance(e.up, e.pre_stride, e.dtype);
  e.h = advance(e.h, e.pre_stride, e.h_dtype());
  e.small = advance(const_cast<void*>(e.small), e.rank, e.arithmetic());
  if (e.row_weight) {
    e.row_weight = static_cast<const char*>(e.row_weight) + begin * g.element();
    e.row_dots = static_cast<char*>(e.row_dots) + begin * e.row_dots_stride * g.element();
  }
  return part;
}

Schedule::Kernel choose_kernel(const ScheduledGemm& g, const KernelTable& table) {
  if (g.M > kSmallM || g.K == 0) return Schedule::Kernel::kPacked;
  if (g.transposed) {
    const bool rows = !g.a.k_along_rows && g.a.matrix.col_stride == 1 && !g.a.matrix.rows && g.num_b == 1;
    return rows && g.M <= kDotRows ? Schedule::Kernel::kDot : Schedule::Kernel::kPacked;
  }
  for (int64_t i = 0; i < g.num_b; ++i) {
    const Operand& b = g.b[i];
    if (b.k_along_rows != g.b[0].k_along_rows || b.matrix.col_stride != 1 || b.matrix.rows)
      return Schedule::Kernel::kPacked;
  }
  if (g.b[0].k_along_rows) return g.gated ? Schedule::Kernel::kPacked : Schedule::Kernel::kAxpy;
  if (!g.gated && g.num_b > 1) return Schedule::Kernel::kPacked;
  if (g.M <= (g.quantised() ? table.code_rows : table.mr)) return Schedule::Kernel::kDot;
  if (g.quantised()) return Schedule::Kernel::kPacked;  // a code becomes a float once for all rows
  return g.M <= kBroadcastVectors * table.lanes * 4 / g.element() ? Schedule::Kernel::kBroadcast
                                                                  : Schedule::Kernel::kPacked;
}

// `tasks`: how many the product should fall into at least. `alone`: see Schedule.
void fill_schedule(ScheduledGemm& g, const KernelTable& table, int64_t workers, int64_t tasks, bool alone) {
  const int64_t lanes = table.lanes * 4 / g.element();
  const int64_t width = table.nr_vectors * lanes;
  g.kernel = choose_kernel(g, table);
  g.alone = alone;
  g.at_once = alone ? 1 : workers;
  const int64_t rows = g.kernel == Schedule::Kernel::kAxpy  ? table.axpy_rows
                       : g.kernel == Schedule::Kernel::kDot ? g.M
                                                            : table.mr;
  g.mr =
      g.kernel == Schedule::Kernel::kBroadcast ? divide_up(g.M, lanes) * lanes : divide_up(g.M, divide_up(g.M, rows));
  if (g.kernel == Schedule::Kernel::kDot && g.quantised() && g.M > table.mr) g.mr = divide_up(g.M, 8) * 8;
  g.panels_m = divide_up(g.M, g.mr);
  g.nr = g.gated ? width / 2 : width;
  if (g.kernel == Schedule::Kernel::kDot || g.kernel == Schedule::Kernel::kBroadcast) {
    g.guided = workers == 1 ? 1 : std::max<int64_t>(2, tasks / 2);
    // Of kActivateGrad the tile is whole, for row_dots; codes need several vectors of rows at a time, as each reads
    // little.
    const bool codes = g.kernel == Schedule::Kernel::kDot && g.quantised();
    if (g.epilogue.kind != Epilogue::Kind::kActivateGrad && !codes) g.nr = lanes;
  }
  g.panels_n = divide_up(g.N, g.nr);

  const int64_t panel = width * g.element() * g.steps(std::clamp<int64_t>(g.b_length(), 1, kKC));
  g.nc_panels = std::clamp<int64_t>(kGroupBytes / panel, 1, g.panels_n);
  // A few rows: weights are read once, so a task takes whole rows of them from end to end, or long pieces.
  const bool by_rows = g.M <= kSmallM && !(g.transposed ? g.a : g.b[0]).k_along_rows;
  if (by_rows) g.nc_panels = 1;
  if (g.kernel == Schedule::Kernel::kAxpy)
    g.nc_panels = std::clamp<int64_t>(divide_up(g.panels_n, divide_up(tasks, 4)), 1, divide_up(kLongPiece, width));
  // Few rows: each cut of them would pack B once more, while narrower groups read A panels, from L2, more often.
  if (tasks > 1 && g.kernel == Schedule::Kernel::kPacked && g.panels_m <= kL2Panels && g.K >= kShortK)
    g.nc_panels = std::clamp<int64_t>(g.panels_n / tasks, 1, g.nc_panels);
  // Sums that wait for their next block of k stay near the core; short ones are written as they come, whole rows at a
  // time.
  const bool waiting = g.k_blocks() * g.branches() > 1;
  const int64_t tile = g.mr * width * g.element();
  int64_t most = waiting || g.K < kShortK ? std::max<int64_t>(1, kTileBytes / (tile * g.nc_panels)) : g.panels_m;
  if (tasks > 1) {
    const int64_t cuts = divide_up(tasks, g.tasks_n());
    most = std::min(most, std::max<int64_t>(1, divide_up(g.panels_m, cuts)));
  }
  g.mc_panels =
      by_rows || g.kernel == Schedule::Kernel::kAxpy ? g.panels_m : divide_up(g.panels_m, divide_up(g.panels_m, most));
}

void add_parts(const Gemm& wanted, const KernelTable& table, int64_t workers, int64_t tasks, bool alone,
               std::vector<ScheduledGemm>& parts) {
  ScheduledGemm g = small_operand_first(wanted, table);
  if (g.in_bfloat16()) g.kr = table.bfloat16_kr;
  const int64_t fit_rows = kPackedBytes / std::max<int64_t>(1, g.packed_length() * g.element());
  const int64_t fit = std::max<int64_t>(1, fit_rows / table.mr) * table.mr;
  const int64_t rows = divide_up(divide_up(g.M, divide_up(g.M, fit)), table.mr) * table.mr;
  for (int64_t m = 0; m < g.M; m += rows) {
    parts.push_back(slice_rows(g, m, std::min(g.M, m + rows)));
    fill_schedule(parts.back(), table, workers, tasks, alone);
  }
}

}  // namespace

std::vector<std::vector<ScheduledGemm>> plan_products(const std::vector<Gemm>& wanted, const KernelTable& table,
                                                      int64_t workers) {
  std::vector<const Gemm*> order;
  for (const Gemm& g : wanted)
    if (g.M > 0 && g.N > 0) order.push_back(&g);
  if (order.empty()) return {};
  // The largest first, so that no worker starts with it while the others have nothing left.
  const auto work = [](const Gemm* g) { return g->M * g->N * std::max<int64_t>(1, g->K); };
  if (workers > 1)
    std::stable_sort(order.begin(), order.end(), [&](const Gemm* a, const Gemm* b) { return work(a) > work(b); });
  const int64_t tasks = workers > 1 ? divide_up(4 * workers, static_cast<int64_t>(order.size())) : 1;
  int64_t all = 0, most = 0;  // bytes of the largest A
  for (const Gemm* g : order) {
    all += work(g);
    most = std::max(most, g->M * g->K * g->element());
  }
  const bool alone = workers == 1 || (work(order.front()) * kShares * workers <= all && most * workers <= kPackedBytes);
  std::vector<std::vector<ScheduledGemm>> groups;
  int64_t bytes = 0;
  for (const Gemm* g : order) {
    std::vector<ScheduledGemm> parts;
    add_parts(*g, table, workers, tasks, alone, parts);
    for (const ScheduledGemm& part : parts) {
      if (groups.empty() || (!alone && bytes + packed_bytes(part) > kPackedBytes)) {
        groups.emplace_back();
        bytes = 0;
      }
      bytes += packed_bytes(part);
      groups.back().push_back(part);
    }
  }
  return groups;
}

std::string to_string(const Gemm& g) {
  constexpr const char* kinds[] = {"store", "activate", "activate_grad"};
  std::string text = "gemm: M " + std::to_string(g.M) + ", N " + std::to_string(g.N) + ", K " + std::to_string(g.K);
  text += std::string(", ") + kDTypeNames[static_cast<int>(g.epilogue.dtype)] + (g.mixed ? ", mixed" : "");
  text += std::string(", ") + kinds[static_cast<int>(g.epilogue.kind)];
  if (g.gated) text += ", gated, " + std::to_string(g.branches()) + " branches";
  else if (g.num_b > 1) text += ", " + std::to_string(g.num_b) + " operands along k";
  return text;
}

std::string to_string(const Schedule& s) {
  constexpr const char* kernels[] = {"packed", "dot", "broadcast", "axpy"};
  const auto number = [](const char* before, int64_t value) { return before + std::to_string(value); };
  return std::string("schedule: ") + kernels[static_cast<int>(s.kernel)] + (s.transposed ? ", transposed" : "") +
         number(", first row ", s.first_row) + number(", mr ", s.mr) + number(", nr ", s.nr) + number(", kr ", s.kr) +
         number(", ", s.panels_m) + number(" panels of A, ", s.panels_n) + number(" of B, mc ", s.mc_panels) +
         (s.guided ? number(" panels, guided ", s.guided) : number(" panels, nc ", s.nc_panels) + " panels");
}

std::string to_string(const ScheduledGemm& g) {
  return to_string(static_cast<const Gemm&>(g)) + "; " + to_string(static_cast<const Schedule&>(g));
}

}  // namespace ffn_ops
