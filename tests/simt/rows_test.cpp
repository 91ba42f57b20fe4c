// SPDX-License-Identifier: BSD-3-Clause
// rows.cuh on the host: dispatch, combine and row dots of every dtype against naive sums in double, on random routings
// with drops and empty experts, and on routings that no sort made.
#include "../../csrc/cuda/rows.cuh"

#include <cmath>
#include <vector>

#include "problems.h"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::Buffer;
using simt::check;
using simt::Random;

// Rows as a sort leaves them; `wild`: some indices are anything.
struct Problem {
  int64_t T, R, E, cols;
  Buffer<int64_t> token, row, slot_offsets, offsets;

  Problem(int64_t T, int64_t K, int64_t E, int64_t cols, bool wild, Random& random)
      : T(T), R(T * K), E(E), cols(cols), token(R), row(R), slot_offsets(T + 1), offsets(E + 1) {
    const int64_t kept = R - R / 4;
    std::vector<int64_t> places(static_cast<size_t>(R));
    for (size_t i = 0; i < places.size(); ++i) places[i] = int64_t(i);
    for (size_t i = places.size(); i > 1; --i) std::swap(places[i - 1], places[random.below(i)]);
    for (int64_t i = 0; i < R; ++i) {
      row[i] = places[size_t(i)];
      token[row[i]] = i / K;
    }
    for (int64_t t = 0; t <= T; ++t) slot_offsets[t] = t * K;
    for (int64_t e = 0; e <= E; ++e) offsets[e] = e == E ? kept : kept * e / E / 3 * 3;  // several may be empty
    if (!wild) return;
    for (auto* indices : {&token, &row, &slot_offsets})
      for (int64_t& i : *indices)
        if (random.below(6) == 0)
          i = random.coin() ? int64_t(random.next()) : int64_t(random.below(2 * size_t(R) + 2)) - 3;
    if (random.coin()) offsets[E] = random.coin() ? int64_t(random.next()) : R + 5;
  }
  int64_t kept() const { return std::clamp<int64_t>(offsets[E], 0, R); }
  Routes routes() const { return {{T, token.data(), row.data(), slot_offsets.data()}, R, &offsets[E]}; }
  bool real(int64_t t) const { return t >= 0 && t < T; }
};

template <class S>
void fill(Buffer<S>& values, int64_t count, Random& random) {
  for (int64_t i = 0; i < count; ++i) values[i] = Codec<S>::encode(ComputeOf<S>(normal(random)));
}

template <class S>
double value_at(const Matrix& m, int64_t r, int64_t c) {
  return double(Codec<S>::decode(*element<S>(m, r, c)));
}

template <class S>
void test_dispatch(const Problem& p, bool weighted, bool columns_first, uint64_t seed) {
  using T = ComputeOf<S>;
  Random random(seed);
  Buffer<S> in(p.T * p.cols), out(p.R * p.cols);
  Buffer<T> weight(p.R);  // NaN behind the kept rows
  fill(in, in.size(), random);
  fill(weight, p.kept(), random);
  MoveRows m;
  m.routes = p.routes();
  m.cols = p.cols;
  m.in = columns_first ? Matrix{in.data(), 1, p.T} : Matrix{in.data(), p.cols, 1};
  m.dtype = Codec<S>::kDType;
  if (weighted) m.weight = weight.data();
  m.out = out.data();
  m.out_stride = p.cols;
  const PackGrid grid = move_rows_grid(m, p.R);
  if (grid.blocks > 0) simt::launch({grid.blocks, kPackThreads, 0, seed}, dispatch_rows_kernel<S>, m, grid);
  for (int64_t r = 0; r < p.R; ++r) {
    const bool there = r < p.kept() && p.real(p.token[r]);
    for (int64_t c = 0; c < p.cols; ++c) {
      const T exact = there ? T(value_at<S>(m.in, p.token[r], c)) * (weighted ? weight[r] : T(1)) : T(0);
      const S expected = Codec<S>::encode(exact), got = out[r * p.cols + c];
      check(std::memcmp(&got, &expected, sizeof(S)) == 0, "dispatch: row %lld, column %lld, seed %d", (long long)r,
            (long long)c, int(seed));
    }
  }
}

