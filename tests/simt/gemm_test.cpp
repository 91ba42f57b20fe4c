// SPDX-License-Identifier: BSD-3-Clause
// The grouped products of csrc/cuda on the host: every instance and epilogue against naive loops in double, with poison
// wherever nothing may be read, under several orders of the threads.
#include "gemm_problem.h"

namespace gemm_test {
namespace {

int64_t instances_run[5][2][2][2] = {};  // way, outer, b_along_k, vector

// The tiles that a problem may be cut into.
template <class S>
std::vector<int> ways_of(const Problem<S>& problem) {
  std::vector<int> ways;
  for (int way = 0; way < int(std::size(kWays)); ++way)
    if (problem.takes(kWays[way])) ways.push_back(way);
  return ways;
}

template <class S>
void run(const Case& c) {
  Problem<S> problem(c);
  for (const int way : ways_of(problem)) {
    const GemmPlan plan = problem.run(kWays[way], c.seed);
    problem.check(kWays[way].name);
    ++instances_run[way][c.kind == Kind::kOuter][plan.b_along_k][plan.vector];
  }
}

constexpr Layout kLayouts[] = {Layout::kAligned, Layout::kOdd, Layout::kTransposed, Layout::kStrided};

template <class S>
void test_rows() {
  for (const Layout b : kLayouts)
    for (const Layout a : kLayouts) {
      if (a != Layout::kAligned && b != Layout::kAligned && a != b) continue;
      run<S>({.reason = "layouts of operands",
              .rows = {3, 67, 0, 9},
              .dropped = 2,
              .N = 131,
              .K = 75,
              .a = a,
              .b = b,
              .gather_a = b != a,
              .bias = a == b,
              .seed = 1 + uint64_t(a)});
    }
  run<S>({.reason = "one hot expert, a tile's width exactly",
          .rows = {0, 129, 0, 0},
          .N = 128,
          .K = 64,
          .gather_a = true});
  run<S>({.reason = "k shorter than a step", .rows = {1, 1, 1}, .dropped = 5, .N = 1, .K = 1, .bias = true});
  run<S>({.reason = "no k: the bias alone", .rows = {4, 2}, .N = 9, .K = 0, .bias = true});
  run<S>({.reason = "indices outside",
          .rows = {40, 1, 30},
          .dropped = 9,
          .N = 20,
          .K = 40,
          .gather_a = true,
          .wrong_indices = true,
          .odd_out = true});
  run<S>({.reason = "indices outside, element by element",
          .rows = {40, 1, 30},
          .dropped = 9,
          .N = 20,
          .K = 41,
          .a = Layout::kOdd,
          .gather_a = true,
          .wrong_indices = true});
  run<S>({.reason = "dense", .rows = {77}, .N = 33, .K = 50, .dense = true, .bias = true});
  run<S>({.reason = "scaled and unrounded", .rows = {40, 3}, .dropped = 5, .N = 21, .K = 50, .unrounded = true});
  run<S>({.reason = "another product joins",
          .rows = {40, 3},
          .dropped = 5,
          .N = 131,
          .K = 20,
          .bias = true,
          .added = true});
  run<S>({.reason = "no rows at all", .rows = {0, 0}, .N = 5, .K = 5});
  run<S>({.reason = "only dropped rows", .rows = {0, 0}, .dropped = 70, .N = 5, .K = 5});
}

template <class S>
void test_activate() {
  for (int activation = 0; activation < Activations::kSize; ++activation)
    run<S>({.reason = "every activation, gated",
            .rows = {3, 30},
            .dropped = 1,
            .N = 21,
            .K = 17,
            .finish = Finish::kActivate,
            .gated = true,
            .bias = true,
            .activation = activation});
  run<S>({.reason = "gated, gathered, two tiles of columns",
          .rows = {50, 0, 20},
          .dropped = 3,
          .N = 70,
          .K = 64,
          .gather_a = true,
          .finish = Finish::kActivate,
          .gated = true});
  run<S>({.reason = "gated, transposed weights",
          .rows = {5},
          .N = 72,
          .K = 33,
          .b = Layout::kTransposed,
          .finish = Finish::kActivate,
          .gated = true,
          .save = false});
  run<S>({.reason = "gated, element by element",
          .rows = {5, 7},
          .N = 67,
          .K = 33,
          .b = Layout::kOdd,
          .finish = Finish::kActivate,
          .gated = true,
          .bias = true,
          .odd_out = true});
  run<S>(
      {.reason = "plain", .rows = {9, 60}, .dropped = 2, .N = 130, .K = 20, .finish = Finish::kActivate, .bias = true});
  run<S>({.reason = "limited",
          .rows = {9, 30},
          .dropped = 2,
          .N = 70,
          .K = 20,
          .finish = Finish::kActivate,
          .gated = true,
          .bias = true,
          .limited = true});
  run<S>({.reason = "other products join gate and up",
          .rows = {9, 30},
          .dropped = 2,
          .N = 70,
          .K = 20,
          .finish = Finish::kActivate,
          .gated = true,
          .bias = true,
          .added = true});
  run<S>({.reason = "only pre-activations, for recomputation",
          .rows = {9, 6},
          .N = 13,
          .K = 20,
          .finish = Finish::kActivate,
          .gated = true,
          .act = false});
}

template <class S>
void test_activate_grad() {
  for (int activation = 0; activation < Activations::kSize; ++activation)
    run<S>({.reason = "gradient of every activation",
            .rows = {3, 30},
            .dropped = 1,
            .N = 21,
            .K = 17,
            .finish = Finish::kActivateGrad,
            .weighted = true,
            .activation = activation});
  run<S>({.reason = "weighted rows, three parts of dots",
          .rows = {20, 0, 50},
          .dropped = 4,
          .N = 261,
          .K = 36,
          .b = Layout::kTransposed,
          .gather_a = true,
          .finish = Finish::kActivateGrad,
          .weighted = true});
  run<S>({.reason = "weighted rows, odd outputs",
          .rows = {20, 3},
          .dropped = 4,
          .N = 150,
          .K = 36,
          .finish = Finish::kActivateGrad,
          .weighted = true,
          .odd_out = true,
          .h = false});
  run<S>({.reason = "plain, without weights",
          .rows = {20, 3},
          .N = 40,
          .K = 36,
          .finish = Finish::kActivateGrad,
          .save = false});
  run<S>({.reason = "another product joins the gradient",
          .rows = {20, 3},
          .dropped = 4,
          .N = 150,
          .K = 36,
          .finish = Finish::kActivateGrad,
          .weighted = true,
          .added = true});
  run<S>({.reason = "limited, in turns",
          .rows = {20, 3},
          .dropped = 4,
          .N = 150,
          .K = 36,
          .finish = Finish::kActivateGrad,
          .weighted = true,
          .limited = true,
          .interleaved = true});
  run<S>({.reason = "limited, in turns, odd outputs",
          .rows = {7},
          .dropped = 2,
          .N = 37,
          .K = 20,
          .finish = Finish::kActivateGrad,
          .odd_out = true,
          .limited = true,
          .interleaved = true});
}

template <class S>
void test_outer() {
  for (const Layout a : kLayouts)
    for (const Layout b : {Layout::kAligned, Layout::kOdd})
      run<S>({.reason = "outer, layouts of operands",
              .kind = Kind::kOuter,
              .rows = {3, 67, 0, 9},
              .dropped = 2,
              .M = 70,
              .N = 131,
              .a = a,
              .b = b,
              .gather_a = true,
              .gather_b = b != a,
              .seed = 1 + uint64_t(a)});
  run<S>({.reason = "outer, indices outside",
          .kind = Kind::kOuter,
          .rows = {40, 1, 30},
          .dropped = 9,
          .M = 131,
          .N = 20,
          .gather_b = true,
          .wrong_indices = true,
          .odd_out = true});
  run<S>({.reason = "outer, one hot expert", .kind = Kind::kOuter, .rows = {0, 0, 200, 0}, .M = 9, .N = 8});
  run<S>({.reason = "outer, no rows at all", .kind = Kind::kOuter, .rows = {0, 0}, .dropped = 5, .M = 4, .N = 3});
  run<S>({.reason = "outer, R = 0", .kind = Kind::kOuter, .rows = {0, 0}, .M = 4, .N = 3});
  run<S>({.reason = "outer, dense", .kind = Kind::kOuter, .rows = {65}, .M = 140, .N = 12, .dense = true});
}

// Shapes and layouts at random.
template <class S>
void test_random() {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    simt::Random random(seed);
    const auto below = [&](int64_t n) { return int64_t(random.below(size_t(n))); };
    Case c{.reason = "at random", .seed = seed};
    c.kind = below(3) == 0 ? Kind::kOuter : Kind::kRows;
    c.rows.clear();
    for (int64_t e = 1 + below(6); e > 0; --e) c.rows.push_back(random.coin() ? below(90) : below(3));
    c.dropped = below(3) * below(90);
    c.M = 1 + below(150);
    c.N = 1 + below(150);
    c.K = below(100);
    c.a = kLayouts[below(4)];
    c.b = random.coin() ? c.a : kLayouts[below(4)];
    c.gather_a = random.coin();
    c.gather_b = random.coin();
    if (c.kind == Kind::kRows) c.finish = Finish(below(3));
    c.gated = c.finish == Finish::kActivate && random.coin();
    c.bias = c.kind == Kind::kRows && c.finish != Finish::kActivateGrad && random.coin();
    c.weighted = random.coin();
    c.limited = c.gated || c.finish == Finish::kActivateGrad ? random.coin() : false;
    c.interleaved = c.finish == Finish::kActivateGrad && random.coin();
    c.odd_out = random.coin();
    c.added = c.kind == Kind::kRows && random.coin();
    c.activation = int(below(Activations::kSize));
    run<S>(c);
  }
}

template <class X>
bool same_bits(const std::vector<X>& a, const std::vector<X>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(X)) == 0);
}

