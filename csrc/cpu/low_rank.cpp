// SPDX-License-Identifier: BSD-3-Clause
// Adapters of experts: products with a short side, gradients of factors, and factors that are turned. See experts.h.
#include <algorithm>

#include "experts.h"

namespace ffn_ops {
namespace {

constexpr int64_t kTaskWork = int64_t{1} << 18;  // multiplications of a task of a product with a short side

// Between what is turned for two experts: a power of two would map rows of all experts to one set of the cache.
int64_t padded(int64_t elements) { return divide_up(elements, 16) * 16 + 16; }

// That of an expert, without its place.
ShortOuter short_outer(const Segment& s, int64_t M, int64_t N, const RowsOf& a, const RowsOf& b, DType dtype) {
  ShortOuter p;
  p.rows = s.rows();
  p.M = M;
  p.N = N;
  p.a = a(s);
  p.b = b(s);
  p.dtype = dtype;
  return p;
}

// b of an adapter [E, N, rank], of an expert with rows. Where it is turned, its elements follow each other along N if
// that is asked for.
StackedWeight add_factor(Steps& steps, Workspace& workspace, Experts& c, const LowRank& lora, bool along_rows) {
  if (lora.rank == 0) return nullptr;
  if (!is_expert_last(*lora.b)) return stacked(*lora.b, lora.dtype);
  constexpr int64_t kElements = 8192;  // of a task
  const DType arithmetic = arithmetic_dtype(c.dtype);
  const int64_t rank = lora.rank, N = lora.b->size(1), E = c.E, stride = padded(N * rank);
  const auto bytes = static_cast<int64_t>(c.segments.size()) * stride * storage_size(arithmetic);
  void* turned = workspace.take(static_cast<size_t>(bytes), "b of adapters");
  const void* data = lora.b->const_data_ptr();
  const KernelTable& table = kernels();
  const int64_t parts = along_rows ? rank : 1, rows = along_rows ? N : N * rank;  // a part has one k, or all of them
  const int64_t most = std::max<int64_t>(1, kElements / E / 64) * 64, cuts = divide_up(rows, most);
  steps.beside(parts * cuts, [=, &c, &lora, &table](int64_t task, int64_t) {
    const int64_t k = task / cuts, begin = task % cuts * most;
    Turn t;
    t.in = dense(advance(data, k * E, lora.dtype), parts * E, lora.dtype);
    t.to = c.segment_of.data();
    t.out = advance(turned, k * N, arithmetic);
    t.out_stride = stride;
    t.dtype = arithmetic;
    table.turn(t, {begin, std::min(rows, begin + most), 0, E});
  });
  return [=, &c](int64_t e, int64_t row, int64_t col) {
    Matrix m = dense(advance(turned, c.segment_of[static_cast<size_t>(e)] * stride, arithmetic), rank, arithmetic);
    if (along_rows) {
      m.row_stride = 1;
      m.col_stride = N;
    }
    m.data = advance(m.data, row * m.row_stride + col * m.col_stride, arithmetic);
    return m;
  };
}

}  // namespace

void add_factors(Steps& steps, Workspace& workspace, Experts& c, bool along_rows) {
  c.lora_b_in = add_factor(steps, workspace, c, c.lora_in, along_rows && !c.interleaved);
  c.lora_b_down = add_factor(steps, workspace, c, c.lora_down, along_rows);
}

const void* add_short_product(Steps& steps, Workspace& workspace, Experts& c, const RowsOf& rows, int64_t K,
                              int64_t rank, const WeightsFrom& weights, double scale, const char* name) {
  const DType arithmetic = arithmetic_dtype(c.dtype);
  void* out = take_rows(workspace, c, rank, arithmetic, name);
  // Rows of one expert, as many as are worth reading its factor for.
  struct Task {
    size_t product;
    int64_t begin, end;
  };
  const int64_t most = std::max<int64_t>(16, kTaskWork / std::max<int64_t>(1, K * rank));
  std::vector<ShortProduct> products;
  std::vector<Task> tasks;
  for (const Segment& s : c.segments) {
    ShortProduct p;
    p.K = K;
    p.N = rank;
    p.rows = rows(s);
    p.b = weights(s.expert, 0);
    p.scale = scale;
    p.out = advance(out, s.begin * rank, arithmetic);
    for (int64_t r = 0; r < s.rows(); r += most) tasks.push_back({products.size(), r, std::min(s.rows(), r + most)});
    products.push_back(p);
  }
  const KernelTable& table = kernels();
  const auto count = static_cast<int64_t>(tasks.size());
  const auto ahead = static_cast<size_t>(threads());
  steps.beside(count, [=, &table, products = std::move(products), tasks = std::move(tasks)](int64_t task, int64_t) {
    const Task& at = tasks[static_cast<size_t>(task)];
    ShortProduct p = products[at.product];
    if (at.begin == 0 && at.product + ahead < products.size()) p.next = &products[at.product + ahead].b;
    table.short_product(p, at.begin, at.end);
  });
  return out;
}

SmallRows add_down_projection(Steps& steps, Workspace& workspace, Experts& c, const LowRank& lora,
                              const StackedWeight& b, const RowsOf& rows) {
  if (lora.rank == 0) return {};
  const void* small = add_short_product(steps, workspace, c, rows, lora.a->size(2), lora.rank,
                                        rows_of(stacked(*lora.a, lora.dtype)), lora.scale, "a row times a^T");
  return {small, lora.rank, rows_of(b)};
}

void add_short_outer_products(Steps& steps, Experts& c, int64_t M, int64_t N, const RowsOf& a, const RowsOf& b,
                              DType dtype, void* out) {
  struct Task {
    size_t product;
    Range range;
  };
  const int64_t bytes = M * N * storage_size(dtype), rank = std::max<int64_t>(1, std::min(M, N));
  const int64_t length = std::max(M, N);
  std::vector<ShortOuter> products;
  std::vector<Task> tasks;
  for (const Segment& s : c.segments) {
    ShortOuter p = short_outer(s, M, N, a, b, dtype);
    p.out = static_cast<char*>(out) + s.expert * bytes;
    const int64_t most = std::max<int64_t>(1, kTaskWork / (p.rows * rank) / 64) * 64;  // of the long side
    for (int64_t i = 0; i < length; i += most) {
      const int64_t end = std::min(length, i + most);
      tasks.push_back({products.size(), M < N ? Range{0, M, i, end} : Range{i, end, 0, N}});
    }
    products.push_back(p);
  }
  const KernelTable& table = kernels();
  const auto count = static_cast<int64_t>(tasks.size());
  steps.beside(count, [&table, products = std::move(products), tasks = std::move(tasks)](int64_t task, int64_t) {
    const Task& at = tasks[static_cast<size_t>(task)];
    table.short_outer(products[at.product], at.range);
  });
  const std::vector<char*> empty = without_rows(c, out, bytes);
  steps.beside(static_cast<int64_t>(empty.size()), zeros_of(empty, bytes));
}

void add_short_outer_products_expert_last(Steps& steps, Workspace& workspace, Experts& c, int64_t M, int64_t rank,
                                          const RowsOf& a, const RowsOf& b, DType dtype, void* out) {
  constexpr int64_t kExperts = 16;    // of a task: a cache line of float32
  constexpr int64_t kElements = 512;  // of each of them: all are in L1 until they are turned
  const DType arithmetic = arithmetic_dtype(c.dtype);
  const int64_t rows = std::max<int64_t>(1, kElements / rank), stride = padded(rows * rank);
  const int64_t scratch_bytes = kExperts * stride * storage_size(arithmetic);
  char* scratch = static_cast<char*>(workspace.take(static_cast<size_t>(threads() * scratch_bytes), "d_b of adapters"));
  std::vector<ShortOuter> products;
  for (const Segment& s : c.segments) products.push_back(short_outer(s, M, rank, a, b, arithmetic));
  const KernelTable& table = kernels();
  const int64_t groups = divide_up(c.E, kExperts);
  steps.beside(groups * divide_up(M, rows), [=, &c, &table, products = std::move(products)](int64_t task, int64_t w) {
    const int64_t begin = task / groups * rows, end = std::min(M, begin + rows);
    const int64_t first = task % groups * kExperts, count = std::min(c.E, first + kExperts) - first;
    char* const own = scratch + w * scratch_bytes;
    int64_t from[kExperts];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t segment = c.segment_of[static_cast<size_t>(first + i)];
      from[i] = segment < 0 ? -1 : i;
      if (segment < 0) continue;
      ShortOuter p = products[static_cast<size_t>(segment)];
      p.out = advance(static_cast<void*>(own), i * stride - begin * rank, arithmetic);
      table.short_outer(p, {begin, end, 0, rank});
    }
    Turn t;
    t.in = dense(own, stride, arithmetic);
    t.from = from;
    t.out = advance(out, begin * rank * c.E + first, dtype);
    t.out_stride = c.E;
    t.dtype = dtype;
    table.turn(t, {0, count, 0, (end - begin) * rank});
  });
}

}  // namespace ffn_ops
