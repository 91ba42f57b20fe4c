// SPDX-License-Identifier: BSD-3-Clause
// The element-wise passes and sums that several operators launch; their kernels are compiled in files of their own.
#pragma once

#include "launch.h"

namespace ffn_ops::cuda {

void launch_gated_act(const Call& call, const GatedAct& job);
void launch_gated_act_backward(const Call& call, const GatedAct& job);
void launch_gated_act_double_backward(const Call& call, const GatedAct& job);
void launch_column_sum(Call& call, ColumnSum job);
void launch_own_sums(Call& call, OwnSums job, int64_t count, void* out);

// out [cols] = the sum of all rows: the gradient of a bias.
inline void sum_rows(Call& call, const Tensor& rows, DType dtype, Tensor& out) {
  ColumnSum job;
  job.rows = rows.size(0);
  job.cols = rows.size(1);
  job.dtype = dtype;
  job.matrix = matrix(rows);
  job.out = out.mutable_data_ptr();
  launch_column_sum(call, job);
}

}  // namespace ffn_ops::cuda