// A row has the same bits alone and among others, in short and tall tiles, and however its operands lie in memory.
template <class S>
void test_invariance() {
  for (const auto& [finish, gated] : {std::pair{Finish::kActivate, true}, {Finish::kActivateGrad, false}}) {
    Case c{.reason = "same bits",
           .rows = {1},
           .N = 150,
           .K = 333,
           .finish = finish,
           .gated = gated,
           .weighted = finish == Finish::kActivateGrad};
    std::vector<S> bits;
    std::vector<ComputeOf<S>> sums;
    for (const Layout layout : {Layout::kAligned, Layout::kOdd}) {
      c.a = c.b = layout;
      Problem<S> alone(c);
      for (const int way : ways_of(alone)) {
        alone.run(kWays[way], 1 + uint64_t(way));
        std::vector<S> now = alone.bits();
        const auto now_sums = alone.sums();
        if (bits.empty()) bits = now, sums = now_sums;
        simt::check(same_bits(now, bits), "%s: a row depends on tiles or layout", kDTypeNames[int(Codec<S>::kDType)]);
        simt::check(same_bits(now_sums, sums), "%s: a dot depends on tiles or layout",
                    kDTypeNames[int(Codec<S>::kDType)]);
      }
    }
    c.a = c.b = Layout::kAligned;
    c.rows = {70};
    Problem<S> batch(c), alone(c);
    batch.run(kWays[1]);
    for (const int64_t r : {0, 1, 37, 69}) {
      alone.keep_row(r);
      alone.run(kWays[0], uint64_t(r));
      simt::check(alone.row(r) == batch.row(r), "%s: row %lld has other bits in a batch",
                  kDTypeNames[int(Codec<S>::kDType)], (long long)r);
    }
  }
}

