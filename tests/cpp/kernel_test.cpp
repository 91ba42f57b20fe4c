// SPDX-License-Identifier: BSD-3-Clause
// Tests the kernels of every instruction set that this machine has against naive loops in double, without torch: built
// with the sanitizers, and for aarch64, where it runs under an emulator. Prints a line per case that fails.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/common/names.h"
#include "kernels_agree.h"
#include "low_rank_checks.h"
#include "plan_checks.h"

namespace ffn_ops {
#if defined(__x86_64__)
namespace avx512_bf16_emulated {
extern const KernelTable kTable;
}
#endif
namespace {

// SiLU and its slope, or ReLU's; enough to see that the epilogue passes the right numbers to the right place (the
// activations themselves are tested in vector_test.cpp).
struct Act {
  double value, slope;
};
Act silu(double z) {
  const double s = 1 / (1 + std::exp(-z));
  return {z * s, s * (1 + z * (1 - s))};
}

// Both operands in every layout: dense rows, dense columns, neither; A gathered.
void test_store(const char* isa, const KernelTable& table, DType dtype, const Shape& s, int layout) {
  const int64_t step = layout == 2 ? 3 : 1;
  const bool columns = layout == 1;
  const bool unrounded = layout == 1;
  const DType out_type = unrounded ? arithmetic_dtype(dtype) : dtype;
  Buffer a(dtype, s.M * s.K * step), b(dtype, s.N * s.K * step), bias(dtype, s.N), out(out_type, s.M * s.N);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < s.M; ++i) rows.push_back((i * 7) % (s.M ? s.M : 1));
  Gemm g = product(s, dtype);
  g.a.matrix = {a.data.get(), columns ? s.M : s.K * step, step, dtype, layout == 0 ? rows.data() : nullptr};
  g.a.k_along_rows = columns;
  Operand op;
  op.matrix = {b.data.get(), columns ? s.N : s.K * step, step, dtype, nullptr};
  op.k_along_rows = columns;
  g.b = &op;
  const void* biases[] = {bias.data.get()};
  g.epilogue.out = out.data.get();
  g.epilogue.out_unrounded = unrounded;
  g.epilogue.bias = biases;
  run(table, g);
  for (int64_t m = 0; m < s.M; ++m) {
    for (int64_t n = 0; n < s.N; ++n) {
      double sum = bias.get(n), magnitude = 1;
      for (int64_t k = 0; k < s.K; ++k) {
        const int64_t row = layout == 0 ? rows[static_cast<size_t>(m)] : m;
        const double term = columns ? a.get(k * s.M + m) * b.get(k * s.N + n)
                                    : a.get((row * s.K + k) * step) * b.get((n * s.K + k) * step);
        sum += term;
        magnitude += std::fabs(term);
      }
      expect("store", isa, dtype, out.get(m * s.N + n), sum, magnitude, 0.1 * static_cast<double>(s.K));
    }
  }
}

// Two branches of act(gate) * up with biases, pre-activations saved.
void test_gated(const char* isa, const KernelTable& table, DType dtype, const Shape& s, int activation) {
  constexpr int64_t kBranches = 2;
  Buffer x(dtype, s.M * s.K), out(dtype, s.M * s.N), gate(dtype, kBranches * s.M * s.N),
      up(dtype, kBranches * s.M * s.N);
  std::vector<Buffer> weights, biases;
  std::vector<Operand> operands;
  std::vector<const void*> bias_data;
  for (int64_t i = 0; i < 2 * kBranches; ++i) {
    weights.emplace_back(dtype, s.N * s.K);
    biases.emplace_back(dtype, s.N);
    Operand op;
    op.matrix = {weights.back().data.get(), s.K, 1, dtype, nullptr};
    operands.push_back(op);
    bias_data.push_back(biases.back().data.get());
  }
  Gemm g = product(s, dtype);
  g.a.matrix = {x.data.get(), s.K, 1, dtype, nullptr};
  g.b = operands.data();
  g.num_b = 2 * kBranches;
  g.gated = true;
  Epilogue& e = g.epilogue;
  e.kind = Epilogue::Kind::kActivate;
  e.out = out.data.get();
  e.gate = gate.data.get();
  e.up = up.data.get();
  e.pre_stride = s.N;
  e.pre_branch_stride = s.M * s.N;
  e.bias = bias_data.data();
  e.activation = activation;
  run(table, g);
  for (int64_t m = 0; m < s.M; ++m) {
    for (int64_t n = 0; n < s.N; ++n) {
      double total = 0, magnitude = 1;
      for (int64_t branch = 0; branch < kBranches; ++branch) {
        double pre[2];
        for (int64_t half = 0; half < 2; ++half) {
          const size_t i = static_cast<size_t>(2 * branch + half);
          pre[half] = biases[i].get(n);
          for (int64_t k = 0; k < s.K; ++k) pre[half] += x.get(m * s.K + k) * weights[i].get(n * s.K + k);
          const Buffer& saved = half ? up : gate;
          expect("gated pre", isa, dtype, saved.get((branch * s.M + m) * s.N + n), pre[half], 1,
                 static_cast<double>(s.K));
        }
        total += silu(pre[0]).value * pre[1];
        magnitude += (1 + std::fabs(pre[0])) * (1 + std::fabs(pre[1]));
      }
      expect("gated out", isa, dtype, out.get(m * s.N + n), total, magnitude, static_cast<double>(s.K));
    }
  }
}

// dH = A B^T with two B operands along k; gate and up gradients, and act(gate) * up. With weights for the rows all
// of them times the weight, and the products of dH with act(gate) * up.
void test_grad(const char* isa, const KernelTable& table, DType dtype, const Shape& s, int activation, bool weighted) {
  const int64_t half = s.K / 2, K = 2 * half;
  Buffer d(dtype, s.M * K), b0(dtype, half * s.N), b1(dtype, half * s.N);
  Buffer gate(dtype, s.M * s.N), up(dtype, s.M * s.N), out(dtype, s.M * 2 * s.N), h(dtype, s.M * s.N);
  Operand ops[2];
  ops[0].matrix = {b0.data.get(), s.N, 1, dtype, nullptr};
  ops[1].matrix = {b1.data.get(), s.N, 1, dtype, nullptr};
  ops[0].k_along_rows = ops[1].k_along_rows = true;
  Gemm g = product({s.M, s.N, K}, dtype);
  g.a.matrix = {d.data.get(), K, 1, dtype, nullptr};
  g.b = ops;
  g.num_b = 2;
  Epilogue& e = g.epilogue;
  e.kind = Epilogue::Kind::kActivateGrad;
  e.out = out.data.get();
  e.out_up = out.data.get() + s.N * storage_size(dtype);
  e.out_stride = 2 * s.N;
  e.h = h.data.get();
  e.gate = gate.data.get();
  e.up = up.data.get();
  e.pre_stride = s.N;
  e.activation = activation;
  const int64_t panels = divide_up(s.N, table.nr_vectors * table.lanes * 4 / g.element());
  Buffer weight(arithmetic_dtype(dtype), s.M), dots(arithmetic_dtype(dtype), s.M * panels);
  if (weighted) {
    e.row_weight = weight.data.get();
    e.row_dots = dots.data.get();
    e.row_dots_stride = panels;
  }
  run(table, g);
  for (int64_t m = 0; m < s.M; ++m) {
    const double w = weighted ? weight.get(m) : 1;
    double dot = 0, actual_dot = 0;
    for (int64_t n = 0; n < s.N; ++n) {
      double dh = 0;
      for (int64_t k = 0; k < K; ++k)
        dh += d.get(m * K + k) * (k < half ? b0.get(k * s.N + n) : b1.get((k - half) * s.N + n));
      const Act act = silu(gate.get(m * s.N + n));
      const double magnitude = 1 + static_cast<double>(K) * 0.1;
      expect("d_gate", isa, dtype, out.get(m * 2 * s.N + n), w * dh * act.slope * up.get(m * s.N + n), magnitude, 9);
      expect("h", isa, dtype, h.get(m * s.N + n), w * act.value * up.get(m * s.N + n), 1, 9);
      expect("d_up", isa, dtype, out.get(m * 2 * s.N + s.N + n), w * dh * act.value, magnitude, 9);
      dot += dh * act.value * up.get(m * s.N + n);
    }
    for (int64_t p = 0; weighted && p < panels; ++p) actual_dot += dots.get(m * panels + p);
    if (weighted)
      expect("row dots", isa, arithmetic_dtype(dtype), actual_dot, dot, 1 + static_cast<double>(s.N * K), 9);
  }
}

void test_elementwise(const char* isa, const KernelTable& table, DType dtype, int64_t rows, int64_t cols,
                      int activation) {
  const int64_t n = rows * cols;
  Buffer gate(dtype, n), up(dtype, n), d(dtype, n), out(dtype, n), d_gate(dtype, n), d_up(dtype, n), sums(dtype, cols);
  const auto matrix = [&](const Buffer& b) { return Matrix{b.data.get(), cols, 1, dtype, nullptr}; };
  GatedAct g;
  g.rows = rows;
  g.cols = cols;
  g.gate = matrix(gate);
  g.up = matrix(up);
  g.d_out = matrix(d);
  g.out_stride = cols;
  g.activation = activation;
  g.out[0] = out.data.get();
  table.gated_act(g, {0, rows, 0, cols});
  g.out[0] = d_gate.data.get();
  g.out[1] = d_up.data.get();
  table.gated_act_backward(g, {0, rows, 0, cols});
  // Past the caches: the same bits, and nothing beside them. Rows of an odd width begin anywhere in a cache line.
  Buffer past[] = {{dtype, n}, {dtype, n}, {dtype, n}};
  const Buffer* const plain[] = {&out, &d_gate, &d_up};
  g.nontemporal = true;
  g.out[0] = past[0].data.get();
  g.out[1] = nullptr;
  table.gated_act(g, {0, rows, 0, cols});
  g.out[0] = past[1].data.get();
  g.out[1] = past[2].data.get();
  table.gated_act_backward(g, {0, rows, 0, cols});
  for (int i = 0; i < 3; ++i) expect_same("gated_act past the caches", isa, *plain[i], past[i]);
  table.column_sum({rows, cols, matrix(gate), nullptr, sums.data.get()}, 0, cols);
  for (int64_t i = 0; i < n; ++i) {
    const Act act = silu(gate.get(i));
    expect("gated_act", isa, dtype, out.get(i), act.value * up.get(i), 1, 9);
    expect("gated_act d_gate", isa, dtype, d_gate.get(i), d.get(i) * act.slope * up.get(i), 1, 9);
    expect("gated_act d_up", isa, dtype, d_up.get(i), d.get(i) * act.value, 1, 9);
  }
  for (int64_t c = 0; c < cols; ++c) {
    double sum = 0, magnitude = 1;
    for (int64_t r = 0; r < rows; ++r) {
      sum += gate.get(r * cols + c);
      magnitude += std::fabs(gate.get(r * cols + c));
    }
    expect("column_sum", isa, dtype, sums.get(c), sum, magnitude, 9);
  }
}

// Rows between tokens and experts: the first `kept` of them count, the others are dropped.
void test_rows(const char* isa, const KernelTable& table, DType dtype, int64_t T, int64_t cols, bool even) {
  const int64_t R = 2 * T, kept = R - 1;
  const DType wide = arithmetic_dtype(dtype);
  std::vector<int64_t> token, row, slot_offsets = {0};
  for (int64_t r = 0; r < R; ++r) token.push_back(even ? (r * 5 + 3) % T : r * r % T);  // squares: none or several
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t r = R - 1; r >= 0; --r)  // any order that the list gives
      if (token[static_cast<size_t>(r)] == t) row.push_back(r);
    slot_offsets.push_back(static_cast<int64_t>(row.size()));
  }
  Buffer x(dtype, T * cols), rows(dtype, R * cols), out(dtype, R * cols), y(dtype, T * cols);
  Buffer weight(wide, R), parts(wide, R * 3), dots(wide, R), sums(dtype, cols);
  MoveRows m;
  m.routes = {{T, token.data(), row.data(), slot_offsets.data()}, kept};
  m.cols = cols;
  m.weight = weight.data.get();
  m.out_stride = cols;
  m.out_dtype = dtype;
  m.in = {x.data.get(), cols, 1, dtype, nullptr};
  m.out = out.data.get();
  Buffer past(out), dropped(out);
  table.dispatch_rows(m, 0, T);
  m.out = past.data.get();
  m.nontemporal = true;
  table.dispatch_rows(m, 0, T);
  expect_same("dispatch past the caches", isa, out, past);
  m.in.data = rows.data.get();
  m.out = y.data.get();
  table.combine_rows(m, 0, T);
  RowDots d;
  d.cols = cols;
  d.a = {x.data.get(), cols, 1, dtype, token.data()};
  d.b = {rows.data.get(), cols, 1, dtype, nullptr};
  d.parts = parts.data.get();
  d.num_parts = 3;
  d.out = dots.data.get();
  table.row_dots(d, 0, kept);
  table.column_sum({R, cols, {x.data.get(), cols, 1, dtype, token.data()}, weight.data.get(), sums.data.get()}, 0,
                   cols);
  for (int64_t r = 0; r < R; ++r) {
    const int64_t t = token[static_cast<size_t>(r)];
    double dot = parts.get(r * 3) + parts.get(r * 3 + 1) + parts.get(r * 3 + 2);
    for (int64_t c = 0; c < cols; ++c) {
      const double wanted = r < kept ? weight.get(r) * x.get(t * cols + c) : dropped.get(r * cols + c);
      expect("dispatch", isa, dtype, out.get(r * cols + c), wanted, 0.1, 1);
      dot += x.get(t * cols + c) * rows.get(r * cols + c);
    }
    if (r < kept) expect("row_dots", isa, wide, dots.get(r), dot, 3 + static_cast<double>(cols), 9);
  }
  for (int64_t c = 0; c < cols; ++c) {
    double total = 0;
    for (int64_t r = 0; r < R; ++r) total += weight.get(r) * x.get(token[static_cast<size_t>(r)] * cols + c);
    expect("weighted column_sum", isa, dtype, sums.get(c), total, static_cast<double>(R), 9);
    for (int64_t t = 0; t < T; ++t) {
      double wanted = 0;
      for (int64_t r = 0; r < kept; ++r)
        if (token[static_cast<size_t>(r)] == t) wanted += weight.get(r) * rows.get(r * cols + c);
      expect("combine", isa, dtype, y.get(t * cols + c), wanted, 3, 9);
    }
  }
}

