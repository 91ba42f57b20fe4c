// SPDX-License-Identifier: BSD-3-Clause
// Every kernel gives a row the same bits: alone, among a few, and in a packed product.
#pragma once

#include <cmath>
#include <cstring>

#include "kernel_run.h"

namespace ffn_ops {

// M rows times weights of N rows along k, or of num_b operands with rows along N, K rows each. What lies behind a row
// along k, and behind the last row along N, is NaN: it must not get in.
inline void test_kernels_agree(const char* isa, const KernelTable& table, DType dtype, const Shape& s, int64_t num_b) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  const int64_t parts = num_b > 0 ? num_b : 1, K = parts * s.K;
  Buffer x(dtype, s.M * (K + 1)), out(arithmetic_dtype(dtype), s.M * s.N), few(arithmetic_dtype(dtype), s.M * s.N);
  for (int64_t m = 0; m < s.M; ++m) x.set(m * (K + 1) + K, kNaN);
  std::vector<Buffer> weights;
  std::vector<Operand> operands;
  for (int64_t i = 0; i < parts; ++i) {
    Buffer& w = weights.emplace_back(dtype, s.N * (s.K + 1));
    for (int64_t n = 0; n < s.N; ++n) w.set(num_b ? s.K * s.N + n : n * (s.K + 1) + s.K, kNaN);
    Operand& op = operands.emplace_back();
    op.matrix = {w.data.get(), num_b ? s.N : s.K + 1, 1, dtype, nullptr};
    op.k_along_rows = num_b > 0;
  }
  const auto multiply = [&](int64_t M, Buffer& to) {
    Gemm g = product({M, s.N, K}, dtype);
    g.a.matrix = {x.data.get(), K + 1, 1, dtype, nullptr};
    g.b = operands.data();
    g.num_b = parts;
    g.epilogue.out_unrounded = true;
    g.epilogue.out = to.data.get();
    run(table, g);
    return to_string(g);
  };
  multiply(s.M, out);
  for (int64_t m = 0; m < s.M; ++m) {
    for (int64_t n = 0; n < s.N; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < K; ++k) {
        const Buffer& w = weights[static_cast<size_t>(k / s.K)];
        const double term = x.get(m * (K + 1) + k) * w.get(num_b ? k % s.K * s.N + n : n * (s.K + 1) + k);
        sum += term;
        magnitude += std::fabs(term);
      }
      expect("kernels agree", isa, arithmetic_dtype(dtype), out.get(m * s.N + n), sum, magnitude, 9);
    }
  }
  for (const int64_t M : {1, 2, 3, 6, 7, 13, 16, 17, 31, 32, 33, 39}) {
    const std::string problem = multiply(M, few);
    const auto bytes = static_cast<size_t>(M * s.N * storage_size(out.dtype));
    if (std::memcmp(few.data.get(), out.data.get(), bytes) != 0 && ++failures <= 20)
      std::printf("%s %s: other bits than of %d rows\n", isa, problem.c_str(), int(s.M));
  }
}

// More rows than columns and a long k: computed as the transpose, whose tiles go to their place several panels at a
// time, those of all panels or of a task's part. Few of the rows are not; they have the same bits.
inline void test_transpose_agrees(const char* isa, const KernelTable& table, DType dtype, bool unrounded) {
  constexpr Shape s = {226, 113, 1031};
  constexpr int64_t kFew = s.M / 2;
  const DType out_type = unrounded ? arithmetic_dtype(dtype) : dtype;
  Buffer x(dtype, s.M * s.K), w(dtype, s.N * s.K), bias(dtype, s.N), out(out_type, s.M * s.N), few(out_type, s.M * s.N);
  Operand b;
  b.matrix = {w.data.get(), s.K, 1, dtype, nullptr};
  const void* biases[] = {bias.data.get()};
  const auto multiply = [&](int64_t first, int64_t M, Buffer& to, int64_t workers) {
    Gemm g = product({M, s.N, s.K}, dtype);
    g.a.matrix = {x.data.get() + first * s.K * storage_size(dtype), s.K, 1, dtype, nullptr};
    g.b = &b;
    g.epilogue.out_unrounded = unrounded;
    g.epilogue.out = to.data.get() + first * s.N * storage_size(out_type);
    g.epilogue.bias = biases;
    if (plan_products({g}, table, workers)[0][0].transposed != (M > s.N) && ++failures <= 20)
      std::printf("%s transpose: unexpected schedule of %d rows\n", isa, int(M));
    run(table, g, workers);
  };
  multiply(0, kFew, few, 1);
  multiply(kFew, s.M - kFew, few, 1);
  const auto bytes = static_cast<size_t>(s.M * s.N * storage_size(out_type));
  for (const int64_t workers : {1, 2}) {
    multiply(0, s.M, out, workers);
    if (std::memcmp(few.data.get(), out.data.get(), bytes) != 0 && ++failures <= 20)
      std::printf("%s transpose %s: other bits\n", isa, kDTypeNames[static_cast<int>(dtype)]);
  }
}

}  // namespace ffn_ops
