// SPDX-License-Identifier: BSD-3-Clause
// Sums on the host, in every dtype, against sums in double: over rows (segments, gathered and weighted rows, strides),
// and of the gradients of parameters that learn.
#include "../../csrc/cuda/elementwise.cuh"

#include <cmath>
#include <vector>

#include "input.h"
#include "problems.h"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::Buffer;
using simt::check;
using simt::Random;

template <class S>
Buffer<S> column_sum(ColumnSum s, uint64_t seed) {
  Buffer<ComputeOf<S>> partial(column_sum_bytes(s) / int64_t(sizeof(ComputeOf<S>)));
  Buffer<S> out(s.experts * s.cols);
  s.partial = partial.data();
  s.out = out.data();
  const ColumnSumGrid grid = column_sum_grid(s);
  if (grid.blocks > 0)
    simt::launch({grid.blocks, kPackThreads, grid.shared_bytes, seed}, column_sum_kernel<S>, s, grid);
  if (grid.final_blocks > 0) simt::launch({grid.final_blocks, kPackThreads, 0, seed}, column_sum_parts_kernel<S>, s);
  return out;
}

template <class S>
void test_column_sum() {
  using T = ComputeOf<S>;
  struct Shape {
    int64_t rows, cols;
    std::vector<int64_t> offsets;  // empty: one segment
  };
  const Shape shapes[] = {{0, 5, {}},     {1, 1, {}},
                          {700, 37, {}},  {5000, 3, {}},
                          {129, 600, {}}, {40, 16, {0, 0, 7, 7, 30, 30}},
                          {9, 4, {0, 0}}, {300, 8, {5, 140, 290}}};
  for (const Shape& shape : shapes) {
    for (uint64_t seed = 1; seed <= 4; ++seed) {
      Random random(seed);
      const bool gathered = seed & 1, weighted = seed & 2, strided = seed == 4;
      const int64_t R = shape.rows, C = shape.cols, E = shape.offsets.empty() ? 1 : int64_t(shape.offsets.size()) - 1;
      const int64_t tokens = R / 3 + 1;
      Buffer<S> data((gathered ? tokens : R) * C);  // rows behind the segments stay NaN
      Buffer<int64_t> gather(R), offsets(shape.offsets);
      Buffer<T> weight(R);
      const int64_t last = shape.offsets.empty() ? R : shape.offsets.back();
      for (int64_t i = 0; i < (gathered ? tokens : last) * C; ++i) data[i] = Codec<S>::encode(T(normal(random)));
      for (int64_t r = 0; r < last; ++r) {
        weight[r] = T(normal(random));
        gather[r] = random.below(20) ? int64_t(random.below(size_t(tokens))) : int64_t(random.next());
      }
      ColumnSum s;
      s.rows = R;
      s.cols = C;
      s.experts = E;
      s.dtype = Codec<S>::kDType;
      s.matrix = {data.data(), strided ? 1 : C, strided ? (gathered ? tokens : R) : 1};
      if (strided && last < R) continue;
      if (gathered) s.gather = gather.data(), s.gather_limit = tokens;
      if (!shape.offsets.empty()) s.offsets = offsets.data();
      if (weighted) s.weight = weight.data();
      const Buffer<S> out = column_sum<S>(s, seed);
      for (int64_t e = 0; e < E; ++e) {
        const int64_t begin = shape.offsets.empty() ? 0 : shape.offsets[size_t(e)];
        const int64_t end = shape.offsets.empty() ? R : shape.offsets[size_t(e + 1)];
        for (int64_t c = 0; c < C; ++c) {
          double exact = 0, magnitude = 0;
          for (int64_t r = begin; r < end; ++r) {
            const int64_t from = gathered ? gather[r] : r;
            if (gathered && (from < 0 || from >= tokens)) continue;
            const double value =
                double(Codec<S>::decode(*element<S>(s.matrix, from, c))) * (weighted ? double(weight[r]) : 1);
            exact += value;
            magnitude += std::abs(value);
          }
          const double got = double(Codec<S>::decode(out[e * C + c]));
          check(std::abs(got - exact) <= epsilon<S>() * std::abs(exact) + 40 * epsilon<T>() * magnitude,
                "column_sum %s %lldx%lld seed %d: segment %lld column %lld: %g, expected %g", kDTypeNames[int(s.dtype)],
                (long long)R, (long long)C, int(seed), (long long)e, (long long)c, got, exact);
        }
      }
    }
  }
}