// Softmax, the best K by counting who is better, and the gradient of their weights by finite differences' closed form.
void test_top_k(const char* isa, const KernelTable& table, DType dtype, int64_t E, int64_t K) {
  constexpr int64_t T = 3;
  const DType wide = arithmetic_dtype(dtype);
  Buffer logits(dtype, T * E), weights(wide, T * K), d_weights(wide, T * K), d_logits(dtype, T * E);
  std::vector<int64_t> ids(static_cast<size_t>(T * K));
  TopK k;
  k.T = T;
  k.E = E;
  k.K = K;
  k.logits = {logits.data.get(), E, 1, dtype, nullptr};
  k.ids = ids.data();
  k.weights = weights.data.get();
  std::vector<char> scratch(static_cast<size_t>(top_k_scratch_bytes(k)));
  table.top_k(k, 0, T, scratch.data());
  k.weights = d_weights.data.get();
  k.d_logits = d_logits.data.get();
  table.top_k_backward(k, 0, T, scratch.data());
  for (int64_t t = 0; t < T; ++t) {
    double sum = 0, common = 0;
    for (int64_t e = 0; e < E; ++e) sum += std::exp(logits.get(t * E + e));
    std::vector<double> d(static_cast<size_t>(E));
    for (int64_t j = 0; j < K; ++j) {
      const int64_t id = ids[static_cast<size_t>(t * K + j)];
      int64_t better = 0;
      for (int64_t e = 0; e < E; ++e) {
        const double mine = logits.get(t * E + id), other = logits.get(t * E + e);
        better += other > mine || (other == mine && e < id);
      }
      if (better != j && ++failures <= 20) std::printf("%s top_k: rank %d, not %d\n", isa, int(better), int(j));
      const double p = std::exp(logits.get(t * E + id)) / sum;
      expect("top_k weight", isa, wide, weights.get(t * K + j), p, 0.1, 9);
      d[static_cast<size_t>(id)] = d_weights.get(t * K + j);
      common += p * d[static_cast<size_t>(id)];
    }
    for (int64_t e = 0; e < E; ++e) {
      const double p = std::exp(logits.get(t * E + e)) / sum;
      expect("top_k d_logits", isa, dtype, d_logits.get(t * E + e), p * (d[static_cast<size_t>(e)] - common), 0.5, 9);
    }
  }
}

