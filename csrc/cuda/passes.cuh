// SPDX-License-Identifier: BSD-3-Clause
// Included once per passes_<pass>.cu: compiles one pass of gated_act for every dtype and activation, and launches it.
#pragma once

#include "passes.h"

#include "elementwise.cuh"

namespace ffn_ops::cuda {

template <class Pass>
void launch_pass(const Call& call, GatedAct job, const char* name) {
  flatten(job);
  const PackGrid grid = gated_act_grid(job);
  dispatch_dtype(job.dtype, [&](auto dtype) {
    using S = typename decltype(dtype)::Type;
    visit_type(Activations{}, job.activation, [&](auto act) {
      call.launch(name, gated_act_kernel<S, typename decltype(act)::Type, Pass>, grid.blocks, kPackThreads, 0, job,
                  grid);
    });
  });
}

}  // namespace ffn_ops::cuda
