// SPDX-License-Identifier: BSD-3-Clause
// Grouped products of quantised weights, for every storage dtype but float64.
#include "gemm_codes.cuh"
#include "gemm_launch.cuh"
#include "launch_kernel.h"

namespace ffn_ops::cuda {

template <class S>
cudaError_t launch_coded_gemm_instance(const CodedGemm& job, const GemmPlan& plan, const RowTile* table,
                                       cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  dispatch_coded_gemm<S>(plan, [&](auto tag) {
    error = launch_kernel(&coded_gemm_kernel<typename decltype(tag)::Type>, plan.blocks, kGemmThreads,
                          plan.shared_bytes, stream, job, plan, table);
  });
  return error;
}

template cudaError_t launch_coded_gemm_instance<float>(const CodedGemm&, const GemmPlan&, const RowTile*, cudaStream_t);
template cudaError_t launch_coded_gemm_instance<Half>(const CodedGemm&, const GemmPlan&, const RowTile*, cudaStream_t);
template cudaError_t launch_coded_gemm_instance<BFloat16>(const CodedGemm&, const GemmPlan&, const RowTile*,
                                                          cudaStream_t);

}  // namespace ffn_ops::cuda
