// SPDX-License-Identifier: BSD-3-Clause
// Rows between tokens and experts on a GPU: dispatch, combine and the products of rows with their tokens. Each is the
// gradient of the others.
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include "rows.cuh"

namespace ffn_ops::cuda {

void launch_dispatch_rows(const Call& call, const MoveRows& job) {
  const PackGrid grid = move_rows_grid(job, job.routes.rows);
  dispatch_dtype(job.dtype, [&](auto dtype) {
    using S = typename decltype(dtype)::Type;
    call.launch("dispatch_rows_kernel", dispatch_rows_kernel<S>, grid.blocks, kPackThreads, 0, job, grid);
  });
}

void launch_combine_rows(const Call& call, const MoveRows& job) {
  const PackGrid grid = move_rows_grid(job, job.routes.tokens);
  dispatch_dtype(job.dtype, [&](auto dtype) {
    using S = typename decltype(dtype)::Type;
    call.launch("combine_rows_kernel", combine_rows_kernel<S>, grid.blocks, kPackThreads, 0, job, grid);
  });
}

void launch_row_dots(const Call& call, const RowDots& job) {
  dispatch_dtype(job.dtype, [&](auto dtype) {
    using S = typename decltype(dtype)::Type;
    call.launch("row_dots_kernel", row_dots_kernel<S>, row_dots_blocks(job), kPackThreads, 0, job,
                row_dots_vector(job));
  });
}

namespace {

Routes describe(Call& call, const RoutesShape& s, const Tensor& token, const Tensor& offsets, const Tensor& row,
                const Tensor& slot_offsets) {
  Routes routes;
  routes.tokens = s.T;
  routes.rows = s.R;
  routes.kept = call.indices(offsets) + s.E;
  routes.token = call.indices(token);
  routes.row = call.indices(row);
  routes.slot_offsets = call.indices(slot_offsets);
  return routes;
}

// A move of the rows of `in` to those of `out`.
MoveRows move_rows(Call& call, const Routes& routes, const Tensor& in, DType dtype, const MaybeTensor& weight,
                   Tensor& out) {
  MoveRows job;
  job.routes = routes;
  job.cols = in.size(1);
  job.in = matrix(in);
  job.dtype = dtype;
  job.weight = call.dense(weight);
  job.out = out.mutable_data_ptr();
  job.out_stride = job.cols;
  return job;
}

Tensor moe_dispatch(const Tensor& x, const Tensor& token, MaybeTensor weight, const Tensor& offsets, const Tensor& row,
                    const Tensor& slot_offsets) {
  Call call(x, "x");
  const DType dtype = storage_dtype(x, "x");
  const RoutesShape s = check_routes(token, weight, dtype, offsets, row, slot_offsets, call.place());
  check_tensor(x, "x", dtype, {s.T, "D"}, call.place());
  Tensor rows = call.fresh({s.R, x.size(1)});
  const Routes routes = describe(call, s, token, offsets, row, slot_offsets);
  launch_dispatch_rows(call, move_rows(call, routes, x, dtype, weight, rows));
  return rows;
}

Tensor moe_combine(const Tensor& rows, const Tensor& token, MaybeTensor weight, const Tensor& offsets,
                   const Tensor& row, const Tensor& slot_offsets) {
  Call call(rows, "rows");
  const DType dtype = storage_dtype(rows, "rows");
  const RoutesShape s = check_routes(token, weight, dtype, offsets, row, slot_offsets, call.place());
  check_tensor(rows, "rows", dtype, {s.R, "D"}, call.place());
  Tensor y = call.fresh({s.T, rows.size(1)});
  const Routes routes = describe(call, s, token, offsets, row, slot_offsets);
  launch_combine_rows(call, move_rows(call, routes, rows, dtype, weight, y));
  return y;
}

// <a[token[r]], rows[r]>, float32 (float64 for float64).
Tensor moe_row_dots(const Tensor& a, const Tensor& rows, const Tensor& token, const Tensor& offsets, const Tensor& row,
                    const Tensor& slot_offsets) {
  Call call(a, "a");
  RowDots job;
  job.dtype = storage_dtype(a, "a");
  const RoutesShape s = check_routes(token, std::nullopt, job.dtype, offsets, row, slot_offsets, call.place());
  check_tensor(a, "a", job.dtype, {s.T, "D"}, call.place());
  check_tensor(rows, "rows", job.dtype, {s.R, a.size(1)}, call.place());
  Tensor out = call.fresh(arithmetic_dtype(job.dtype), {s.R});
  job.routes = describe(call, s, token, offsets, row, slot_offsets);
  job.cols = a.size(1);
  job.a = matrix(a);
  job.b = matrix(rows);
  job.out = out.mutable_data_ptr();
  launch_row_dots(call, job);
  return out;
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("moe_dispatch", TORCH_BOX(&ffn_ops::cuda::moe_dispatch));
  m.impl("moe_combine", TORCH_BOX(&ffn_ops::cuda::moe_combine));
  m.impl("moe_row_dots", TORCH_BOX(&ffn_ops::cuda::moe_row_dots));
}
