// Included once per gemm_<dtype>.cu: compiles the instances of a storage dtype and launches them.
#pragma once

#include "gemm_kernel.cuh"
#include "gemm_launch.cuh"

namespace ffn_ops::cuda {

template <class S>
cudaError_t launch_gemm_instance(const GroupedGemm& job, const GemmPlan& plan, const RowTile* table,
                                 cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  dispatch_gemm<S>(job, plan, [&](auto tag) {
    auto* kernel = &grouped_gemm_kernel<typename decltype(tag)::Type>;
    const auto shared_bytes = static_cast<int>(plan.shared_bytes);
    constexpr int kWithoutAsking = 48 << 10;
    if (shared_bytes > kWithoutAsking)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return;
    kernel<<<static_cast<unsigned>(plan.blocks), kGemmThreads, static_cast<size_t>(shared_bytes), stream>>>(job, plan,
                                                                                                            table);
    error = cudaGetLastError();
  });
  return error;
}

}  // namespace ffn_ops::cuda
