// moe on the CPU: every expert's feed-forward layer over its routed rows, gathered on the fly and combined per token,
// and its backward. Without a routing the rows stand in order already and nothing is combined.
#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <functional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "routes.h"

namespace ffn_ops {
namespace {

// What a product over experts writes is held for a slab of columns of at most this size until tokens gather from it.
constexpr int64_t kSlabBytes = int64_t{64} << 20;

struct Moe {
  DType dtype;
  int64_t T = 0, D = 0, F = 0, O = 0, E = 0, R = 0;
  bool gated = false, routed = false;
  int activation = 0;
  double beta = 1.0;
  Routes routes;
  const int64_t* offsets = nullptr;
  const void* weight = nullptr;
  std::vector<Segment> segments;
  std::vector<Tensor> keep;
  std::deque<std::array<Operand, 2>> operands;  // products point to them
  std::deque<std::array<const void*, 2>> biases;

  int64_t hidden() const { return gated ? 2 * F : F; }
  const Operand* hold(const Operand& first, const Operand& second = {}) {
    return operands.emplace_back(std::array{first, second}).data();
  }
  const void* const* hold_bias(const void* first, const void* second = nullptr) {
    return biases.emplace_back(std::array{first, second}).data();
  }
  // Rows of an expert in a tensor of tokens.
  Matrix rows_of(const Tensor& t, const Segment& s) const {
    Matrix m = matrix(t, dtype, routed ? 0 : s.begin);
    if (routed) m.rows = routes.token + s.begin;
    return m;
  }
  const void* row_weight(const Segment& s) const { return advance(weight, s.begin, arithmetic_dtype(dtype)); }
};

Moe check_moe(const Tensor& x, const std::optional<Tensor>& token, const std::optional<Tensor>& weight,
              const Tensor& offsets, const std::optional<Tensor>& row, const std::optional<Tensor>& token_offsets,
              const Tensor& w_in, const Tensor& w_down, const std::optional<Tensor>& b_in,
              const std::optional<Tensor>& b_down, bool gated, const std::string& activation, double beta) {
  Moe c;
  c.dtype = storage_dtype(x, "x");
  check_tensor(x, "x", c.dtype, {-1, -1});
  c.T = x.size(0);
  c.D = x.size(1);
  c.gated = gated;
  check_tensor(w_in, "w_in", c.dtype, {-1, -1, c.D});
  c.E = w_in.size(0);
  STD_TORCH_CHECK(c.E > 0, "w_in: expected at least one expert, got ", shape_text(w_in));
  STD_TORCH_CHECK(!gated || w_in.size(1) % 2 == 0, "w_in: expected [E, 2F, D], gate rows first, got ",
                  shape_text(w_in));
  c.F = gated ? w_in.size(1) / 2 : w_in.size(1);
  check_tensor(w_down, "w_down", c.dtype, {c.E, -1, c.F});
  c.O = w_down.size(1);
  if (b_in) check_tensor(*b_in, "b_in", c.dtype, {c.E, w_in.size(1)});
  if (b_down) check_tensor(*b_down, "b_down", c.dtype, {c.E, c.O});
  c.activation = check_activation(activation);
  c.beta = beta;

  c.routed = token.has_value();
  STD_TORCH_CHECK(
      c.routed == weight.has_value() && c.routed == row.has_value() && c.routed == token_offsets.has_value(),
      "routing: expected token, weight, row and token_offsets together, or none of them");
  c.R = c.routed ? token->numel() : c.T;
  c.offsets = check_offsets(offsets, "offsets", c.E, c.R, c.keep);
  c.routes.kept = c.offsets[c.E];
  c.routes.tokens = c.T;
  c.segments = segments(c.offsets, c.E);
  if (!c.routed) return c;
  c.routes.token = check_indices(*token, "token", c.R, c.T - 1, c.keep);
  c.routes.row = check_indices(*row, "row", c.R, c.R - 1, c.keep);
  c.routes.token_offsets = check_offsets(*token_offsets, "token_offsets", c.T, c.R, c.keep);
  check_tensor(*weight, "weight", arithmetic_dtype(c.dtype), {c.R});
  c.weight = bias_data(weight, c.keep);
  return c;
}

const void* dense_bias(const std::optional<Tensor>& bias, std::vector<Tensor>& keep) {
  if (!bias) return nullptr;
  keep.push_back(torch::stable::contiguous(*bias));
  return keep.back().const_data_ptr();
}

// Gate and up (saved where given) and h (where given) of every row.
void add_pre_activations(Steps& steps, Moe& c, const Tensor& x, const Tensor& w_in, const std::optional<Tensor>& b_in,
                         void* gate, void* up, void* h) {
  const void* bias = dense_bias(b_in, c.keep);
  std::vector<Gemm> products;
  for (const Segment& s : c.segments) {
    Gemm g;
    g.M = s.rows();
    g.N = c.F;
    g.K = c.D;
    g.a = lanes_are_rows(c.rows_of(x, s));
    const void* in_bias = advance(bias, s.expert * c.hidden(), c.dtype);
    const Operand in = lanes_are_rows(expert_matrix(w_in, c.dtype, s.expert));
    Epilogue& e = g.epilogue;
    if (c.gated) {
      g.gated = true;
      g.num_b = 2;
      g.b = c.hold(in, lanes_are_rows(expert_matrix(w_in, c.dtype, s.expert, c.F)));
      e.bias = c.hold_bias(in_bias, advance(in_bias, c.F, c.dtype));
    } else {
      g.b = c.hold(in);
      e.bias = c.hold_bias(in_bias);
    }
    e.kind = Epilogue::Kind::kActivate;
    e.dtype = c.dtype;
    e.out = advance(h, s.begin * c.F, c.dtype);
    e.out_stride = c.F;
    e.gate = advance(gate, s.begin * c.F, c.dtype);
    e.up = advance(up, s.begin * c.F, c.dtype);
    e.pre_stride = c.F;
    e.activation = c.activation;
    e.beta = c.beta;
    products.push_back(g);
  }
  steps.products(products);
}

// out[t] = sum over the rows r of token t of weight[r] (none: 1) * (rows[r] weights^T + bias), where weights(e, column)
// gives the weights of an expert from an output column on; without a routing out[r] itself.
template <class WeightsFrom>
void add_combined_product(Steps& steps, Workspace& workspace, Moe& c, const void* rows, int64_t K, int64_t N,
                          const WeightsFrom& weights, const void* bias, const void* row_weight, void* out) {
  const int64_t size = storage_size(arithmetic_dtype(c.dtype));
  constexpr int64_t kColumns = 128;  // a multiple of every tile's width
  int64_t most = N;
  if (c.routed) most = kSlabBytes / std::max<int64_t>(1, c.routes.kept * size) / kColumns * kColumns;
  const int64_t cols = std::min(N, std::max(kColumns, most));
  void* slab = c.routed ? workspace.take(static_cast<size_t>(c.routes.kept * cols * size)) : out;
  for (int64_t col = 0; col < N; col += cols) {
    const int64_t width = std::min(cols, N - col);
    std::vector<Gemm> products;
    for (const Segment& s : c.segments) {
      Gemm g;
      g.M = s.rows();
      g.N = width;
      g.K = K;
      g.a = lanes_are_rows(dense(advance(rows, s.begin * K, c.dtype), K, c.dtype));
      g.b = c.hold(weights(s.expert, col));
      g.epilogue.dtype = c.dtype;
      g.epilogue.out_unrounded = c.routed;
      g.epilogue.out = static_cast<char*>(slab) + s.begin * width * storage_size(g.epilogue.out_dtype());
      g.epilogue.out_stride = width;
      if (bias) g.epilogue.bias = c.hold_bias(advance(bias, s.expert * N + col, c.dtype));
      products.push_back(g);
    }
    steps.products(products);
    if (!c.routed) continue;
    MoveRows m;
    m.routes = c.routes;
    m.cols = width;
    m.in = dense(slab, width, arithmetic_dtype(c.dtype));
    m.weight = row_weight;
    m.out = advance(out, col, c.dtype);
    m.out_stride = N;
    m.out_dtype = c.dtype;
    add_combine(steps, m);
  }
  if (!c.routed) zero_rows(steps, out, c.routes.kept, c.R, N * storage_size(c.dtype));
}

std::tuple<Tensor, Tensor, Tensor> moe(const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight,
                                       const Tensor& offsets, std::optional<Tensor> row,
                                       std::optional<Tensor> token_offsets, const Tensor& w_in, const Tensor& w_down,
                                       std::optional<Tensor> b_in, std::optional<Tensor> b_down, bool gated,
                                       std::string activation, double beta, bool save) {
  Moe c = check_moe(x, token, weight, offsets, row, token_offsets, w_in, w_down, b_in, b_down, gated, activation, beta);
  Tensor y = fresh(x, {c.T, c.O});
  Tensor gate = save ? recycled(x, {c.R, c.F}) : nothing(x);
  Tensor up = save && c.gated ? recycled(x, {c.R, c.F}) : nothing(x);

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  const int64_t row_bytes = c.F * storage_size(c.dtype);
  void* h = workspace.take(static_cast<size_t>(c.routes.kept * row_bytes));
  add_pre_activations(steps, c, x, w_in, b_in, save ? gate.mutable_data_ptr() : nullptr,
                      save && c.gated ? up.mutable_data_ptr() : nullptr, h);
  const auto down = [&](int64_t e, int64_t col) { return lanes_are_rows(expert_matrix(w_down, c.dtype, e, col)); };
  add_combined_product(steps, workspace, c, h, c.F, c.O, down, dense_bias(b_down, c.keep), c.weight,
                       y.mutable_data_ptr());
  if (save) zero_rows(steps, gate.mutable_data_ptr(), c.routes.kept, c.R, row_bytes);
  if (save && c.gated) zero_rows(steps, up.mutable_data_ptr(), c.routes.kept, c.R, row_bytes);
  steps.run();
  return {y, gate, up};
}

// d_hidden [R, 2F] (d_gate, then d_up) and h, times the row's weight where there is one; parts of the gradient of the
// weight (null: not routed).
void add_hidden_gradient(Steps& steps, Moe& c, const Tensor& d_y, const Tensor& w_down, const void* gate,
                         const void* up, void* d_hidden, void* h, void* parts, int64_t num_parts) {
  std::vector<Gemm> products;
  for (const Segment& s : c.segments) {
    Gemm g;
    g.M = s.rows();
    g.N = c.F;
    g.K = c.O;
    g.a = lanes_are_rows(c.rows_of(d_y, s));
    g.b = c.hold(lanes_are_columns(expert_matrix(w_down, c.dtype, s.expert)));
    Epilogue& e = g.epilogue;
    e.kind = Epilogue::Kind::kActivateGrad;
    e.dtype = c.dtype;
    e.out = advance(d_hidden, s.begin * c.hidden(), c.dtype);
    e.out_up = c.gated ? advance(e.out, c.F, c.dtype) : nullptr;
    e.out_stride = c.hidden();
    e.h = advance(h, s.begin * c.F, c.dtype);
    e.gate = advance(const_cast<void*>(gate), s.begin * c.F, c.dtype);
    e.up = advance(const_cast<void*>(up), s.begin * c.F, c.dtype);
    e.pre_stride = c.F;
    e.activation = c.activation;
    e.beta = c.beta;
    if (c.routed) {
      e.row_weight = c.row_weight(s);
      e.row_dots = advance(parts, s.begin * num_parts, e.arithmetic());
      e.row_dots_stride = num_parts;
    }
    products.push_back(g);
  }
  steps.products(products);
}

// Of each row: the sum of its parts, and d_y of its token times its expert's bias.
void add_weight_gradient(Steps& steps, const Moe& c, const Tensor& d_y, const void* bias, const void* parts,
                         int64_t num_parts, void* out) {
  const DType arithmetic = arithmetic_dtype(c.dtype);
  std::vector<RowDots> dots;  // one for each segment
  for (const Segment& s : c.segments) {
    RowDots d;
    d.a = d.b = dense(nullptr, 0, c.dtype);
    if (bias) {
      d.cols = c.O;
      d.a = c.rows_of(d_y, s);
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

// Of each expert: out[M, N] = sum over its rows of a(row)^T b(row). Experts without rows get zeros.
template <class RowsOf>
void add_outer_products(Steps& steps, Moe& c, int64_t M, int64_t N, const RowsOf& a, const RowsOf& b, void* out) {
  const int64_t size = storage_size(c.dtype);
  std::vector<Gemm> products;
  for (const Segment& s : c.segments) {
    Gemm g;
    g.M = M;
    g.N = N;
    g.K = s.rows();
    g.a = lanes_are_columns(a(s));
    g.b = c.hold(lanes_are_columns(b(s)));
    g.epilogue.dtype = c.dtype;
    g.epilogue.out = static_cast<char*>(out) + s.expert * M * N * size;
    g.epilogue.out_stride = N;
    products.push_back(g);
  }
  steps.products(products);
  std::vector<char*> empty;
  for (int64_t e = 0; e < c.E; ++e)
    if (c.offsets[e] == c.offsets[e + 1]) empty.push_back(static_cast<char*>(out) + e * M * N * size);
  if (empty.empty()) return;
  const auto bytes = static_cast<size_t>(M * N * size);
  steps.pass(static_cast<int64_t>(empty.size()),
             [=](int64_t task, int64_t) { std::memset(empty[static_cast<size_t>(task)], 0, bytes); });
}

// Of each expert: out[N] = sum over its rows of weight * m(row).
template <class RowsOf>
void add_bias_gradients(Steps& steps, const Moe& c, int64_t N, const RowsOf& rows, bool weighted, void* out) {
  constexpr int64_t kColumns = 64;
  const KernelTable& table = kernels();
  std::vector<ColumnSum> sums;
  for (int64_t e = 0; e < c.E; ++e) {
    const Segment s{e, c.offsets[e], c.offsets[e + 1]};
    sums.push_back({s.rows(), N, rows(s), weighted ? c.row_weight(s) : nullptr, advance(out, e * N, c.dtype)});
  }
  const int64_t pieces = divide_up(N, kColumns);
  steps.pass(c.E * pieces, [=, &table](int64_t task, int64_t) {
    const int64_t col = task % pieces * kColumns;
    table.column_sum(sums[static_cast<size_t>(task / pieces)], col, std::min(N, col + kColumns));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_backward(
    const Tensor& d_y, const Tensor& x, std::optional<Tensor> token, std::optional<Tensor> weight,
    const Tensor& offsets, std::optional<Tensor> row, std::optional<Tensor> token_offsets, const Tensor& w_in,
    const Tensor& w_down, std::optional<Tensor> b_in, std::optional<Tensor> b_down, const Tensor& gate,
    const Tensor& up, bool gated, std::string activation, double beta, std::vector<bool> needs) {
  check_needs(needs, 6);
  Moe c = check_moe(x, token, weight, offsets, row, token_offsets, w_in, w_down, b_in, b_down, gated, activation, beta);
  check_tensor(d_y, "d_y", c.dtype, {c.T, c.O});
  const bool recompute = gate.dim() == 1;  // an empty vector stands for "not saved"
  if (!recompute) {
    check_tensor(gate, "gate", c.dtype, {c.R, c.F});
    if (c.gated) check_tensor(up, "up", c.dtype, {c.R, c.F});
    STD_TORCH_CHECK(gate.is_contiguous() && up.is_contiguous(), "gate, up: expected the tensors that moe saved");
  }
  const bool need_x = needs.at(0), need_weight = needs.at(1) && c.routed, need_in = needs.at(2);
  const bool need_down = needs.at(3), need_b_in = needs.at(4), need_b_down = needs.at(5);
  const bool need_hidden = need_x || need_in || need_b_in || need_weight;
  const int64_t element = storage_size(c.dtype);
  const DType arithmetic = arithmetic_dtype(c.dtype);

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  const auto rows_bytes = [&](int64_t width) { return static_cast<size_t>(c.routes.kept * width * element); };
  const void* gate_data = gate.const_data_ptr();
  const void* up_data = c.gated ? up.const_data_ptr() : nullptr;
  if (recompute && (need_hidden || need_down)) {
    void* fresh_gate = workspace.take(rows_bytes(c.F));
    void* fresh_up = c.gated ? workspace.take(rows_bytes(c.F)) : nullptr;
    add_pre_activations(steps, c, x, w_in, b_in, fresh_gate, fresh_up, nullptr);
    gate_data = fresh_gate;
    up_data = fresh_up;
  }

  void *d_hidden = nullptr, *h = nullptr, *parts = nullptr;
  const KernelTable& table = kernels();
  const int64_t num_parts = divide_up(c.F, table.tile_vectors * table.lanes * 4 / storage_size(arithmetic));
  if (need_down) h = workspace.take(rows_bytes(c.F));
  if (need_hidden) {
    d_hidden = workspace.take(rows_bytes(c.hidden()));
    if (c.routed) parts = workspace.take(static_cast<size_t>(c.routes.kept * num_parts * storage_size(arithmetic)));
    add_hidden_gradient(steps, c, d_y, w_down, gate_data, up_data, d_hidden, h, parts, num_parts);
  } else if (need_down) {
    // The same kernel as in the epilogue, so that the bits do not depend on which gradients are asked for.
    GatedAct a;
    a.rows = c.routes.kept;
    a.cols = a.out_stride = c.F;
    a.gate = a.d_out = dense(gate_data, c.F, c.dtype);
    if (c.gated) a.up = dense(up_data, c.F, c.dtype);
    a.out[2] = h;
    a.row_weight = c.weight;
    a.activation = c.activation;
    a.beta = c.beta;
    add_gated_act_backward(steps, a);
  }

  Tensor d_weight = need_weight ? fresh(*weight, {c.R}) : nothing(x);
  if (need_weight) {
    add_weight_gradient(steps, c, d_y, dense_bias(b_down, c.keep), parts, num_parts, d_weight.mutable_data_ptr());
    zero_rows(steps, d_weight.mutable_data_ptr(), c.routes.kept, c.R, storage_size(arithmetic));
  }

  using RowsOf = std::function<Matrix(const Segment&)>;
  const auto dense_rows = [&c](void* data, int64_t width) -> RowsOf {
    return
        [&c, data, width](const Segment& s) { return dense(advance(data, s.begin * width, c.dtype), width, c.dtype); };
  };
  const auto token_rows = [&c](const Tensor& t) -> RowsOf {
    return [&c, &t](const Segment& s) { return c.rows_of(t, s); };
  };

  Tensor d_w_down = need_down ? recycled(x, {c.E, c.O, c.F}) : nothing(x);
  if (need_down)
    add_outer_products(steps, c, c.O, c.F, token_rows(d_y), dense_rows(h, c.F), d_w_down.mutable_data_ptr());

  Tensor d_x = need_x ? fresh(x, {c.T, c.D}) : nothing(x);
  if (need_x) {
    const auto in = [&](int64_t e, int64_t col) { return lanes_are_columns(expert_matrix(w_in, c.dtype, e, 0, col)); };
    add_combined_product(steps, workspace, c, d_hidden, c.hidden(), c.D, in, nullptr, nullptr, d_x.mutable_data_ptr());
  }

  Tensor d_w_in = need_in ? recycled(x, {c.E, c.hidden(), c.D}) : nothing(x);
  if (need_in)
    add_outer_products(steps, c, c.hidden(), c.D, dense_rows(d_hidden, c.hidden()), token_rows(x),
                       d_w_in.mutable_data_ptr());
  Tensor d_b_in = need_b_in ? fresh(x, {c.E, c.hidden()}) : nothing(x);
  if (need_b_in)
    add_bias_gradients(steps, c, c.hidden(), dense_rows(d_hidden, c.hidden()), false, d_b_in.mutable_data_ptr());
  Tensor d_b_down = need_b_down ? fresh(x, {c.E, c.O}) : nothing(x);
  if (need_b_down) add_bias_gradients(steps, c, c.O, token_rows(d_y), c.routed, d_b_down.mutable_data_ptr());
  steps.run();
  return {d_x, d_weight, d_w_in, d_w_down, d_b_in, d_b_down};
}

// rows[r] w[e]^T, rows behind the experts' zero.
Tensor moe_linear(const Tensor& rows, const Tensor& w, const Tensor& offsets) {
  Moe c;
  c.dtype = storage_dtype(rows, "rows");
  check_tensor(rows, "rows", c.dtype, {-1, -1});
  check_tensor(w, "w", c.dtype, {-1, -1, rows.size(1)});
  c.E = w.size(0);
  c.R = rows.size(0);
  c.routed = false;
  c.offsets = check_offsets(offsets, "offsets", c.E, c.R, c.keep);
  c.routes.kept = c.offsets[c.E];
  c.segments = segments(c.offsets, c.E);
  const int64_t N = w.size(1);
  Tensor out = fresh(rows, {c.R, N});
  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  std::vector<Gemm> products;
  for (const Segment& s : c.segments) {
    Gemm g;
    g.M = s.rows();
    g.N = N;
    g.K = rows.size(1);
    g.a = lanes_are_rows(c.rows_of(rows, s));
    g.b = c.hold(lanes_are_rows(expert_matrix(w, c.dtype, s.expert)));
    g.epilogue.dtype = c.dtype;
    g.epilogue.out = advance(out.mutable_data_ptr(), s.begin * N, c.dtype);
    g.epilogue.out_stride = N;
    products.push_back(g);
  }
  steps.products(products);
  zero_rows(steps, out.mutable_data_ptr(), c.routes.kept, c.R, N * storage_size(c.dtype));
  steps.run();
  return out;
}

// out[e] = sum over the rows of e of a[r]^T b[r].
Tensor moe_outer(const Tensor& a, const Tensor& b, const Tensor& offsets) {
  Moe c;
  c.dtype = storage_dtype(a, "a");
  check_tensor(a, "a", c.dtype, {-1, -1});
  check_tensor(b, "b", c.dtype, {a.size(0), -1});
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0, "offsets: expected shape [E + 1], got ",
                  shape_text(offsets));
  c.E = offsets.size(0) - 1;
  c.R = a.size(0);
  c.routed = false;
  c.offsets = check_offsets(offsets, "offsets", c.E, c.R, c.keep);
  c.routes.kept = c.offsets[c.E];
  c.segments = segments(c.offsets, c.E);
  Tensor out = fresh(a, {c.E, a.size(1), b.size(1)});
  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  using RowsOf = std::function<Matrix(const Segment&)>;
  const RowsOf a_rows = [&](const Segment& s) { return c.rows_of(a, s); };
  const RowsOf b_rows = [&](const Segment& s) { return c.rows_of(b, s); };
  add_outer_products(steps, c, a.size(1), b.size(1), a_rows, b_rows, out.mutable_data_ptr());
  steps.run();
  return out;
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("moe", TORCH_BOX(&ffn_ops::moe));
  m.impl("moe_backward", TORCH_BOX(&ffn_ops::moe_backward));
  m.impl("moe_linear", TORCH_BOX(&ffn_ops::moe_linear));
  m.impl("moe_outer", TORCH_BOX(&ffn_ops::moe_outer));
}
