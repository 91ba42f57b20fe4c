// SPDX-License-Identifier: BSD-3-Clause
// sort.cuh on the host: the sort of routed rows and the rounding of tokens give bit for bit what the CPU's do, written
// here once more in the plainest way, for random and for senseless entries.
#include "../../csrc/cuda/sort.cuh"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "problems.h"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::Buffer;
using simt::check;
using simt::Random;

template <class Entries>
void run(const SortPlan& plan, const Entries& entries, uint64_t seed) {
  for (int i = 0; i < plan.passes; ++i) {
    const SortPass& pass = plan.pass[i];
    simt::launch({pass.chunks, kSortThreads, pass.count_shared(), seed}, sort_count_kernel<Entries>, entries, pass);
    simt::launch({pass.scans.count, kScanThreads, kScanShared, seed}, scan_kernel<kScanThreads>, pass.scans);
    simt::launch({pass.chunks, kSortThreads, pass.scatter_shared(), seed}, sort_scatter_kernel<Entries>, entries, pass);
  }
}

void clear(const SortPlan& plan) {
  for (const auto& c : plan.clear)
    if (c.bytes > 0) std::memset(c.data, 0, size_t(c.bytes));
}

// ---- the sort -------------------------------------------------------------------------------------------------------

struct Shape {
  const char* name;
  int64_t T, E, K;
  bool token;
  int64_t capacity;
  bool by_weight;
};

template <class W>
struct Sorted {
  std::vector<W> weight;
  std::vector<int64_t> token, offsets, row, slot_offsets, counts, place;
};

// As csrc/cpu/routing.cpp has it, without its haste.
template <class W>
Sorted<W> sorted(const Sort& s) {
  const auto* weight = static_cast<const W*>(s.weight);
  const auto real = [&](int64_t i) { return !s.token || (s.token[i] >= 0 && s.token[i] < s.T); };
  const auto wants = [&](int64_t i) { return s.expert[i] >= 0 && s.expert[i] < s.E && real(i); };
  const auto token_of = [&](int64_t i) { return s.token ? (real(i) ? s.token[i] : s.T) : i / s.K; };
  Sorted<W> out;
  out.counts.resize(size_t(s.E));
  std::vector<std::vector<int64_t>> queue(static_cast<size_t>(s.E));
  const int64_t slots = s.token ? 1 : s.K;
  for (int64_t k = 0; k < slots; ++k)
    for (int64_t i = k; i < s.R; i += slots)
      if (wants(i)) queue[size_t(s.expert[i])].push_back(i), ++out.counts[size_t(s.expert[i])];
  std::vector<char> kept(static_cast<size_t>(s.R));
  for (auto& q : queue) {
    if (s.by_weight)
      std::stable_sort(q.begin(), q.end(), [&](int64_t a, int64_t b) {
        return weight[a] > weight[b] || (std::isnan(weight[b]) && !std::isnan(weight[a]));
      });
    if (s.capacity >= 0 && int64_t(q.size()) > s.capacity) q.resize(size_t(s.capacity));
    for (const int64_t i : q) kept[size_t(i)] = 1;
  }
  std::vector<int64_t> order(static_cast<size_t>(s.R)), by_expert;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return token_of(a) < token_of(b); });
  std::vector<int64_t> positions = order;
  std::iota(positions.begin(), positions.end(), 0);
  const auto bin = [&](int64_t p) { return kept[size_t(order[size_t(p)])] ? s.expert[order[size_t(p)]] : s.E; };
  std::stable_sort(positions.begin(), positions.end(), [&](int64_t a, int64_t b) { return bin(a) < bin(b); });
  out.row.resize(size_t(s.R));
  out.place.resize(size_t(s.token ? s.R : 0));
  for (int64_t r = 0; r < s.R; ++r) {
    const int64_t p = positions[size_t(r)], i = order[size_t(p)];
    out.row[size_t(p)] = r;
    if (s.token) out.place[size_t(i)] = r;
    out.token.push_back(token_of(i) < s.T ? token_of(i) : 0);
    out.weight.push_back(weight[i]);
  }
  for (int64_t e = 0; e <= s.E; ++e)
    out.offsets.push_back(std::count_if(positions.begin(), positions.end(), [&](int64_t p) { return bin(p) < e; }));
  for (int64_t t = 0; t <= s.T; ++t) {
    int64_t before = 0;
    for (int64_t i = 0; i < s.R; ++i) before += token_of(i) < t;
    out.slot_offsets.push_back(before);
  }
  return out;
}