void test_table(const char* isa, const KernelTable& table) {
  const int activation = kActivations.index("silu");
  // One row, the micro-tile's edges, primes, more than one block of k, more than one task in both directions.
  const Shape shapes[] = {{1, 1, 1},      {1, 37, 600},  {6, 16, 64},   {14, 32, 512}, {15, 33, 1031}, {3, 2, 0},
                          {61, 307, 131}, {16, 70, 150}, {32, 9, 1031}, {40, 8, 600},  {42, 70, 31},   {103, 70, 31}};
  const int before = failures;
  for (int type = 0; type < StorageTypes::kSize; ++type) {
    const DType dtype = static_cast<DType>(type);
    for (const Shape& shape : shapes) {
      for (int layout = 0; layout < 3; ++layout) test_store(isa, table, dtype, shape, layout);
      test_gated(isa, table, dtype, shape, activation);
      for (const bool weighted : {false, true}) test_grad(isa, table, dtype, shape, activation, weighted);
    }
    // A single k, less than a summation block, odd ends of one and of kc; fewer columns than rows, and more.
    for (const int64_t K : {1, 31, 64, 131, 601}) {
      for (const int64_t N : {5, 8, 70})
        for (const int64_t num_b : {0, 1, 3}) test_kernels_agree(isa, table, dtype, {40, N, K}, num_b);
    }
    for (const bool unrounded : {false, true}) test_transpose_agrees(isa, table, dtype, unrounded);
    test_low_rank(isa, table, dtype);
    test_elementwise(isa, table, dtype, 5, 77, activation);
    test_elementwise(isa, table, dtype, 1100, 3, activation);
    for (const int64_t cols : {1, 16, 77, 300, 2100})
      for (const bool even : {false, true}) test_rows(isa, table, dtype, 9, cols, even);
    for (const int64_t experts : {1, 7, 64, 130}) {
      test_top_k(isa, table, dtype, experts, std::min<int64_t>(experts, 8));
      test_top_k(isa, table, dtype, experts, experts);
    }
  }
  std::printf("%s: %s\n", isa, failures == before ? "passed" : "FAILED");
}

}  // namespace
}  // namespace ffn_ops

int main() {
  using namespace ffn_ops;
  test_printing();
  test_alone();
  test_few_rows();
  for (const Isa isa : kIsas) {
    const KernelTable* table = kernel_table(isa);
    if (table && isa_supported(isa)) test_table(isa_name(isa), *table);
  }
#if defined(__x86_64__)
  if (isa_supported(Isa::avx512)) test_table("avx512_bf16, emulated", avx512_bf16_emulated::kTable);
#endif
  return failures ? 1 : 0;
}
