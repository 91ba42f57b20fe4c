// SPDX-License-Identifier: BSD-3-Clause
// Launches of grouped products. The instances of each dtype are compiled by a file of their own, gemm_<dtype>.cu.
#pragma once

#include <cuda_runtime.h>

#include "gemm_grid.h"

namespace ffn_ops::cuda {

// For the storage dtypes of the product: the plan's instance, with `table` on the device where the plan wants one.
template <class S>
cudaError_t launch_gemm_instance(const GroupedGemm& job, const GemmPlan& plan, const RowTile* table,
                                 cudaStream_t stream);
extern template cudaError_t launch_gemm_instance<double>(const GroupedGemm&, const GemmPlan&, const RowTile*,
                                                         cudaStream_t);
extern template cudaError_t launch_gemm_instance<float>(const GroupedGemm&, const GemmPlan&, const RowTile*,
                                                        cudaStream_t);
extern template cudaError_t launch_gemm_instance<Half>(const GroupedGemm&, const GemmPlan&, const RowTile*,
                                                       cudaStream_t);
extern template cudaError_t launch_gemm_instance<BFloat16>(const GroupedGemm&, const GemmPlan&, const RowTile*,
                                                           cudaStream_t);

cudaError_t launch_expert_tiles(const GroupedGemm& job, const GemmPlan& plan, int64_t* scratch, RowTile* table,
                                cudaStream_t stream);

// Of a weight in codes.
template <class S>
cudaError_t launch_coded_gemm_instance(const CodedGemm& job, const GemmPlan& plan, const RowTile* table,
                                       cudaStream_t stream);
extern template cudaError_t launch_coded_gemm_instance<float>(const CodedGemm&, const GemmPlan&, const RowTile*,
                                                              cudaStream_t);
extern template cudaError_t launch_coded_gemm_instance<Half>(const CodedGemm&, const GemmPlan&, const RowTile*,
                                                             cudaStream_t);
extern template cudaError_t launch_coded_gemm_instance<BFloat16>(const CodedGemm&, const GemmPlan&, const RowTile*,
                                                                 cudaStream_t);

// One or two kernels on `stream`; nothing waits. `workspace` has grouped_gemm_workspace_bytes(), aligned to 8. `launch`
// is called with the storage dtype and the table.
template <class Launch>
cudaError_t launch_with_table(const GroupedGemm& job, const GemmPlan& plan, void* workspace, cudaStream_t stream,
                              const Launch& launch) {
  if (plan.blocks == 0) return cudaSuccess;
  if (plan.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  RowTile* table = nullptr;
  if (plan.table_entries > 0) {
    table = reinterpret_cast<RowTile*>(static_cast<char*>(workspace) + row_table_offset(job.E));
    const cudaError_t error = launch_expert_tiles(job, plan, static_cast<int64_t*>(workspace), table, stream);
    if (error != cudaSuccess) return error;
  }
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_dtype(job.dtype, [&](auto tag) { error = launch(tag, table); });
  return error;
}

inline cudaError_t launch_grouped_gemm(const GroupedGemm& job, const GemmPlan& plan, void* workspace,
                                       cudaStream_t stream) {
  return launch_with_table(job, plan, workspace, stream, [&](auto tag, const RowTile* table) {
    return launch_gemm_instance<typename decltype(tag)::Type>(job, plan, table, stream);
  });
}

// Not of float64.
inline cudaError_t launch_coded_gemm(const CodedGemm& job, const GemmPlan& plan, void* workspace, cudaStream_t stream) {
  return launch_with_table(job, plan, workspace, stream, [&](auto tag, const RowTile* table) {
    using S = typename decltype(tag)::Type;
    if constexpr (sizeof(S) == 8) return cudaErrorInvalidValue;
    else return launch_coded_gemm_instance<S>(job, plan, table, stream);
  });
}

}  // namespace ffn_ops::cuda
