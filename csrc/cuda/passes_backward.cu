// SPDX-License-Identifier: BSD-3-Clause
// The gradient of gated_act: for every dtype and activation.
#include "passes.cuh"

namespace ffn_ops::cuda {

void launch_gated_act_backward(const Call& call, const GatedAct& job) {
  launch_pass<GatedActBackward>(call, job, "gated_act_backward_kernel");
}

}  // namespace ffn_ops::cuda
