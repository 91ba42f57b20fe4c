// SPDX-License-Identifier: BSD-3-Clause
// Grouped products of float32 and float64, by fused multiply-adds; and the table of row tiles that all dtypes need.
#include "gemm_instances.cuh"

namespace ffn_ops::cuda {

template cudaError_t launch_gemm_instance<float>(const GroupedGemm&, const GemmPlan&, const RowTile*, cudaStream_t);
template cudaError_t launch_gemm_instance<double>(const GroupedGemm&, const GemmPlan&, const RowTile*, cudaStream_t);

cudaError_t launch_expert_tiles(const GroupedGemm& job, const GemmPlan& plan, int64_t* scratch, RowTile* table,
                                cudaStream_t stream) {
  return launch_kernel(expert_tiles_kernel<>, 1, kTableThreads, kTableSharedBytes, stream, job.offsets, job.E, job.R,
                       table_tile_rows(job, plan), plan.table_entries, scratch, table);
}

}  // namespace ffn_ops::cuda
