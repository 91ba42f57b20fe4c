// SPDX-License-Identifier: BSD-3-Clause
// The CUDA run-time library as csrc/cuda uses it, for operators whose kernels run on the host: launches run at once.
#pragma once

#include <cstddef>
#include <cstring>

#include "../simt.h"

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;

struct dim3 {
  unsigned x = 1;
  explicit dim3(unsigned x = 1) : x(x) {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "error of the host's CUDA runtime"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 8;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;  // of Ampere and Hopper the larger
}
template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  static uint64_t seed = 1;  // threads run in another order each time
  simt::launch(simt::Grid{config->gridDim.x, static_cast<int>(config->blockDim.x),
                          static_cast<int64_t>(config->dynamicSmemBytes), seed++},
               kernel, arguments...);
  return cudaSuccess;
}
