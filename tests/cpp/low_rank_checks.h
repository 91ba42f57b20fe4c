// SPDX-License-Identifier: BSD-3-Clause
// Products with a short side: alone, as gradients, and as the second product of a tile. Row by row the bits do not
// depend on how many rows there are.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "kernel_run.h"

namespace ffn_ops {

// A matrix [rows, cols] in a buffer: dense, by columns, or every third element.
struct Laid {
  Buffer buffer;
  int64_t row_stride, col_stride;

  Laid(DType dtype, int64_t rows, int64_t cols, int layout)
      : buffer(dtype, rows * cols * (layout == 2 ? 3 : 1)),
        row_stride(layout == 1   ? 1
                   : layout == 2 ? 3 * cols
                                 : cols),
        col_stride(layout == 1   ? rows
                   : layout == 2 ? 3
                                 : 1) {}
  double get(int64_t r, int64_t c) const { return buffer.get(r * row_stride + c * col_stride); }
  Matrix matrix() const { return {{buffer.data.get(), row_stride, col_stride}, buffer.dtype, nullptr}; }
  // Element (lane, k) is (lane, k) here, as the operators ask for it.
  Operand operand() const {
    Operand op;
    op.matrix = matrix();
    op.k_along_rows = row_stride < col_stride;
    if (op.k_along_rows) std::swap(op.matrix.row_stride, op.matrix.col_stride);
    return op;
  }
};

inline void test_short_product(const char* isa, const KernelTable& table, DType dtype, DType factor, const Shape& s,
                               int layout) {
  const Laid rows(dtype, s.M, s.K, layout == 2 ? 1 : 0), b(factor, s.N, s.K, layout);
  Buffer out(arithmetic_dtype(dtype), s.M * s.N), one(arithmetic_dtype(dtype), s.M * s.N);
  ShortProduct p;
  p.K = s.K;
  p.N = s.N;
  p.rows = rows.matrix();
  p.b = b.operand();
  p.scale = 1.5;
  p.out = out.data.get();
  table.short_product(p, 0, s.M);
  for (int64_t m = 0; m < s.M; ++m) {
    for (int64_t n = 0; n < s.N; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < s.K; ++k) {
        sum += rows.get(m, k) * b.get(n, k);
        magnitude += std::fabs(rows.get(m, k) * b.get(n, k));
      }
      expect("short product", isa, out.dtype, out.get(m * s.N + n), 1.5 * sum, magnitude, 9);
    }
  }
  p.out = one.data.get();
  for (int64_t m = 0; m < s.M; ++m) table.short_product(p, m, m + 1);
  const auto bytes = static_cast<size_t>(s.M * s.N * storage_size(out.dtype));
  if (std::memcmp(one.data.get(), out.data.get(), bytes) != 0 && ++failures <= 20)
    std::printf("%s short product: other bits of one row\n", isa);
}

// The narrow side is of the arithmetic's dtype.
inline void test_short_outer(const char* isa, const KernelTable& table, DType dtype, DType stored, int64_t rows,
                             int64_t M, int64_t N, int layout) {
  const DType wide = arithmetic_dtype(dtype);
  const Laid a(M < N ? wide : dtype, rows, M, M < N ? 0 : layout), b(M < N ? dtype : wide, rows, N, M < N ? layout : 0);
  Buffer out(stored, M * N);
  ShortOuter p;
  p.rows = rows;
  p.M = M;
  p.N = N;
  p.a = a.matrix();
  p.b = b.matrix();
  p.out = out.data.get();
  p.dtype = stored;
  const int64_t length = M < N ? N : M;  // in two pieces, the last first
  for (const int64_t begin : {int64_t{64}, int64_t{0}}) {
    const int64_t end = begin == 0 && length > 64 ? 64 : length;
    if (begin < end) table.short_outer(p, M < N ? Range{0, M, begin, end} : Range{begin, end, 0, N});
  }
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0, magnitude = 0.01;  // float16 has steps of its own near zero
      for (int64_t r = 0; r < rows; ++r) {
        sum += a.get(r, m) * b.get(r, n);
        magnitude += std::fabs(a.get(r, m) * b.get(r, n));
      }
      expect("short outer product", isa, stored, out.get(m * N + n), sum, magnitude, 9);
    }
  }
}

