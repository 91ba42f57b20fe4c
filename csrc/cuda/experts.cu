// SPDX-License-Identifier: BSD-3-Clause
// See experts.h.
#include "experts.h"

#include "gemm_launch.cuh"
#include "passes.h"
#include "rows.h"

namespace ffn_ops::cuda {
namespace {

// The output of a product over experts is held for a slab of columns of at most this size, until tokens gather from it.
// It is rounded once to the storage dtype, because moving rows dominates the time of narrow experts.
constexpr int64_t kSlabBytes = int64_t{1} << 30;

// A dimension of one element may have any stride.
int64_t dense_if_one(const Tensor& t, int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : 1; }

}  // namespace

Operand token_rows(const Experts& c, const Tensor& t) {
  Operand o;
  o.data = t.const_data_ptr();
  o.lane_stride = t.stride(0);
  o.k_stride = dense_if_one(t, 1);
  if (c.routed) {
    o.gather = c.routes.token;
    o.gather_limit = c.routes.tokens;
  }
  return o;
}

Operand dense_rows(const void* data, int64_t width) {
  Operand o;
  o.data = data;
  o.lane_stride = width;
  return o;
}

Tensor aligned_rows(const Call& call, const Tensor& t, DType dtype) {
  Operand o;
  o.data = t.const_data_ptr();
  o.lane_stride = t.stride(0);
  o.k_stride = t.size(1) > 1 ? t.stride(1) : 1;
  if (gemm_grid::copies_fit(o, dtype, true)) return t;
  const int64_t elements = 16 / storage_size(dtype), stride = divide_up(t.size(1), elements) * elements;
  const Tensor padded = call.fresh({t.size(0), stride});
  Tensor rows = view(padded, 0, t.size(0), t.size(1), stride, 1);
  torch::stable::copy_(rows, t);
  return rows;
}

Operand expert_weights(const Tensor& w, DType dtype, bool transposed, int64_t col) {
  const int64_t lanes = transposed ? 2 : 1, along_k = 3 - lanes;
  Operand o;
  o.lane_stride = transposed ? dense_if_one(w, lanes) : w.stride(lanes);
  o.k_stride = transposed ? w.stride(along_k) : dense_if_one(w, along_k);
  o.expert_stride = w.stride(0);
  o.data = advance(w.const_data_ptr(), col * o.lane_stride, dtype);
  return o;
}

GroupedGemm rows_product(const Experts& c, const Operand& rows, int64_t K, int64_t N) {
  GroupedGemm g;
  g.E = c.E;
  g.R = c.R;
  g.offsets = c.offsets;
  g.N = N;
  g.K = K;
  g.dtype = c.dtype;
  g.a = rows;
  return g;
}

void launch_product(Call& call, const GroupedGemm& job) {
  const GemmPlan plan = plan_gemm(job, kHopperBuilt && call.capability_major() == 9);
  void* workspace = call.workspace(grouped_gemm_workspace_bytes(job, plan));
  check_cuda(launch_grouped_gemm(job, plan, workspace, call.stream()), "grouped_gemm_kernel");
}

WithWeights with_weights(Call& call, const Tensor& w, bool transposed) {
  return [&call, &w, transposed](GroupedGemm g, int64_t col) {
    g.b = expert_weights(w, g.dtype, transposed, col);
    launch_product(call, g);
  };
}

void combined_product(Call& call, const Experts& c, const Operand& rows, int64_t K, const WithWeights& product,
                      int64_t N, const void* bias, const void* row_weight, Tensor& out, const AddedColumns& added) {
  constexpr int64_t kColumns = 256;  // a multiple of every tile's width
  int64_t cols = N;
  if (c.routed) {
    const int64_t row_bytes = std::max<int64_t>(1, c.R * storage_size(c.dtype));
    cols = std::min(N, std::max(kColumns, kSlabBytes / row_bytes / kColumns * kColumns));
  }
  Tensor slab = c.routed ? call.fresh({c.R, cols}) : out;
  for (int64_t col = 0; col < N; col += cols) {
    const int64_t width = std::min(cols, N - col);
    GroupedGemm g = rows_product(c, rows, K, width);
    g.epilogue.out = slab.mutable_data_ptr();
    g.epilogue.out_stride = width;
    g.epilogue.bias = advance(bias, col, c.dtype);
    g.epilogue.bias_stride = N;
    std::optional<Tensor> part;
    if (added) {
      part = added(col, width);
      g.epilogue.added = part->const_data_ptr();
      g.epilogue.added_stride = width;
    }
    product(g, col);
    if (!c.routed) continue;
    MoveRows m;
    m.routes = c.routes;
    m.cols = width;
    m.in = dense_matrix(slab.const_data_ptr(), width);
    m.dtype = c.dtype;
    m.weight = row_weight;
    m.out = advance(out.mutable_data_ptr(), col, c.dtype);
    m.out_stride = N;
    launch_combine_rows(call, m);
  }
}

void outer_products(Call& call, const Experts& c, const Operand& a, int64_t M, const Operand& b, int64_t N,
                    Tensor& out) {
  // Rows are k here, and columns lanes.
  const auto turned = [](Operand o) {
    std::swap(o.lane_stride, o.k_stride);
    return o;
  };
  GroupedGemm g = rows_product(c, turned(a), 0, N);
  g.kind = GroupedGemm::Kind::kOuter;
  g.b = turned(b);
  g.M = M;
  g.epilogue.out = out.mutable_data_ptr();
  g.epilogue.out_stride = N;
  launch_product(call, g);
}

void sum_expert_rows(Call& call, const Experts& c, const Operand& rows, const void* row_weight, Tensor& out) {
  ColumnSum job;
  job.rows = c.R;
  job.cols = out.size(1);
  job.experts = c.E;
  job.dtype = c.dtype;
  job.matrix = {rows.data, rows.lane_stride, rows.k_stride};
  job.gather = rows.gather;
  job.gather_limit = rows.gather_limit;
  job.offsets = c.offsets;
  job.weight = row_weight;
  job.out = out.mutable_data_ptr();
  launch_column_sum(call, job);
}

}  // namespace ffn_ops::cuda
