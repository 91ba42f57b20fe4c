// SPDX-License-Identifier: BSD-3-Clause
// BASE's balanced assignment for scores on a GPU. Its shortest augmenting paths are sequential, so the CPU's
// operator solves it on a copy. It is the only operator that waits for the device.
#include <torch/csrc/stable/library.h>

#include "launch.h"

namespace ffn_ops::cuda {
namespace {

Tensor on_cpu(const Tensor& t) {
  return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

Tensor balanced_assignment(const Tensor& scores, MaybeTensor mask) {
  const Call call(scores, "scores");
  const ScoresShape s = check_scores(scores, call.place());
  if (mask) check_mask(*mask, s.T, call.place());
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(call.stream(), &status), "cudaStreamIsCapturing");
  STD_TORCH_CHECK(status == cudaStreamCaptureStatusNone,
                  "balanced_assignment: a CUDA graph cannot capture it, because the CPU solves it. Assign outside the "
                  "graph, or use training=False.");
  MaybeTensor cpu_mask;
  if (mask) cpu_mask = on_cpu(*mask);
  std::array<StableIValue, 2> stack{torch::stable::detail::from(on_cpu(scores)), torch::stable::detail::from(cpu_mask)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("ffn_ops::balanced_assignment", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::to(torch::stable::detail::to<Tensor>(stack[0]),
                           torch::stable::Device(torch::headeronly::DeviceType::CUDA, call.place().gpu));
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("balanced_assignment", TORCH_BOX(&ffn_ops::cuda::balanced_assignment));
}