template <class T>
void check_equal(const Buffer<T>& got, const std::vector<T>& expected, const char* what, const Shape& shape,
                 uint64_t seed) {
  bool equal = got.size() == int64_t(expected.size());
  for (int64_t i = 0; equal && i < got.size(); ++i) equal = std::memcmp(&got[i], &expected[size_t(i)], sizeof(T)) == 0;
  check(equal, "sort, %s, seed %d, weights of %d bytes: %s", shape.name, int(seed), int(sizeof(T)), what);
}

template <class W>
void test_sort(const Shape& shape, uint64_t seed) {
  Random random(seed);
  const int64_t R = shape.T * shape.K;
  const bool skewed = seed & 1, wild = seed % 3 == 0;
  Buffer<int64_t> expert(R), token(R);
  Buffer<W> weight(R);
  const W specials[] = {W(NAN), W(INFINITY), -W(INFINITY), W(0), W(-0.0), W(0.5), W(0.5)};
  for (int64_t i = 0; i < R; ++i) {
    expert[i] = int64_t(random.below(size_t(shape.E)));
    if (skewed && random.coin()) expert[i] = shape.E / 2;
    if (random.below(5) == 0) expert[i] = wild && random.coin() ? int64_t(random.next()) : shape.E;
    token[i] = int64_t(random.below(size_t(std::max<int64_t>(1, shape.T))));
    if (wild && random.below(5) == 0) token[i] = random.coin() ? -1 : int64_t(random.next());
    weight[i] = random.below(4) == 0 ? specials[random.below(7)] : W(normal(random));
  }
  Buffer<W> out_weight(R);
  Buffer<int64_t> out_token(R), offsets(shape.E + 1), row(R), slot_offsets(shape.T + 1), counts(shape.E),
      place(shape.token ? R : 0);
  Sort s;
  s.R = R;
  s.E = shape.E;
  s.T = shape.T;
  s.K = shape.token ? 1 : shape.K;
  s.expert = expert.data();
  if (shape.token) s.token = token.data();
  s.weight = weight.data();
  s.weight_dtype = Codec<W>::kDType;
  s.capacity = shape.capacity;
  s.by_weight = shape.by_weight;
  s.out_weight = out_weight.data();
  s.out_token = out_token.data();
  s.out_offsets = offsets.data();
  s.out_row = row.data();
  s.out_slot_offsets = slot_offsets.data();
  s.out_counts = counts.data();
  s.out_place = place.data();
  Buffer<char> scratch(sort_plan(s).scratch_bytes);
  s.scratch = scratch.data();
  const SortPlan plan = sort_plan(s);
  clear(plan);
  run(plan, SortEntries{s, plan.orders[2], plan.start, plan.flags}, seed);

  const Sorted<W> expected = sorted<W>(s);
  check_equal(out_weight, expected.weight, "weight", shape, seed);
  check_equal(out_token, expected.token, "token", shape, seed);
  check_equal(offsets, expected.offsets, "offsets", shape, seed);
  check_equal(row, expected.row, "row", shape, seed);
  check_equal(slot_offsets, expected.slot_offsets, "slot_offsets", shape, seed);
  check_equal(counts, expected.counts, "counts", shape, seed);
  check_equal(place, expected.place, "place", shape, seed);
}

void test_sorts() {
  const Shape shapes[] = {
      {"dropless", 50, 8, 2, false, -1, false},
      {"one expert", 9, 1, 1, false, -1, false},
      {"no tokens", 0, 4, 2, false, -1, false},
      {"no slots", 5, 4, 0, false, 3, true},
      {"one token", 1, 7, 3, false, -1, false},
      {"chunks", 1700, 6, 3, false, -1, false},
      {"the widest digit", 300, 1023, 2, false, -1, false},
      {"two digits", 400, 1500, 3, false, -1, false},
      {"capacity by position", 700, 5, 4, false, 130, false},
      {"capacity by weight", 700, 5, 4, false, 130, true},
      {"capacity 0", 10, 4, 2, false, 0, false},
      {"capacity that nobody reaches", 10, 4, 2, false, 100, true},
      {"capacity, two digits", 300, 1100, 2, false, 1, true},
      {"tokens", 60, 5, 3, true, -1, false},
      {"tokens of two digits", 1100, 5, 2, true, -1, false},
      {"tokens, capacity by position", 1100, 3, 2, true, 100, false},
      {"tokens, capacity by weight", 60, 1030, 4, true, 2, true},
      {"tokens, none", 0, 3, 2, true, 1, true},
  };
  for (const Shape& shape : shapes) {
    for (uint64_t seed = 1; seed <= 6; ++seed) {
      test_sort<float>(shape, seed);
      if (seed > 3) test_sort<double>(shape, seed);
    }
  }
}

// ---- rounding -------------------------------------------------------------------------------------------------------

