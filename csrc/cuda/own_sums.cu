// SPDX-License-Identifier: BSD-3-Clause
// The gradients of an activation's own parameters [count]: for every dtype and every activation that learns them.
#include "passes.cuh"

namespace ffn_ops::cuda {

void launch_own_sums(Call& call, OwnSums job, int64_t count, void* out) {
  flatten(job);
  const int64_t blocks = own_sums_blocks(job), size = storage_size(arithmetic_dtype(job.dtype));
  job.partial = call.workspace(blocks * count * size);
  dispatch_dtype(job.dtype, [&](auto dtype) {
    using S = typename decltype(dtype)::Type;
    visit_type(Activations{}, job.activation, [&](auto act) {
      using Act = typename decltype(act)::Type;
      if constexpr (Act::learned > 0)
        call.launch("own_sums_kernel", own_sums_kernel<S, Act>, blocks, kPackThreads,
                    kPackThreads / kWarpSize * count * size, job);
    });
  });
  ColumnSum sum;
  sum.rows = blocks;
  sum.cols = count;
  sum.dtype = arithmetic_dtype(job.dtype);
  sum.matrix = dense_matrix(job.partial, count);
  sum.out = out;
  launch_column_sum(call, sum);
}

}  // namespace ffn_ops::cuda