void test_expert_tiles() {
  const auto table_of = [](const std::vector<int64_t>& values, int64_t R, int64_t tile_rows) {
    const int64_t E = int64_t(values.size()) - 1;
    const int64_t entries = tile_rows ? max_row_tiles(R, E, tile_rows) : E;
    simt::Buffer<int64_t> offsets(values), scratch(2 * E + 4);
    simt::Buffer<RowTile> table(entries);
    simt::launch({1, kTableThreads, kTableSharedBytes, 3}, &expert_tiles_kernel<>, offsets.data(), E, R, tile_rows,
                 entries, scratch.data(), table.data());
    return std::vector<RowTile>(table.begin(), table.end());
  };
  // Offsets that fall, leave [0, R] or do not begin at 0 are held there: rows come in order, each once.
  for (const auto& offsets : std::vector<std::vector<int64_t>>{{0, 5, 3, 9},
                                                               {0, -4, 200, 7},
                                                               {0, INT64_MAX, 0, 0},
                                                               {0, 0, 0, INT64_MIN},
                                                               {7, 9, 30, 40},
                                                               {60, 60, 60, 60}}) {
    int64_t next = 0;
    for (const RowTile& t : table_of(offsets, 50, 16)) {
      if (t.rows == 0) continue;
      simt::check(t.row == next && t.rows > 0 && t.rows <= 16 && t.expert >= 0 && t.expert <= 3, "a tile is not held");
      next += t.rows;
    }
    simt::check(next == 50, "tiles end at row %lld of 50", (long long)next);
  }
  // More experts than threads, in order for kRows and with most rows first for kOuter.
  for (const int64_t E : {kTableThreads + 3, int(kMostRanked) + 1}) {
    std::vector<int64_t> offsets = {0};
    for (int64_t e = 0; e < E; ++e) offsets.push_back(offsets.back() + e % 5);
    int64_t next = 0;
    for (const RowTile& t : table_of(offsets, offsets.back() + 2, 4)) {
      if (t.rows == 0) continue;
      simt::check(t.row == next && (t.expert == E || (offsets[size_t(t.expert)] <= t.row &&
                                                      t.row + t.rows <= offsets[size_t(t.expert) + 1])),
                  "tile at row %lld of %lld experts", (long long)t.row, (long long)E);
      next += t.rows;
    }
    simt::check(next == offsets.back() + 2, "tiles of %lld experts", (long long)E);
    std::vector<bool> seen(static_cast<size_t>(E));
    int64_t before = INT64_MAX;
    for (const RowTile& t : table_of(offsets, offsets.back(), 0)) {
      simt::check(t.rows <= before || E > kMostRanked, "not the largest expert first");
      simt::check(t.rows == t.expert % 5 && !seen[size_t(t.expert)], "expert %lld twice", (long long)t.expert);
      seen[size_t(t.expert)] = true;
      before = t.rows;
    }
  }
}

template <class S>
void test_dtype() {
  test_rows<S>();
  test_activate<S>();
  test_activate_grad<S>();
  test_outer<S>();
  test_random<S>();
  test_invariance<S>();
  for (int way = 0; way < (sizeof(S) == 2 ? 5 : 2); ++way)
    for (const int vector : {0, 1}) {
      if (!vector && kWays[way].hopper && kWays[way].shape != GemmShape::kShort) continue;
      simt::check(instances_run[way][1][0][vector] > 0, "an outer instance was not run");
      for (const int along_k : {0, 1})
        simt::check(instances_run[way][0][along_k][vector] > 0, "an instance was not run");
    }
  std::memset(instances_run, 0, sizeof(instances_run));
}

}  // namespace
}  // namespace gemm_test

int main() {
  gemm_test::test_expert_tiles();
  gemm_test::test_dtype<float>();
  gemm_test::test_dtype<double>();
  gemm_test::test_dtype<ffn_ops::BFloat16>();  // float16's products are those of simt_test and wgmma_test, the rest is
                                               // the same
  return simt::report("gemm_test");
}
