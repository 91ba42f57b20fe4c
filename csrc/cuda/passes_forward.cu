// SPDX-License-Identifier: BSD-3-Clause
// gated_act, forward: for every dtype and activation.
#include "passes.cuh"

namespace ffn_ops::cuda {

void launch_gated_act(const Call& call, const GatedAct& job) {
  launch_pass<GatedActForward>(call, job, "gated_act_kernel");
}

}  // namespace ffn_ops::cuda
