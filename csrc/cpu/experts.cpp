// SPDX-License-Identifier: BSD-3-Clause
// See experts.h.
#include "experts.h"

#include <algorithm>
#include <cstring>

namespace ffn_ops {
namespace {

// The output of a product over experts is held for a slab of columns of at most this size, until tokens gather from it.
constexpr int64_t kSlabBytes = int64_t{64} << 20;

}  // namespace

Experts with_routes(const MoeShape& s, const std::optional<Tensor>& token, const std::optional<Tensor>& weight,
                    const Tensor& offsets, const std::optional<Tensor>& row,
                    const std::optional<Tensor>& slot_offsets) {
  Experts c;
  c.dtype = s.dtype;
  c.T = s.T;
  c.D = s.D;
  c.F = s.F;
  c.O = s.O;
  c.gated = s.gated;
  c.interleaved = s.interleaved;
  c.routed = s.routed;
  c.form = s.form;
  c.set_rows(offsets, s.E, s.R);
  c.routes.tokens = c.T;
  if (!c.routed) return c;
  c.routes.token = check_indices(*token, "token", c.R, c.T - 1, c.keep);
  c.routes.row = check_indices(*row, "row", c.R, c.R - 1, c.keep);
  c.routes.slot_offsets = check_offsets(*slot_offsets, "slot_offsets", c.T, c.R, c.keep);
  check_agreement(c.routes);
  c.weight = dense_data(weight, c.keep);
  return c;
}

void add_pre_activations(Steps& steps, Workspace& workspace, Experts& c, const Tensor& x, const StackedWeight& w_in,
                         const std::optional<Tensor>& b_in, void* gate, void* up, void* h) {
  const SmallRows small = add_down_projection(steps, workspace, c, c.lora_in, c.lora_b_in, token_rows(c, x));
  const auto lora_b = [&](int64_t expert, int64_t row) {
    Matrix m = c.lora_b_in(expert, row, 0);
    if (c.interleaved) m.row_stride *= 2;
    return lanes_are_rows(m);
  };
  const void* bias = dense_data(b_in && c.interleaved ? gate_then_up(*b_in) : b_in, c.keep);
  const RowsOf tokens = token_rows(c, x);
  std::vector<Gemm> products;
  for (const Segment& s : c.segments) {
    Gemm g;
    g.M = s.rows();
    g.N = c.F;
    g.K = c.D;
    g.a = lanes_are_rows(tokens(s));
    const void* in_bias = advance(bias, s.expert * c.hidden(), c.dtype);
    Matrix in = w_in(s.expert, 0, 0);
    Epilogue& e = g.epilogue;
    if (c.gated) {
      g.gated = true;
      g.num_b = 2;
      Matrix up_rows = w_in(s.expert, c.interleaved ? 1 : c.F, 0);
      if (c.interleaved) in.row_stride = up_rows.row_stride = 2 * in.row_stride;
      g.b = c.hold(lanes_are_rows(in), lanes_are_rows(up_rows));
      e.bias = c.hold_bias(in_bias, advance(in_bias, c.F, c.dtype));
    } else {
      g.b = c.hold(lanes_are_rows(in));
      e.bias = c.hold_bias(in_bias);
    }
    e.kind = Epilogue::Kind::kActivate;
    e.dtype = c.dtype;
    e.out = advance(h, s.begin * c.F, c.dtype);
    e.out_stride = c.F;
    e.gate = advance(gate, s.begin * c.F, c.dtype);
    e.up = advance(up, s.begin * c.F, c.dtype);
    e.pre_stride = c.F;
    if (small.data)
      small.join(e, s, c.hold(lora_b(s.expert, 0), c.gated ? lora_b(s.expert, c.interleaved ? 1 : c.F) : Operand{}));
    e.set_form(c.form);
    products.push_back(g);
  }
  steps.products(products);
}

void add_combined_product(Steps& steps, Workspace& workspace, Experts& c, const RowsOf& rows, int64_t K, int64_t N,
                          const WeightsFrom& weights, const void* bias, const void* row_weight, void* out,
                          const SmallRows& small, const WeightsFrom& second) {
  const DType arithmetic = arithmetic_dtype(c.dtype);
  const int64_t size = storage_size(arithmetic);
  constexpr int64_t kColumns = 128;  // a multiple of every tile's width
  int64_t most = N;
  if (c.routed) most = kSlabBytes / std::max<int64_t>(1, c.routes.kept * size) / kColumns * kColumns;
  const int64_t cols = std::min(N, std::max(kColumns, most));
  void* slab =
      c.routed ? workspace.take(static_cast<size_t>(c.routes.kept * cols * size), "what the experts give") : out;
  for (int64_t col = 0; col < N; col += cols) {
    const int64_t width = std::min(cols, N - col);
    std::vector<Gemm> products;
    for (const Segment& s : c.segments) {
      Gemm g;
      g.M = s.rows();
      g.N = width;
      g.K = K;
      g.a = lanes_are_rows(rows(s));
      g.b = second ? c.hold(weights(s.expert, col), second(s.expert, col)) : c.hold(weights(s.expert, col));
      g.num_b = second ? 2 : 1;
      g.epilogue.dtype = c.dtype;
      g.epilogue.out_unrounded = c.routed;
      g.epilogue.out = static_cast<char*>(slab) + s.begin * width * storage_size(g.epilogue.out_dtype());
      g.epilogue.out_stride = width;
      if (small.data) small.join(g.epilogue, s, c.hold(small.weights(s.expert, col)));
      if (bias) g.epilogue.bias = c.hold_bias(advance(bias, s.expert * N + col, c.dtype));
      products.push_back(g);
    }
    steps.products(products);
    if (!c.routed) continue;
    MoveRows m;
    m.routes = c.routes;
    m.cols = width;
    m.in = dense(slab, width, arithmetic);
    m.weight = row_weight;
    m.out = advance(out, col, c.dtype);
    m.out_stride = N;
    m.out_dtype = c.dtype;
    add_combine(steps, m);
  }
  if (!c.routed) zero_rows(steps, out, c.routes.kept, c.R, N * storage_size(c.dtype));
}

std::tuple<Tensor, Tensor, Tensor> run_experts(Experts& c, const Tensor& x, const StackedWeight& w_in,
                                               const StackedWeight& w_down, const std::optional<Tensor>& b_in,
                                               const std::optional<Tensor>& b_down, bool save) {
  Tensor y = fresh(x, {c.T, c.O});
  Tensor gate = save ? fresh(x, {c.R, c.F}) : nothing(x);
  Tensor up = save && c.gated ? fresh(x, {c.R, c.F}) : nothing(x);

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  add_factors(steps, workspace, c, true);
  void* h = take_rows(workspace, c, c.F, c.dtype, "h");
  add_pre_activations(steps, workspace, c, x, w_in, b_in, save ? gate.mutable_data_ptr() : nullptr,
                      save && c.gated ? up.mutable_data_ptr() : nullptr, h);
  const RowsOf h_rows = dense_rows(h, c.F, c.dtype);
  const SmallRows small = add_down_projection(steps, workspace, c, c.lora_down, c.lora_b_down, h_rows);
  add_combined_product(steps, workspace, c, h_rows, c.F, c.O, rows_of(w_down), dense_data(b_down, c.keep), c.weight,
                       y.mutable_data_ptr(), small);
  const int64_t row_bytes = c.F * storage_size(c.dtype);
  if (save) zero_rows(steps, gate.mutable_data_ptr(), c.routes.kept, c.R, row_bytes);
  if (save && c.gated) zero_rows(steps, up.mutable_data_ptr(), c.routes.kept, c.R, row_bytes);
  steps.run();
  return {y, gate, up};
}

Tensor run_linear(Experts& c, const Tensor& rows, int64_t N, const WeightsFrom& weights) {
  Tensor out = fresh(rows, {c.R, N});
  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  add_combined_product(steps, workspace, c, token_rows(c, rows), rows.size(1), N, weights, nullptr, nullptr,
                       out.mutable_data_ptr());
  steps.run();
  return out;
}

void add_hidden_gradient(Steps& steps, Experts& c, const Tensor& d_y, const StackedWeight& w_down, const void* gate,
                         const void* up, void* d_hidden, void* h, DType h_dtype, void* parts, int64_t num_parts,
                         const SmallRows& small) {
  const RowsOf tokens = token_rows(c, d_y);
  const int64_t d_stride = apart(c.hidden(), c.dtype);
  std::vector<Gemm> products;
  for (const Segment& s : c.segments) {
    Gemm g;
    g.M = s.rows();
    g.N = c.F;
    g.K = c.O;
    g.a = lanes_are_rows(tokens(s));
    g.b = c.hold(lanes_are_columns(w_down(s.expert, 0, 0)));
    Epilogue& e = g.epilogue;
    e.kind = Epilogue::Kind::kActivateGrad;
    e.dtype = c.dtype;
    e.out = advance(d_hidden, s.begin * d_stride, c.dtype);
    e.out_up = c.gated && !c.interleaved ? advance(e.out, c.F, c.dtype) : nullptr;
    e.interleaved = c.interleaved;
    e.out_stride = d_stride;
    e.h = advance(h, s.begin * c.F, h_dtype);
    e.h_unrounded = h_dtype != c.dtype;
    e.gate = advance(const_cast<void*>(gate), s.begin * c.F, c.dtype);
    e.up = advance(const_cast<void*>(up), s.begin * c.F, c.dtype);
    e.pre_stride = c.F;
    if (small.data) small.join(e, s, c.hold(small.weights(s.expert, 0)));
    e.set_form(c.form);
    if (c.routed) {
      e.row_weight = c.row_weight(s);
      e.row_dots = advance(parts, s.begin * num_parts, e.arithmetic());
      e.row_dots_stride = num_parts;
    }
    products.push_back(g);
  }
  steps.products(products);
}

void add_routing_weight_gradient(Steps& steps, const Experts& c, const Tensor& d_y, const void* bias, const void* parts,
                                 int64_t num_parts, void* out) {
  const DType arithmetic = arithmetic_dtype(c.dtype);
  const RowsOf tokens = token_rows(c, d_y);
  std::vector<RowDots> dots;  // one for each segment
  for (const Segment& s : c.segments) {
    RowDots d;
    d.a = d.b = dense(nullptr, 0, c.dtype);
    if (bias) {
      d.cols = c.O;
      d.a = tokens(s);
      d.b.data = advance(bias, s.expert * c.O, c.dtype);
    }
    d.parts = advance(parts, s.begin * num_parts, arithmetic);
    d.num_parts = num_parts;
    d.out = advance(out, s.begin, arithmetic);
    dots.push_back(d);
  }
  const int64_t rows = rows_of_task((bias ? c.O : 0) + num_parts);
  const KernelTable& table = kernels();
  steps.pass(divide_up(c.routes.kept, rows), [=, &table, &c](int64_t task, int64_t) {
    const int64_t begin = task * rows, end = std::min(c.routes.kept, begin + rows);
    for (size_t i = 0; i < dots.size(); ++i) {
      const Segment& s = c.segments[i];
      if (s.begin < end && begin < s.end)
        table.row_dots(dots[i], std::max(begin, s.begin) - s.begin, std::min(end, s.end) - s.begin);
    }
  });
}

void add_outer_products(Steps& steps, Experts& c, int64_t M, int64_t N, const RowsOf& a, const RowsOf& b, DType dtype,
                        void* out) {
  const int64_t size = storage_size(dtype);
  std::vector<Gemm> products;
  for (const Segment& s : c.segments) {
    Gemm g;
    g.M = M;
    g.N = N;
    g.K = s.rows();
    g.a = lanes_are_columns(a(s));
    g.b = c.hold(lanes_are_columns(b(s)));
    g.mixed = g.a.matrix.dtype != dtype || g.b[0].matrix.dtype != dtype;
    g.epilogue.dtype = dtype;
    g.epilogue.out = static_cast<char*>(out) + s.expert * M * N * size;
    g.epilogue.out_stride = N;
    products.push_back(g);
  }
  steps.products(products);
  const std::vector<char*> empty = without_rows(c, out, M * N * size);
  if (!empty.empty()) steps.pass(static_cast<int64_t>(empty.size()), zeros_of(empty, M * N * size));
}

void add_bias_gradients(Steps& steps, const Experts& c, int64_t N, const RowsOf& rows, bool weighted, void* out) {
  const KernelTable& table = kernels();
  std::vector<ColumnSum> sums;
  for (int64_t e = 0; e < c.E; ++e) {
    const Segment s{e, c.offsets[e], c.offsets[e + 1]};
    sums.push_back({s.rows(), N, rows(s), weighted ? c.row_weight(s) : nullptr, advance(out, e * N, c.dtype)});
  }
  const int64_t step = columns_of_task(N), pieces = divide_up(N, step);
  steps.pass(c.E * pieces, [=, &table](int64_t task, int64_t) {
    const int64_t col = task % pieces * step;
    table.column_sum(sums[static_cast<size_t>(task / pieces)], col, std::min(N, col + step));
  });
}

}  // namespace ffn_ops
