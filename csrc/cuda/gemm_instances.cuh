// SPDX-License-Identifier: BSD-3-Clause
// Included once per gemm_<dtype>.cu: compiles the instances of a storage dtype and launches them.
#pragma once

#include "gemm_kernel.cuh"
#include "gemm_launch.cuh"
#include "launch_kernel.h"

namespace ffn_ops::cuda {

template <class S>
cudaError_t launch_gemm_instance(const GroupedGemm& job, const GemmPlan& plan, const RowTile* table,
                                 cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  dispatch_gemm<S, kHopperBuilt>(job, plan, [&](auto tag) {
    auto* kernel = &grouped_gemm_kernel<typename decltype(tag)::Type>;
    error = launch_kernel(kernel, plan.blocks, kGemmThreads, plan.shared_bytes, stream, job, plan, table);
  });
  return error;
}

}  // namespace ffn_ops::cuda
