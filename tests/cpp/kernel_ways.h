// Every way to multiply gives a row the same bits: alone, among a few, and in a packed product.
#pragma once

#include <cmath>
#include <cstring>

#include "kernel_run.h"

namespace ffn_ops {

// M rows times weights of N rows along k, or of rows along N in stretches of K each. What lies behind a row
// along k, and behind the last row along N, is NaN, which must not enter the result.
inline void test_ways(const char* isa, const KernelTable& table, DType dtype, const Shape& s, int64_t stretches) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  const int64_t parts = stretches > 0 ? stretches : 1, K = parts * s.K;
  Buffer x(dtype, s.M * (K + 1)), out(arithmetic_dtype(dtype), s.M * s.N), few(arithmetic_dtype(dtype), s.M * s.N);
  for (int64_t m = 0; m < s.M; ++m) x.set(m * (K + 1) + K, kNaN);
  std::vector<Buffer> weights;
  std::vector<Operand> operands;
  for (int64_t i = 0; i < parts; ++i) {
    Buffer& w = weights.emplace_back(dtype, s.N * (s.K + 1));
    for (int64_t n = 0; n < s.N; ++n) w.set(stretches ? s.K * s.N + n : n * (s.K + 1) + s.K, kNaN);
    Operand& op = operands.emplace_back();
    op.matrix = {w.data.get(), stretches ? s.N : s.K + 1, 1, dtype, nullptr};
    op.k_along_rows = stretches > 0;
  }
  const auto multiply = [&](int64_t M, Buffer& to) {
    Gemm g = product({M, s.N, K}, dtype);
    g.a.matrix = {x.data.get(), K + 1, 1, dtype, nullptr};
    g.b = operands.data();
    g.num_b = parts;
    g.epilogue.out_unrounded = true;
    g.epilogue.out = to.data.get();
    run(table, g);
  };
  multiply(s.M, out);
  for (int64_t m = 0; m < s.M; ++m) {
    for (int64_t n = 0; n < s.N; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < K; ++k) {
        const Buffer& w = weights[static_cast<size_t>(k / s.K)];
        const double term = x.get(m * (K + 1) + k) * w.get(stretches ? k % s.K * s.N + n : n * (s.K + 1) + k);
        sum += term;
        magnitude += std::fabs(term);
      }
      expect("ways", isa, arithmetic_dtype(dtype), out.get(m * s.N + n), sum, magnitude, 9);
    }
  }
  for (const int64_t M : {1, 2, 3, 6, 7, 13, 16, 17, 31, 32, 33, 39}) {
    multiply(M, few);
    const auto bytes = static_cast<size_t>(M * s.N * storage_size(out.dtype));
    if (std::memcmp(few.data.get(), out.data.get(), bytes) != 0 && ++failures <= 20)
      std::printf("%s %s: %d of %d rows times %d columns, k %d in %d stretches: other bits\n", isa,
                  kDTypeNames[static_cast<int>(dtype)], int(M), int(s.M), int(s.N), int(s.K), int(stretches));
  }
}

}  // namespace ffn_ops
