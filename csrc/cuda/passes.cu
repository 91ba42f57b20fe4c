// See passes.h.
#include "passes.h"

#include "elementwise.cuh"

namespace ffn_ops::cuda {
namespace {

template <class S, class Act>
void launch_pass(const Call& call, const GatedAct& job, Pass pass) {
  const PackGrid grid = gated_act_grid(job);
  const auto run = [&](const char* name, void (*kernel)(GatedAct, PackGrid)) {
    call.launch(name, kernel, grid.blocks, kPackThreads, 0, job, grid);
  };
  switch (pass) {
    case Pass::kForward:
      return run("gated_act_kernel", gated_act_kernel<S, Act, GatedActForward>);
    case Pass::kBackward:
      return run("gated_act_kernel (backward)", gated_act_kernel<S, Act, GatedActBackward>);
    case Pass::kDoubleBackward:
      return run("gated_act_kernel (double backward)", gated_act_kernel<S, Act, GatedActDoubleBackward>);
  }
}

}  // namespace

void launch_gated_act(const Call& call, GatedAct job, Pass pass) {
  flatten(job);
  dispatch_dtype(job.dtype, [&](auto dtype) {
    visit_type(Activations{}, job.activation, [&](auto act) {
      launch_pass<typename decltype(dtype)::Type, typename decltype(act)::Type>(call, job, pass);
    });
  });
}

void launch_column_sum(Call& call, ColumnSum job) {
  job.partial = call.workspace(column_sum_bytes(job));
  const ColumnSumGrid grid = column_sum_grid(job);
  dispatch_dtype(job.dtype, [&](auto dtype) {
    using S = typename decltype(dtype)::Type;
    call.launch("column_sum_kernel", column_sum_kernel<S>, grid.blocks, kPackThreads, grid.shared_bytes, job, grid);
    call.launch("column_sum_parts_kernel", column_sum_parts_kernel<S>, grid.final_blocks, kPackThreads, 0, job);
  });
}

}  // namespace ffn_ops::cuda
