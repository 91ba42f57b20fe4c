// SPDX-License-Identifier: BSD-3-Clause
// Grouped products of bfloat16, on tensor cores.
#include "gemm_instances.cuh"

namespace ffn_ops::cuda {

template cudaError_t launch_gemm_instance<BFloat16>(const GroupedGemm&, const GemmPlan&, const RowTile*, cudaStream_t);

}  // namespace ffn_ops::cuda