template <class W>
void test_round(int64_t T, int64_t E, int64_t K, int64_t tile, uint64_t seed) {
  Random random(seed);
  Buffer<W> scores(T * E);
  Buffer<int64_t> ids(T * K);
  const W specials[] = {W(NAN), W(INFINITY), -W(INFINITY), W(0), W(-0.0), W(2e30), W(-2e30), W(1e30)};
  for (W& v : scores) v = random.below(4) == 0 ? specials[random.below(8)] : W(double(random.below(9)) / 4 - 1);
  for (int64_t& id : ids) id = random.below(8) == 0 ? int64_t(random.next()) : int64_t(random.below(size_t(E)));
  RoundTokens r;
  r.T = T;
  r.E = E;
  r.K = K;
  r.tile = tile;
  r.scores = scores.data();
  r.dtype = Codec<W>::kDType;
  r.ids = ids.data();
  Buffer<int64_t> expert(rounded_rows(r)), token(rounded_rows(r));
  r.out_expert = expert.data();
  r.out_token = token.data();
  Buffer<char> scratch(round_plan(r).scratch_bytes);
  r.scratch = scratch.data();
  const SortPlan plan = round_plan(r);
  clear(plan);
  if (T * K > 0) simt::launch({divide_up(T * K, 256), 256, 0, seed}, mark_choices_kernel<char>, r, plan.flags);
  simt::launch({E, 256, 8, seed}, round_counts_kernel<char>, r, plan.flags, plan.wanted);
  run(plan, RoundEntries{r, plan.start, plan.flags}, seed);

  // As csrc/cpu/assignment.cpp has it.
  std::vector<int64_t> experts, tokens, order(static_cast<size_t>(T));
  for (int64_t e = 0; e < E; ++e) {
    std::vector<char> mine(static_cast<size_t>(T));
    for (int64_t i = 0; i < T * K; ++i)
      if (ids[i] == e) mine[size_t(i / K)] = 1;
    const int64_t count = std::count(mine.begin(), mine.end(), 1);
    std::iota(order.begin(), order.end(), 0);
    const auto value = [&](int64_t t) {
      const double v = double(scores[t * E + e]);
      return std::isnan(v) ? -1e30 : std::clamp(v, -1e30, 1e30);
    };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      if (mine[size_t(a)] != mine[size_t(b)]) return mine[size_t(a)] > mine[size_t(b)];
      return value(a) > value(b);
    });
    for (int64_t i = 0; i < std::min(T, (count + tile / 2) / tile * tile); ++i) {
      experts.push_back(e);
      tokens.push_back(order[size_t(i)]);
    }
  }
  experts.resize(size_t(rounded_rows(r)), E);
  tokens.resize(size_t(rounded_rows(r)), 0);
  check(std::equal(experts.begin(), experts.end(), expert.begin()) &&
            std::equal(tokens.begin(), tokens.end(), token.begin()),
        "rounding of %lld tokens, %lld experts, tile %lld, seed %d, %d bytes", (long long)T, (long long)E,
        (long long)tile, int(seed), int(sizeof(W)));
}

void test_rounds() {
  const int64_t shapes[][4] = {{40, 4, 2, 8}, {40, 4, 2, 7}, {10, 3, 1, 16},   {30, 5, 5, 4}, {9, 4, 2, 1},
                               {0, 3, 2, 4},  {1, 1, 1, 2},  {700, 6, 2, 128}, {3, 600, 2, 2}};
  for (const auto& shape : shapes)
    for (uint64_t seed = 1; seed <= 3; ++seed) {
      test_round<float>(shape[0], shape[1], shape[2], shape[3], seed);
      test_round<double>(shape[0], shape[1], shape[2], shape[3], seed);
    }
}

// ---- the scan -------------------------------------------------------------------------------------------------------

void test_scan() {
  Random random(5);
  for (const int64_t n : {0, 1, 31, 4096, 4097, 9000}) {
    Buffer<int64_t> in(n);
    for (int64_t& v : in) v = int64_t(random.next() >> 20);
    for (uint64_t seed = 1; seed <= 6; ++seed) {  // some let a warp run ahead into the next tile
      Buffer<int64_t> out(n + 1);
      ScanJobs jobs;
      jobs.job[1] = {in.data(), out.data(), n, int64_t{1} << 43, true};
      simt::launch({kMaxScans, kScanThreads, kScanShared, seed}, scan_kernel<kScanThreads>, jobs);
      int64_t sum = 0;
      for (int64_t i = 0; i <= n; ++i) {
        check(out[i] == sum, "scan of %lld at %lld, seed %d", (long long)n, (long long)i, int(seed));
        if (i < n) sum += std::min(in[i], int64_t{1} << 43);
      }
    }
  }
}

}  // namespace

int main() {
  test_scan();
  test_sorts();
  test_rounds();
  return simt::report("sort_test");
}