// out = a b^T + small small_b^T: of every kernel, and the same bits for one row and for many.
inline void test_second_product(const char* isa, const KernelTable& table, DType dtype, DType factor, int64_t N,
                                int64_t rank, int layout) {
  constexpr int64_t kRows = 70, kK = 100;
  const DType wide = arithmetic_dtype(dtype);
  const Laid a(dtype, kRows, kK, 0), b(dtype, N, kK, layout == 1 ? 1 : 0), small(wide, kRows, rank, 0),
      small_b(factor, N, rank, layout);
  const Operand b_operand = b.operand(), small_operand = small_b.operand();
  Buffer out(wide, kRows * N), few(wide, kRows * N);
  const auto multiply = [&](int64_t M, Buffer& to) {
    Gemm g = product({M, N, kK}, dtype);
    g.a.matrix = a.matrix();
    g.b = &b_operand;
    g.epilogue.out = to.data.get();
    g.epilogue.out_unrounded = true;
    g.epilogue.small = small.buffer.data.get();
    g.epilogue.rank = rank;
    g.epilogue.small_b = &small_operand;
    run(table, g);
  };
  multiply(kRows, out);
  for (int64_t m = 0; m < kRows; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < kK + rank; ++k) {
        const double term = k < kK ? a.get(m, k) * b.get(n, k) : small.get(m, k - kK) * small_b.get(n, k - kK);
        sum += term;
        magnitude += std::fabs(term);
      }
      expect("second product", isa, wide, out.get(m * N + n), sum, magnitude, 9);
    }
  }
  for (const int64_t M : {1, 5, 6, 13, 33}) {
    multiply(M, few);
    const auto bytes = static_cast<size_t>(M * N * storage_size(wide));
    if (std::memcmp(few.data.get(), out.data.get(), bytes) != 0 && ++failures <= 20)
      std::printf("%s second product: other bits of %d rows\n", isa, int(M));
  }
}

// Transposes, in pieces, with places that are left out and rows of zeros; into and out of the arithmetic's dtype.
inline void test_turn(const char* isa, const KernelTable& table, DType from, DType to, int64_t rows, int64_t cols) {
  std::vector<int64_t> places(static_cast<size_t>(cols), -1), sources(static_cast<size_t>(rows), -1);
  int64_t kept = 0;
  for (int64_t c = 0; c < cols; c += 1 + c % 3) places[static_cast<size_t>(c)] = kept++;
  for (int64_t r = 0; r < rows; r += 1 + r % 3) sources[static_cast<size_t>(r)] = rows - 1 - r;
  for (const bool named : {false, true}) {
    const Laid in(from, rows, cols, 0);
    Buffer out(to, cols * rows);
    Turn t;
    t.in = in.matrix();
    t.from = named ? sources.data() : nullptr;
    t.to = named ? places.data() : nullptr;
    t.out = out.data.get();
    t.out_stride = rows;
    t.dtype = to;
    const int64_t half = rows > 16 ? 16 : 0;
    table.turn(t, {half, rows, 0, cols});
    table.turn(t, {0, half, 0, cols});
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t place = named ? places[static_cast<size_t>(c)] : c;
      for (int64_t r = 0; r < rows && place >= 0; ++r) {
        const int64_t source = named ? sources[static_cast<size_t>(r)] : r;
        const double value = source < 0 ? 0 : in.get(source, c);
        // float16 has steps of its own near zero
        expect("turn", isa, to, out.get(place * rows + r), value, std::fabs(value) + 0.001, 1);
      }
    }
  }
}

inline void test_low_rank(const char* isa, const KernelTable& table, DType dtype) {
  for (const int64_t rows : {1, 16, 37})
    for (const int64_t cols : {1, 8, 64, 70}) {
      test_turn(isa, table, dtype, arithmetic_dtype(dtype), rows, cols);
      test_turn(isa, table, arithmetic_dtype(dtype), dtype, rows, cols);
    }
  for (int layout = 0; layout < 3; ++layout) {
    for (const bool mixed : {false, true}) {
      const DType factor = mixed ? arithmetic_dtype(dtype) : dtype;
      for (const Shape& s : {Shape{1, 1, 1}, {9, 8, 70}, {5, 19, 600}, {2, 33, 64}, {6, 3, 1031}})
        test_short_product(isa, table, dtype, factor, s, layout);
      for (const int64_t rows : {1, 7, 64, 150})
        for (const int64_t rank : {1, 8, 13, 40}) {
          test_short_outer(isa, table, dtype, factor, rows, rank, 77, layout);
          test_short_outer(isa, table, dtype, factor, rows, 90, rank, layout);
        }
      for (const int64_t N : {5, 70})
        for (const int64_t rank : {1, 4, 8, 16, 21, 130})
          test_second_product(isa, table, dtype, factor, N, rank, layout);
    }
  }
}

}  // namespace ffn_ops