// A segment's sum has the same bits wherever it stands and whatever stands beside it; offsets may be anything.
void test_column_sum_alone() {
  Random random(11);
  const int64_t C = 12, n = 300;
  for (const int64_t before : {int64_t(0), int64_t(1), int64_t(127), int64_t(255)}) {
    Buffer<float> data((before + n) * C);
    Random same(5);
    for (int64_t i = before * C; i < (before + n) * C; ++i) data[i] = float(normal(same));
    Buffer<int64_t> offsets(std::vector<int64_t>{before, before + n});
    ColumnSum s;
    s.rows = before + n;
    s.cols = C;
    s.matrix = {data.data(), C, 1};
    s.offsets = offsets.data();
    static std::vector<float> first;
    Buffer<float> out = column_sum<float>(s, uint64_t(before));
    if (first.empty()) first.assign(out.begin(), out.end());
    check(std::equal(first.begin(), first.end(), out.begin()), "a segment's sum depends on where it begins");
    for (int trial = 0; trial < 20; ++trial) {
      Buffer<int64_t> wild(6);
      for (int64_t& v : wild) v = random.coin() ? int64_t(random.next()) : int64_t(random.below(400)) - 50;
      s.offsets = wild.data();
      s.experts = 5;
      column_sum<float>(s, uint64_t(trial));
      s.experts = 1;
    }
  }
}

// Every layout, few and many elements, of the value and of the slope, against sums in double.
template <class S, class Act>
void test_own_sums() {
  using T = ComputeOf<S>;
  using V = Lane<double>;
  constexpr int kCount = Act::own.count();
  const int64_t shapes[][2] = {{1, 1}, {3, 5}, {0, 4}, {37, 24}, {70, 130}};
  uint64_t seed = 0;
  for (const auto& shape : shapes) {
    for (const bool of_slope : {false, true}) {
      Random random(++seed);
      const int64_t rows = shape[0], cols = shape[1];
      const int layout = int(random.below(kLayouts));
      Input<S> x(layout, rows, cols, random), d(layout, rows, cols, random), dd(layout, rows, cols, random);
      Buffer<T> own(kCount);
      V values[kMostOwnParams];
      for (int k = 0; k < kCount; ++k) own[k] = T(0.75 - 0.5 * k), values[k] = V(double(own[k]));
      OwnSums s;
      s.rows = rows;
      s.cols = cols;
      s.dtype = Codec<S>::kDType;
      s.gate = x.m;
      s.d_out = d.m;
      if (of_slope) s.dd_gate = dd.m;
      s.own_values = own.data();
      flatten(s);
      const int64_t blocks = own_sums_blocks(s);
      Buffer<T> partial(blocks * kCount);
      s.partial = partial.data();
      if (blocks > 0)
        simt::launch({blocks, kPackThreads, kPackThreads / kWarpSize * kCount * int64_t(sizeof(T)), seed},
                     own_sums_kernel<S, Act>, s);
      ColumnSum sum;
      sum.rows = blocks;
      sum.cols = kCount;
      sum.dtype = arithmetic_dtype(s.dtype);
      sum.matrix = {partial.data(), kCount, 1};
      const Buffer<T> found = column_sum<T>(sum, seed);
      for (int k = 0; k < kCount; ++k) {
        double expected = 0, size = 0;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < cols && k < Act::learned; ++c) {
            V p[kMostOwnParams], rest[kMostOwnParams];
            for (int i = 0; i < kMostOwnParams; ++i)
              p[i] = V(i < Act::learned ? double(i == k) : values[i].value), rest[i] = i == k ? V(0) : p[i];
            const auto a = Act::grad(V(x.at(r, c)), p), b = Act::grad(V(x.at(r, c)), rest);
            const double term = of_slope ? d.at(r, c) * dd.at(r, c) * (a.slope - b.slope).value
                                         : d.at(r, c) * (a.value - b.value).value;
            expected += term, size += std::abs(term);
          }
        }
        check(std::abs(double(found[k]) - expected) <= 40 * epsilon<T>() * size,
              "own_sums %s %s %lldx%lld layout %d slope %d: %d: %g, expected %g", Act::name, kDTypeNames[int(s.dtype)],
              (long long)rows, (long long)cols, layout, of_slope, k, double(found[k]), expected);
      }
    }
  }
}

template <class S, class... Acts>
void test_all_own_sums(TypeList<Acts...>) {
  const auto run = []<class Act>(Tag<Act>) {
    if constexpr (Act::learned > 0) test_own_sums<S, Act>();
  };
  (run(Tag<Acts>{}), ...);
}

}  // namespace

int main() {
  test_column_sum<float>();
  test_all_own_sums<float>(Activations{});
  test_column_sum<double>();
  test_all_own_sums<double>(Activations{});
  test_column_sum<Half>();
  test_all_own_sums<Half>(Activations{});
  test_column_sum<BFloat16>();
  test_all_own_sums<BFloat16>(Activations{});
  test_column_sum_alone();
  return simt::report("sums_test");
}