template <class S>
void test_combine(const Problem& p, bool weighted, bool columns_first, uint64_t seed) {
  using T = ComputeOf<S>;
  Random random(seed);
  Buffer<S> in(p.R * p.cols);
  Buffer<S> out(p.T * (p.cols + 8));
  Buffer<T> weight(p.R);
  if (columns_first) fill(in, in.size(), random);
  else fill(in, p.kept() * p.cols, random);  // NaN behind
  fill(weight, p.kept(), random);
  MoveRows m;
  m.routes = p.routes();
  m.cols = p.cols;
  m.in = columns_first ? Matrix{in.data(), 1, p.R} : Matrix{in.data(), p.cols, 1};
  m.dtype = Codec<S>::kDType;
  if (weighted) m.weight = weight.data();
  m.out = out.data();
  m.out_stride = p.cols + 8;
  const PackGrid grid = move_rows_grid(m, p.T);
  if (grid.blocks > 0) simt::launch({grid.blocks, kPackThreads, 0, seed}, combine_rows_kernel<S>, m, grid);
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t begin = std::clamp<int64_t>(p.slot_offsets[t], 0, p.R);
    const int64_t end = std::clamp<int64_t>(p.slot_offsets[t + 1], begin, p.R);
    for (int64_t c = 0; c < p.cols + 8; ++c) {
      const S got = out[t * m.out_stride + c];
      if (c >= p.cols) {
        check(is_poison(got), "combine writes beside its columns");
        continue;
      }
      // In the very order and arithmetic that is promised.
      T sum = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = p.row[i];
        if (r < 0 || r >= p.kept()) continue;
        sum = std::fma(weighted ? weight[r] : T(1), Codec<S>::decode(*element<S>(m.in, r, c)), sum);
      }
      const S expected = Codec<S>::encode(sum);
      check(std::memcmp(&got, &expected, sizeof(S)) == 0, "combine: token %lld, column %lld, seed %d", (long long)t,
            (long long)c, int(seed));
    }
  }
}

template <class S>
void test_row_dots(const Problem& p, bool with_a, bool by_expert, int64_t num_parts, uint64_t seed) {
  using T = ComputeOf<S>;
  Random random(seed);
  const bool columns_first = random.coin();
  Buffer<S> a(p.T * p.cols), b((by_expert ? p.E : p.R) * p.cols);
  Buffer<T> parts(p.R * num_parts), out(p.R);
  fill(a, a.size(), random);
  fill(b, by_expert ? b.size() : p.kept() * p.cols, random);
  fill(parts, p.kept() * num_parts, random);
  RowDots d;
  d.routes = p.routes();
  d.cols = p.cols;
  if (with_a) d.a = columns_first ? Matrix{a.data(), 1, p.T} : Matrix{a.data(), p.cols, 1};
  d.b = {b.data(), p.cols, 1};
  d.dtype = Codec<S>::kDType;
  if (by_expert) d.offsets = p.offsets.data();
  d.experts = p.E;
  d.parts = parts.data();
  d.num_parts = num_parts;
  d.out = out.data();
  if (p.R > 0) simt::launch({row_dots_blocks(d), kPackThreads, 0, seed}, row_dots_kernel<S>, d, row_dots_vector(d));
  for (int64_t r = 0; r < p.R; ++r) {
    double exact = 0, magnitude = 0;
    if (r < p.kept()) {
      for (int64_t i = 0; i < num_parts; ++i)
        exact += double(parts[r * num_parts + i]), magnitude += std::abs(double(parts[r * num_parts + i]));
      int64_t e = 0;
      while (e + 1 < p.E && p.offsets[e + 1] <= r) ++e;
      for (int64_t c = 0; with_a && p.real(p.token[r]) && c < p.cols; ++c) {
        const double product = value_at<S>(d.a, p.token[r], c) * value_at<S>(d.b, by_expert ? e : r, c);
        exact += product;
        magnitude += std::abs(product);
      }
    }
    check(std::abs(double(out[r]) - exact) <= 16 * epsilon<T>() * magnitude,
          "row dots: row %lld, seed %d: %g, expected %g", (long long)r, int(seed), double(out[r]), exact);
  }
}

template <class S>
void test_dtype() {
  const int64_t shapes[][4] = {{0, 2, 3, 8},   {1, 1, 1, 1},     {7, 3, 5, 33},
                               {20, 2, 4, 64}, {5, 9, 300, 520}, {3, 2, 2, 0}};
  uint64_t seed = 0;
  for (const auto& shape : shapes) {
    for (int variant = 0; variant < 8; ++variant) {
      Random random(++seed);
      const Problem p(shape[0], shape[1], shape[2], shape[3], variant & 4, random);
      const bool weighted = variant & 1, columns_first = variant & 2;
      test_dispatch<S>(p, weighted, columns_first, seed);
      test_combine<S>(p, weighted, columns_first, seed);
      test_row_dots<S>(p, variant != 1, (variant & 2) && !(variant & 4), variant % 3 * 40, seed);
      // By expert on anyone's routing: only that nothing outside is touched, which the sanitizer sees.
      if (variant & 4) {
        for (int64_t e = 0; e < p.E; ++e) const_cast<Problem&>(p).offsets[e] = int64_t(random.next());
        RowDots d;
        Buffer<S> a(p.T * p.cols), b(p.E * p.cols);
        Buffer<ComputeOf<S>> out(p.R);
        d.routes = p.routes();
        d.cols = p.cols;
        d.a = {a.data(), p.cols, 1};
        d.b = {b.data(), p.cols, 1};
        d.offsets = p.offsets.data();
        d.experts = p.E;
        d.out = out.data();
        if (p.R > 0) simt::launch({row_dots_blocks(d), kPackThreads, 0, seed}, row_dots_kernel<S>, d, 0u);
      }
    }
  }
}

}  // namespace

int main() {
  test_dtype<float>();
  test_dtype<double>();
  test_dtype<Half>();
  test_dtype<BFloat16>();
  return simt::report("rows_test");
}
