// SPDX-License-Identifier: BSD-3-Clause
// The gradient of gated_act's gradient: for every dtype and activation.
#include "passes.cuh"

namespace ffn_ops::cuda {

void launch_gated_act_double_backward(const Call& call, const GatedAct& job) {
  launch_pass<GatedActDoubleBackward>(call, job, "gated_act_double_backward_kernel");
}

}  // namespace ffn_ops::cuda
