// SPDX-License-Identifier: BSD-3-Clause
// Rows between tokens and experts on the CPU: dispatch, combine and the products of rows with their tokens. Each is the
// gradient of the others.
#include <functional>

#include <torch/csrc/stable/library.h>

#include "routes.h"

namespace ffn_ops {
namespace {

struct Move {
  DType dtype;
  int64_t cols;
  Routes routes;
  const void* weight = nullptr;
  std::vector<Tensor> keep;
};

Move check_move(const Tensor& in, const char* name, const Tensor& token, const std::optional<Tensor>& weight,
                const Tensor& offsets, const Tensor& row, const Tensor& slot_offsets) {
  Move m;
  m.dtype = storage_dtype(in, name);
  check_tensor(in, name, m.dtype, {"R", "D"});
  m.cols = in.size(1);
  const RoutesShape s = check_routes(token, weight, m.dtype, offsets, row, slot_offsets);
  m.routes.tokens = s.T;
  m.routes.kept = check_offsets(offsets, "offsets", s.E, s.R, m.keep)[s.E];
  m.routes.token = check_indices(token, "token", s.R, s.T - 1, m.keep);
  m.routes.row = check_indices(row, "row", s.R, s.R - 1, m.keep);
  m.routes.slot_offsets = check_offsets(slot_offsets, "slot_offsets", s.T, s.R, m.keep);
  check_agreement(m.routes);
  m.weight = dense_data(weight, m.keep);
  return m;
}

void in_parallel(int64_t rows, int64_t cols, const std::function<void(int64_t, int64_t)>& run) {
  const int64_t each = rows_of_task(cols);
  Phases phases;
  phases.add(divide_up(rows, each),
             [&](int64_t task, int64_t) { run(task * each, std::min(rows, (task + 1) * each)); });
  phases.run(workers_for(static_cast<double>(rows * cols), 1 << 14, threads()));
}

MoveRows moved(const Move& m, const Tensor& in, Tensor& out) {
  MoveRows rows;
  rows.routes = m.routes;
  rows.cols = m.cols;
  rows.in = matrix(in, m.dtype);
  rows.weight = m.weight;
  rows.out = out.mutable_data_ptr();
  rows.out_stride = m.cols;
  rows.out_dtype = m.dtype;
  return rows;
}

Tensor moe_dispatch(const Tensor& x, const Tensor& token, std::optional<Tensor> weight, const Tensor& offsets,
                    const Tensor& row, const Tensor& slot_offsets) {
  const Move m = check_move(x, "x", token, weight, offsets, row, slot_offsets);
  check_tensor(x, "x", m.dtype, {m.routes.tokens, "D"});
  Tensor rows = fresh(x, {token.numel(), m.cols});
  MoveRows job = moved(m, x, rows);
  const int64_t R = token.numel(), row_bytes = m.cols * storage_size(m.dtype);
  job.nontemporal = past_caches(R * row_bytes);
  in_parallel(m.routes.tokens, m.cols * divide_up(R, std::max<int64_t>(1, m.routes.tokens)),
              [&](int64_t begin, int64_t end) { kernels().dispatch_rows(job, begin, end); });
  in_parallel(R - m.routes.kept, m.cols, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(job.out) + (m.routes.kept + begin) * row_bytes, 0,
                static_cast<size_t>((end - begin) * row_bytes));
  });
  return rows;
}

Tensor moe_combine(const Tensor& rows, const Tensor& token, std::optional<Tensor> weight, const Tensor& offsets,
                   const Tensor& row, const Tensor& slot_offsets) {
  const Move m = check_move(rows, "rows", token, weight, offsets, row, slot_offsets);
  check_tensor(rows, "rows", m.dtype, {token.numel(), "D"});
  Tensor y = fresh(rows, {m.routes.tokens, m.cols});
  const MoveRows job = moved(m, rows, y);
  in_parallel(m.routes.tokens, m.cols, [&](int64_t begin, int64_t end) { kernels().combine_rows(job, begin, end); });
  return y;
}

// <a[token[r]], rows[r]>, float32 (float64 for float64).
Tensor moe_row_dots(const Tensor& a, const Tensor& rows, const Tensor& token, const Tensor& offsets, const Tensor& row,
                    const Tensor& slot_offsets) {
  const Move m = check_move(a, "a", token, std::nullopt, offsets, row, slot_offsets);
  check_tensor(a, "a", m.dtype, {m.routes.tokens, "D"});
  check_tensor(rows, "rows", m.dtype, {token.numel(), m.cols});
  Tensor out = fresh_arithmetic(m.dtype, {token.numel()});
  RowDots d;
  d.cols = m.cols;
  d.a = matrix(a, m.dtype);
  d.a.rows = m.routes.token;
  d.b = matrix(rows, m.dtype);
  d.out = out.mutable_data_ptr();
  in_parallel(m.routes.kept, m.cols, [&](int64_t begin, int64_t end) { kernels().row_dots(d, begin, end); });
  const int64_t size = storage_size(arithmetic_dtype(m.dtype));
  std::memset(static_cast<char*>(d.out) + m.routes.kept * size, 0,
              static_cast<size_t>((token.numel() - m.routes.kept) * size));
  return out;
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("moe_dispatch", TORCH_BOX(&ffn_ops::moe_dispatch));
  m.impl("moe_combine", TORCH_BOX(&ffn_ops::moe_combine));
  m.impl("moe_row_dots", TORCH_BOX(&ffn_ops::moe_row_dots));
}
