// The CPU side of every operator: checks, outputs, and the steps handed to the kernels of the chosen instruction set.
#include <atomic>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "schedule.h"

namespace ffn_ops {
namespace {

std::atomic<int> chosen_isa{-1};

Isa current_isa() {
  int isa = chosen_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    const IsaChoice choice = choose_isa();
    STD_TORCH_CHECK(choice.error.empty(), choice.error);
    isa = static_cast<int>(choice.isa);
    chosen_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

const KernelTable& kernels() { return *kernel_table(current_isa()); }

int64_t threads() { return torch::stable::get_num_threads(); }

Matrix matrix(const Tensor& t, DType dtype, int64_t from_row = 0) {
  Matrix m;
  m.row_stride = t.stride(0);
  m.col_stride = t.stride(1);
  m.dtype = dtype;
  m.data = static_cast<const char*>(t.const_data_ptr()) + from_row * m.row_stride * storage_size(dtype);
  return m;
}

Matrix dense(const void* data, int64_t row_stride, DType dtype) { return {data, row_stride, 1, dtype, nullptr}; }

// Element (lane, k) of the product is matrix(lane, k).
Operand lanes_are_rows(Matrix m) {
  Operand op;
  op.matrix = m;
  // A transposed weight: its columns are dense, so it is read as the other kind.
  if (m.col_stride != 1 && m.row_stride == 1 && !m.rows) {
    std::swap(op.matrix.row_stride, op.matrix.col_stride);
    op.k_along_rows = true;
  }
  return op;
}

// Element (lane, k) of the product is matrix(k, lane).
Operand lanes_are_columns(Matrix m) {
  Operand op;
  op.matrix = m;
  op.k_along_rows = true;
  if (m.col_stride != 1 && m.row_stride == 1 && !m.rows) {
    std::swap(op.matrix.row_stride, op.matrix.col_stride);
    op.k_along_rows = false;
  }
  return op;
}

Tensor fresh(const Tensor& like, DType dtype, std::initializer_list<int64_t> sizes) {
  Tensor t = torch::stable::new_empty(like, std::vector<int64_t>(sizes));
  advise_huge_pages(t.mutable_data_ptr(), static_cast<size_t>(t.numel() * storage_size(dtype)));
  return t;
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, std::vector<int64_t>{0}); }

// A bias as the kernels read it. `keep` holds the dense copy of a strided one.
const void* bias_data(const std::optional<Tensor>& bias, std::vector<Tensor>& keep) {
  if (!bias) return nullptr;
  keep.push_back(bias->numel() < 2 || bias->stride(0) == 1 ? *bias : torch::stable::contiguous(*bias));
  return keep.back().const_data_ptr();
}

const void* advance(const void* data, int64_t elements, DType dtype) {
  return data ? static_cast<const char*>(data) + elements * storage_size(dtype) : nullptr;
}

void* advance(void* data, int64_t elements, DType dtype) {
  return data ? static_cast<char*>(data) + elements * storage_size(dtype) : nullptr;
}

void add_column_sum(Steps& steps, const Matrix& m, int64_t rows, int64_t cols, void* out) {
  constexpr int64_t kColumns = 64;
  const KernelTable& table = kernels();
  steps.pass((cols + kColumns - 1) / kColumns, [=, &table](int64_t task, int64_t) {
    table.column_sum({rows, cols, m, out}, task * kColumns, std::min(cols, (task + 1) * kColumns));
  });
}

// ---- gated_act --------------------------------------------------------------------------------------------------

// A 1-D view of dense tensors, else [rows, columns] with the strides of the last dimension; the Python side passes
// tensors of at most two dimensions.
struct Elementwise {
  GatedAct act;
  DType dtype;
  bool flat;
};

void check_same(const Tensor& t, const char* name, const Tensor& gate, DType dtype) {
  const auto sizes = gate.sizes();
  check_tensor(t, name, dtype, std::vector<int64_t>(sizes.begin(), sizes.end()));
}

GatedAct elementwise(const Tensor& gate, const std::optional<Tensor>& up, const std::string& activation, double beta) {
  const DType dtype = storage_dtype(gate, "gate");
  STD_TORCH_CHECK(gate.dim() == 2, "gate: expected shape [rows, columns], got ", shape_text(gate));
  check_same(gate, "gate", gate, dtype);
  if (up) check_same(*up, "up", gate, dtype);
  GatedAct g;
  g.rows = gate.size(0);
  g.cols = gate.size(1);
  g.gate = matrix(gate, dtype);
  if (up) g.up = matrix(*up, dtype);
  g.out_stride = g.cols;
  g.activation = check_activation(activation);
  g.beta = beta;
  return g;
}

using ElementwiseKernel = void (*)(const GatedAct&, int64_t, int64_t, int64_t, int64_t);

// Cuts rows, or the columns of a few long rows, into stretches of about 32 Ki elements.
void run_elementwise(GatedAct& g, ElementwiseKernel kernel) {
  constexpr int64_t kStretch = 1 << 15;
  if (g.rows == 0 || g.cols == 0) return;
  const bool flat = [&] {
    for (const Matrix* m : {&g.gate, &g.up, &g.d_out, &g.dd_gate, &g.dd_up})
      if (m->data && (m->col_stride != 1 || m->row_stride != g.cols)) return false;
    return true;
  }();
  if (flat) {
    g.cols *= g.rows;
    g.rows = 1;
  }
  const int64_t col_step = std::min(g.cols, kStretch);
  const int64_t row_step = std::max<int64_t>(1, kStretch / g.cols);
  const int64_t col_tasks = (g.cols + col_step - 1) / col_step;
  const int64_t tasks = col_tasks * ((g.rows + row_step - 1) / row_step);
  Phases phases;
  phases.add(tasks, [&](int64_t task, int64_t) {
    const int64_t r = task / col_tasks * row_step;
    const int64_t c = task % col_tasks * col_step;
    kernel(g, r, std::min(g.rows, r + row_step), c, std::min(g.cols, c + col_step));
  });
  phases.run(std::min(tasks, threads()));
}

Tensor gated_act(const Tensor& gate, std::optional<Tensor> up, std::string activation, double beta) {
  GatedAct g = elementwise(gate, up, activation, beta);
  Tensor out = fresh(gate, g.gate.dtype, {g.rows, g.cols});
  g.out[0] = out.mutable_data_ptr();
  run_elementwise(g, kernels().gated_act);
  return out;
}

std::tuple<Tensor, Tensor> gated_act_backward(const Tensor& d_out, const Tensor& gate, std::optional<Tensor> up,
                                              std::string activation, double beta, std::vector<bool> needs) {
  GatedAct g = elementwise(gate, up, activation, beta);
  check_same(d_out, "d_out", gate, g.gate.dtype);
  g.d_out = matrix(d_out, g.gate.dtype);
  Tensor d_gate = needs.at(0) ? fresh(gate, g.gate.dtype, {g.rows, g.cols}) : nothing(gate);
  Tensor d_up = needs.at(1) && up ? fresh(gate, g.gate.dtype, {g.rows, g.cols}) : nothing(gate);
  if (needs[0]) g.out[0] = d_gate.mutable_data_ptr();
  if (needs[1] && up) g.out[1] = d_up.mutable_data_ptr();
  run_elementwise(g, kernels().gated_act_backward);
  return {d_gate, d_up};
}

std::tuple<Tensor, Tensor, Tensor> gated_act_double_backward(std::optional<Tensor> dd_gate,
                                                             std::optional<Tensor> dd_up, const Tensor& d_out,
                                                             const Tensor& gate, std::optional<Tensor> up,
                                                             std::string activation, double beta) {
  GatedAct g = elementwise(gate, up, activation, beta);
  const DType dtype = g.gate.dtype;
  check_same(d_out, "d_out", gate, dtype);
  g.d_out = matrix(d_out, dtype);
  if (dd_gate) {
    check_same(*dd_gate, "dd_gate", gate, dtype);
    g.dd_gate = matrix(*dd_gate, dtype);
  }
  if (dd_up) {
    STD_TORCH_CHECK(up.has_value(), "dd_up: expected none where up is none");
    check_same(*dd_up, "dd_up", gate, dtype);
    g.dd_up = matrix(*dd_up, dtype);
  }
  Tensor by_d = fresh(gate, dtype, {g.rows, g.cols});
  Tensor by_gate = fresh(gate, dtype, {g.rows, g.cols});
  Tensor by_up = up ? fresh(gate, dtype, {g.rows, g.cols}) : nothing(gate);
  g.out[0] = by_d.mutable_data_ptr();
  g.out[1] = by_gate.mutable_data_ptr();
  if (up) g.out[2] = by_up.mutable_data_ptr();
  run_elementwise(g, kernels().gated_act_double_backward);
  return {by_d, by_gate, by_up};
}

// ---- gated_linear -----------------------------------------------------------------------------------------------

struct GatedLinear {
  DType dtype;
  int64_t T, D, F, G;
  std::vector<Operand> forward;   // gate and up weights of each branch, lanes = their rows
  std::vector<Operand> backward;  // all gate weights, then all up weights, k = their rows
  int activation;
};

GatedLinear check_gated_linear(const Tensor& x, const std::vector<Tensor>& w_gate, const std::vector<Tensor>& w_up,
                               const std::string& activation) {
  GatedLinear c;
  c.dtype = storage_dtype(x, "x");
  check_tensor(x, "x", c.dtype, {-1, -1});
  c.G = static_cast<int64_t>(w_gate.size());
  STD_TORCH_CHECK(c.G > 0 && w_up.size() == w_gate.size(), "w_up: expected as many weights as w_gate, at least one, got ",
                  w_up.size(), " and ", w_gate.size());
  c.T = x.size(0);
  c.D = x.size(1);
  STD_TORCH_CHECK(w_gate[0].dim() == 2, "w_gate: expected shape [F, D], got ", shape_text(w_gate[0]));
  c.F = w_gate[0].size(0);
  for (size_t i = 0; i < w_gate.size(); ++i) {
    check_tensor(w_gate[i], "w_gate", c.dtype, {c.F, c.D});
    check_tensor(w_up[i], "w_up", c.dtype, {c.F, c.D});
    c.forward.push_back(lanes_are_rows(matrix(w_gate[i], c.dtype)));
    c.forward.push_back(lanes_are_rows(matrix(w_up[i], c.dtype)));
  }
  for (const auto* list : {&w_gate, &w_up})
    for (const Tensor& w : *list) c.backward.push_back(lanes_are_columns(matrix(w, c.dtype)));
  c.activation = check_activation(activation);
  return c;
}

std::tuple<Tensor, Tensor, Tensor> gated_linear(const Tensor& x, std::vector<Tensor> w_gate, std::vector<Tensor> w_up,
                                                std::vector<Tensor> b_gate, std::vector<Tensor> b_up,
                                                std::string activation, double beta, bool save) {
  const GatedLinear c = check_gated_linear(x, w_gate, w_up, activation);
  std::vector<Tensor> keep;
  std::vector<const void*> bias(static_cast<size_t>(2 * c.G), nullptr);
  for (int half = 0; half < 2; ++half) {
    const std::vector<Tensor>& list = half ? b_up : b_gate;
    const char* name = half ? "b_up" : "b_gate";
    STD_TORCH_CHECK(list.empty() || list.size() == w_gate.size(), name, ": expected none or one for each weight, got ",
                    list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      check_tensor(list[i], name, c.dtype, {c.F});
      bias[2 * i + static_cast<size_t>(half)] = bias_data(list[i], keep);
    }
  }
  Tensor y = fresh(x, c.dtype, {c.T, c.F});
  Tensor gate = save ? fresh(x, c.dtype, {c.G, c.T, c.F}) : nothing(x);
  Tensor up = save ? fresh(x, c.dtype, {c.G, c.T, c.F}) : nothing(x);

  Gemm g;
  g.M = c.T;
  g.N = c.F;
  g.K = c.D;
  g.wide = c.dtype == DType::kFloat64;
  g.a = lanes_are_rows(matrix(x, c.dtype));
  g.b = c.forward.data();
  g.num_b = 2 * c.G;
  g.gated = true;
  Epilogue& e = g.epilogue;
  e.kind = Epilogue::Kind::kActivate;
  e.dtype = c.dtype;
  e.out = y.mutable_data_ptr();
  e.out_stride = c.F;
  if (save) {
    e.gate = gate.mutable_data_ptr();
    e.up = up.mutable_data_ptr();
    e.pre_stride = c.F;
    e.pre_branch_stride = c.T * c.F;
  }
  e.bias = bias.data();
  e.activation = c.activation;
  e.beta = beta;
  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  steps.product(g);
  steps.run();
  return {y, gate, up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_linear_backward(
    const Tensor& d_y, const Tensor& x, std::vector<Tensor> w_gate, std::vector<Tensor> w_up, const Tensor& gate,
    const Tensor& up, std::string activation, double beta, std::vector<bool> needs) {
  const GatedLinear c = check_gated_linear(x, w_gate, w_up, activation);
  check_tensor(d_y, "d_y", c.dtype, {c.T, c.F});
  check_tensor(gate, "gate", c.dtype, {c.G, c.T, c.F});
  check_tensor(up, "up", c.dtype, {c.G, c.T, c.F});
  STD_TORCH_CHECK(gate.is_contiguous() && up.is_contiguous(), "gate, up: expected the tensors that gated_linear saved");
  const int64_t half = c.G * c.F;
  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  const KernelTable& table = kernels();

  // d_hidden [T, 2 G F]: all d_gate, then all d_up.
  void* d_hidden = workspace.take(static_cast<size_t>(c.T * 2 * half * storage_size(c.dtype)));
  const Matrix d_hidden_matrix = dense(d_hidden, 2 * half, c.dtype);
  std::vector<GatedAct> acts(static_cast<size_t>(c.G));
  constexpr int64_t kRows = 16;
  for (int64_t i = 0; i < c.G; ++i) {
    GatedAct& a = acts[static_cast<size_t>(i)];
    a.rows = c.T;
    a.cols = c.F;
    a.gate = dense(advance(gate.const_data_ptr(), i * c.T * c.F, c.dtype), c.F, c.dtype);
    a.up = dense(advance(up.const_data_ptr(), i * c.T * c.F, c.dtype), c.F, c.dtype);
    a.d_out = matrix(d_y, c.dtype);
    a.out[0] = advance(d_hidden, i * c.F, c.dtype);
    a.out[1] = advance(d_hidden, half + i * c.F, c.dtype);
    a.out_stride = 2 * half;
    a.activation = c.activation;
    a.beta = beta;
    steps.pass((c.T + kRows - 1) / kRows, [&a, &table](int64_t task, int64_t) {
      table.gated_act_backward(a, task * kRows, std::min(a.rows, (task + 1) * kRows), 0, a.cols);
    });
  }

  Tensor d_x = needs.at(0) ? fresh(x, c.dtype, {c.T, c.D}) : nothing(x);
  Gemm g;
  g.wide = c.dtype == DType::kFloat64;
  g.epilogue.dtype = c.dtype;
  g.epilogue.out_stride = c.D;
  g.N = c.D;
  if (needs[0]) {
    g.M = c.T;
    g.K = 2 * half;
    g.a = lanes_are_rows(d_hidden_matrix);
    g.b = c.backward.data();
    g.num_b = 2 * c.G;
    g.epilogue.out = d_x.mutable_data_ptr();
    steps.product(g);
  }
  Tensor d_w[2] = {nothing(x), nothing(x)};
  Tensor d_b[2] = {nothing(x), nothing(x)};
  const Operand tokens = lanes_are_columns(matrix(x, c.dtype));
  for (int i = 0; i < 2; ++i) {
    const Matrix part = dense(advance(d_hidden, i * half, c.dtype), 2 * half, c.dtype);
    if (needs.at(static_cast<size_t>(1 + i))) {
      d_w[i] = fresh(x, c.dtype, {c.G, c.F, c.D});
      g.M = half;
      g.K = c.T;
      g.a = lanes_are_columns(part);
      g.b = &tokens;
      g.num_b = 1;
      g.epilogue.out = d_w[i].mutable_data_ptr();
      steps.product(g);
    }
    if (needs.at(static_cast<size_t>(3 + i))) {
      d_b[i] = fresh(x, c.dtype, {c.G, c.F});
      add_column_sum(steps, part, c.T, half, d_b[i].mutable_data_ptr());
    }
  }
  steps.run();
  return {d_x, d_w[0], d_w[1], d_b[0], d_b[1]};
}

// ---- ffn --------------------------------------------------------------------------------------------------------

struct Ffn {
  DType dtype;
  int64_t T, D, F, O;      // tokens, model width, FFN width, output width
  bool gated;
  std::vector<Operand> in;         // gate and up weights, or the one input weight: lanes = rows
  std::vector<const void*> bias;   // of the same
  std::vector<Operand> in_by_k;    // the input weights for d_x: k = rows, in the order of d_hidden
  int activation;
  double beta;
  std::vector<Tensor> keep;

  int64_t hidden() const { return gated ? 2 * F : F; }  // width of d_hidden
};

Ffn check_ffn(const Tensor& x, const Tensor& w_in, const std::optional<Tensor>& w_up, const Tensor& w_down,
              const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_up, bool gated,
              const std::string& activation, double beta) {
  Ffn c;
  c.dtype = storage_dtype(x, "x");
  check_tensor(x, "x", c.dtype, {-1, -1});
  c.T = x.size(0);
  c.D = x.size(1);
  c.gated = gated || w_up.has_value();
  check_tensor(w_in, "w_in", c.dtype, {-1, c.D});
  const bool fused = c.gated && !w_up;
  STD_TORCH_CHECK(!fused || w_in.size(0) % 2 == 0, "w_in: expected [2F, D], gate rows first, got ", shape_text(w_in));
  c.F = fused ? w_in.size(0) / 2 : w_in.size(0);
  if (w_up) check_tensor(*w_up, "w_up", c.dtype, {c.F, c.D});
  check_tensor(w_down, "w_down", c.dtype, {-1, c.F});
  c.O = w_down.size(0);
  if (b_in) check_tensor(*b_in, "b_in", c.dtype, {w_in.size(0)});
  STD_TORCH_CHECK(!b_up || w_up, "b_up: expected none where w_up is none");
  if (b_up) check_tensor(*b_up, "b_up", c.dtype, {c.F});
  c.activation = check_activation(activation);
  c.beta = beta;

  c.in.push_back(lanes_are_rows(matrix(w_in, c.dtype)));
  c.in_by_k.push_back(lanes_are_columns(matrix(w_in, c.dtype)));
  c.bias.push_back(bias_data(b_in, c.keep));
  if (w_up) {
    c.in.push_back(lanes_are_rows(matrix(*w_up, c.dtype)));
    c.in_by_k.push_back(lanes_are_columns(matrix(*w_up, c.dtype)));
    c.bias.push_back(bias_data(b_up, c.keep));
  } else if (fused) {
    c.in.push_back(lanes_are_rows(matrix(w_in, c.dtype, c.F)));
    c.bias.push_back(advance(c.bias[0], c.F, c.dtype));
  }
  return c;
}

// Rows [begin, end) of gate and up (saved where given) and of h (where given).
Gemm pre_activations(const Ffn& c, const Tensor& x, int64_t begin, int64_t end, void* gate, void* up, void* h) {
  Gemm g;
  g.M = end - begin;
  g.N = c.F;
  g.K = c.D;
  g.wide = c.dtype == DType::kFloat64;
  g.a = lanes_are_rows(matrix(x, c.dtype, begin));
  g.b = c.in.data();
  g.num_b = static_cast<int64_t>(c.in.size());
  g.gated = c.gated;
  Epilogue& e = g.epilogue;
  e.kind = Epilogue::Kind::kActivate;
  e.dtype = c.dtype;
  e.out = h;
  e.out_stride = c.F;
  e.gate = advance(gate, begin * c.F, c.dtype);
  e.up = advance(up, begin * c.F, c.dtype);
  e.pre_stride = c.F;
  e.bias = c.bias.data();
  e.activation = c.activation;
  e.beta = c.beta;
  return g;
}

std::tuple<Tensor, Tensor, Tensor> ffn(const Tensor& x, const Tensor& w_in, std::optional<Tensor> w_up,
                                       const Tensor& w_down, std::optional<Tensor> b_in, std::optional<Tensor> b_up,
                                       std::optional<Tensor> b_down, bool gated, std::string activation, double beta,
                                       bool save) {
  Ffn c = check_ffn(x, w_in, w_up, w_down, b_in, b_up, gated, activation, beta);
  if (b_down) check_tensor(*b_down, "b_down", c.dtype, {c.O});
  const void* bias_down = bias_data(b_down, c.keep);
  Tensor y = fresh(x, c.dtype, {c.T, c.O});
  Tensor gate = save ? fresh(x, c.dtype, {c.T, c.F}) : nothing(x);
  Tensor up = save && c.gated ? fresh(x, c.dtype, {c.T, c.F}) : nothing(x);
  const Operand down = lanes_are_rows(matrix(w_down, c.dtype));

  // Blocks of tokens, so that h and the packed operands of a block stay in the last-level cache.
  constexpr int64_t kBlockBytes = int64_t{32} << 20;
  const int64_t row_bytes = (c.D + 2 * c.F) * compute_size(c.dtype == DType::kFloat64);
  const int64_t most = std::max<int64_t>(256, kBlockBytes / std::max<int64_t>(1, row_bytes));
  const int64_t blocks = std::max<int64_t>(1, (c.T + most - 1) / most);
  const int64_t rows = (c.T + blocks - 1) / blocks;

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  void* h = workspace.take(static_cast<size_t>(rows * c.F * storage_size(c.dtype)));
  for (int64_t begin = 0; begin < c.T; begin += rows) {
    const int64_t end = std::min(c.T, begin + rows);
    steps.product(pre_activations(c, x, begin, end, save ? gate.mutable_data_ptr() : nullptr,
                                  save && c.gated ? up.mutable_data_ptr() : nullptr, h));
    Gemm g;
    g.M = end - begin;
    g.N = c.O;
    g.K = c.F;
    g.wide = c.dtype == DType::kFloat64;
    g.a = lanes_are_rows(dense(h, c.F, c.dtype));
    g.b = &down;
    g.epilogue.dtype = c.dtype;
    g.epilogue.out = advance(y.mutable_data_ptr(), begin * c.O, c.dtype);
    g.epilogue.out_stride = c.O;
    g.epilogue.bias = &bias_down;
    steps.product(g);
  }
  steps.run();
  return {y, gate, up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_backward(
    const Tensor& d_y, const Tensor& x, const Tensor& w_in, std::optional<Tensor> w_up, const Tensor& w_down,
    std::optional<Tensor> b_in, std::optional<Tensor> b_up, const Tensor& gate, const Tensor& up, bool gated,
    std::string activation, double beta, std::vector<bool> needs) {
  Ffn c = check_ffn(x, w_in, w_up, w_down, b_in, b_up, gated, activation, beta);
  check_tensor(d_y, "d_y", c.dtype, {c.T, c.O});
  const bool recompute = gate.dim() == 1;  // an empty vector stands for "not saved"
  if (!recompute) {
    check_tensor(gate, "gate", c.dtype, {c.T, c.F});
    if (c.gated) check_tensor(up, "up", c.dtype, {c.T, c.F});
    STD_TORCH_CHECK(gate.is_contiguous() && up.is_contiguous(), "gate, up: expected the tensors that ffn saved");
  }
  const bool need_x = needs.at(0), need_in = needs.at(1), need_up = needs.at(2) && w_up, need_down = needs.at(3);
  const bool need_b_in = needs.at(4), need_b_up = needs.at(5) && w_up, need_b_down = needs.at(6);
  const bool need_hidden = need_x || need_in || need_up || need_b_in || need_b_up;
  const int64_t element = storage_size(c.dtype);

  Workspace workspace;
  Steps steps(kernels(), workspace, threads());
  void* gate_data = const_cast<void*>(gate.const_data_ptr());
  void* up_data = c.gated ? const_cast<void*>(up.const_data_ptr()) : nullptr;
  if (recompute && (need_hidden || need_down)) {
    gate_data = workspace.take(static_cast<size_t>(c.T * c.F * element));
    if (c.gated) up_data = workspace.take(static_cast<size_t>(c.T * c.F * element));
    steps.product(pre_activations(c, x, 0, c.T, gate_data, up_data, nullptr));
  }

  Gemm g;
  g.wide = c.dtype == DType::kFloat64;
  g.epilogue.dtype = c.dtype;

  // d_hidden [T, 2F]: d_gate, then d_up.
  const Operand down_by_k = lanes_are_columns(matrix(w_down, c.dtype));
  void* d_hidden = nullptr;
  if (need_hidden) {
    d_hidden = workspace.take(static_cast<size_t>(c.T * c.hidden() * element));
    Gemm d = g;
    d.M = c.T;
    d.N = c.F;
    d.K = c.O;
    d.a = lanes_are_rows(matrix(d_y, c.dtype));
    d.b = &down_by_k;
    Epilogue& e = d.epilogue;
    e.kind = Epilogue::Kind::kActivateGrad;
    e.out = d_hidden;
    e.out_up = c.gated ? advance(d_hidden, c.F, c.dtype) : nullptr;
    e.out_stride = c.hidden();
    e.gate = gate_data;
    e.up = up_data;
    e.pre_stride = c.F;
    e.activation = c.activation;
    e.beta = beta;
    steps.product(d);
  }

  Tensor d_w_down = need_down ? fresh(x, c.dtype, {c.O, c.F}) : nothing(x);
  Operand h;
  if (need_down) {
    h.matrix = dense(gate_data, c.F, c.dtype);
    if (c.gated) h.up = dense(up_data, c.F, c.dtype);
    h.activation = c.activation;
    h.beta = beta;
    h.k_along_rows = true;
    g.M = c.O;
    g.N = c.F;
    g.K = c.T;
    g.a = lanes_are_columns(matrix(d_y, c.dtype));
    g.b = &h;
    g.epilogue.out = d_w_down.mutable_data_ptr();
    g.epilogue.out_stride = c.F;
    steps.product(g);
  }

  Tensor d_x = need_x ? fresh(x, c.dtype, {c.T, c.D}) : nothing(x);
  g.N = c.D;
  g.epilogue.out_stride = c.D;
  if (need_x) {
    g.M = c.T;
    g.K = c.hidden();
    g.a = lanes_are_rows(dense(d_hidden, c.hidden(), c.dtype));
    g.b = c.in_by_k.data();
    g.num_b = static_cast<int64_t>(c.in_by_k.size());
    g.epilogue.out = d_x.mutable_data_ptr();
    steps.product(g);
  }

  // Rows of d_hidden that belong to w_in and to w_up.
  const Operand tokens = lanes_are_columns(matrix(x, c.dtype));
  const int64_t in_rows = w_up ? c.F : c.hidden();
  Tensor d_w[2] = {nothing(x), nothing(x)};
  Tensor d_b[2] = {nothing(x), nothing(x)};
  const bool need_w[2] = {need_in, need_up};
  const bool need_b[2] = {need_b_in, need_b_up};
  for (int i = 0; i < 2; ++i) {
    const Matrix part = dense(advance(d_hidden, i * in_rows, c.dtype), c.hidden(), c.dtype);
    if (need_w[i]) {
      d_w[i] = fresh(x, c.dtype, {in_rows, c.D});
      g.M = in_rows;
      g.K = c.T;
      g.a = lanes_are_columns(part);
      g.b = &tokens;
      g.num_b = 1;
      g.epilogue.out = d_w[i].mutable_data_ptr();
      steps.product(g);
    }
    if (need_b[i]) {
      d_b[i] = fresh(x, c.dtype, {in_rows});
      add_column_sum(steps, part, c.T, in_rows, d_b[i].mutable_data_ptr());
    }
  }
  Tensor d_b_down = need_b_down ? fresh(x, c.dtype, {c.O}) : nothing(x);
  if (need_b_down) add_column_sum(steps, matrix(d_y, c.dtype), c.T, c.O, d_b_down.mutable_data_ptr());
  steps.run();
  return {d_x, d_w[0], d_w[1], d_w_down, d_b[0], d_b[1], d_b_down};
}

// ---- facts ------------------------------------------------------------------------------------------------------

std::string isa() { return isa_name(current_isa()); }

std::string isas() {
  std::string names;
  for (const Isa each : kIsas)
    if (kernel_table(each) && isa_supported(each)) names += (names.empty() ? "" : " ") + std::string(isa_name(each));
  return names;
}

void use_isa(std::string name) {
  const IsaChoice choice = choose_isa(name.c_str());
  STD_TORCH_CHECK(choice.error.empty(), choice.error);
  chosen_isa.store(static_cast<int>(choice.isa), std::memory_order_relaxed);
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  using namespace ffn_ops;
  m.impl("gated_act", TORCH_BOX(&gated_act));
  m.impl("gated_act_backward", TORCH_BOX(&gated_act_backward));
  m.impl("gated_act_double_backward", TORCH_BOX(&gated_act_double_backward));
  m.impl("gated_linear", TORCH_BOX(&gated_linear));
  m.impl("gated_linear_backward", TORCH_BOX(&gated_linear_backward));
  m.impl("ffn", TORCH_BOX(&ffn));
  m.impl("ffn_backward", TORCH_BOX(&ffn_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CompositeExplicitAutograd, m) {
  using namespace ffn_ops;
  m.impl("_isa", TORCH_BOX(&isa));
  m.impl("_isas", TORCH_BOX(&isas));
  m.impl("_use_isa", TORCH_BOX(&use_isa));
  m.impl("_has_amx", TORCH_BOX(&has_amx));
}
