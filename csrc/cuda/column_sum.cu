// SPDX-License-Identifier: BSD-3-Clause
// Sums over rows, such as the gradients of biases.
#include "elementwise.cuh"
#include "passes.h"

namespace ffn_ops::cuda {

void launch_column_sum(Call& call, ColumnSum job) {
  job.partial = call.workspace(column_sum_bytes(job));
  const ColumnSumGrid grid = column_sum_grid(job);
  dispatch_dtype(job.dtype, [&](auto dtype) {
    using S = typename decltype(dtype)::Type;
    call.launch("column_sum_kernel", column_sum_kernel<S>, grid.blocks, kPackThreads, grid.shared_bytes, job, grid);
    call.launch("column_sum_parts_kernel", column_sum_parts_kernel<S>, grid.final_blocks, kPackThreads, 0, job);
  });
}

}  // namespace ffn_ops::cuda
