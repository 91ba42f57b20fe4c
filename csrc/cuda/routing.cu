// SPDX-License-Identifier: BSD-3-Clause
// Routing on a GPU: the choice of experts, the sort of routed rows and the rounding of tokens to tiles.
#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "launch.h"
#include "sort.cuh"
#include "top_k.cuh"

namespace ffn_ops::cuda {
namespace {

// ---- top k ----------------------------------------------------------------------------------------------------------

template <bool kBackward>
void launch_top_k(Call& call, TopK job) {
  const TopKGrid grid = top_k_grid(job);
  if (!kBackward) job.scratch = call.workspace(grid.scratch_bytes);
  dispatch_dtype(job.dtype, [&](auto dtype) {
    using S = typename decltype(dtype)::Type;
    if (kBackward) call.launch("top_k_backward_kernel", top_k_backward_kernel<S>, grid.blocks, grid.threads, 0, job);
    else call.launch("top_k_kernel", top_k_kernel<S>, grid.blocks, grid.threads, grid.shared_bytes, job);
  });
}

TopK with_logits(const ChoiceOfExperts& choice, const Tensor& logits) {
  TopK job{choice};
  job.logits = matrix(logits);
  job.dtype = storage_dtype(logits, "logits");
  STD_TORCH_CHECK(job.E <= INT32_MAX, "logits: expected fewer than 2^31 experts, got ", shape_text(logits));
  return job;
}

std::tuple<Tensor, Tensor> route_top_k(const Tensor& logits, MaybeTensor bias, MaybeTensor given, int64_t k,
                                       int64_t shared, std::string score, bool renormalize, bool by_logits,
                                       int64_t num_groups, int64_t top_groups, int64_t group_best, double scale) {
  Call call(logits, "logits");
  const TopKOptions options{shared, score, renormalize, by_logits, num_groups, top_groups, group_best, scale};
  TopK job = with_logits(check_top_k(logits, k, options, call.place()), logits);
  check_given(given, bias, options, job.T, k, call.place());
  if (bias) check_tensor(*bias, "bias", arithmetic_dtype(job.dtype), {job.E - shared}, call.place(), nullptr);
  job.bias = call.dense(bias);
  job.given = call.indices(given);
  Tensor ids = call.fresh_indices({job.T, job.K}), weights = call.fresh(arithmetic_dtype(job.dtype), {job.T, job.K});
  job.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  job.weights = weights.mutable_data_ptr();
  launch_top_k<false>(call, job);
  return {weights, ids};
}

Tensor route_top_k_backward(const Tensor& d_weights, const Tensor& logits, const Tensor& ids, std::string score,
                            bool renormalize, bool by_logits, double scale) {
  Call call(logits, "logits");
  const int64_t k = ids.dim() == 2 ? ids.size(1) : 0;
  const TopKOptions options{0, score, renormalize, by_logits, 1, 1, 2, scale};
  TopK job = with_logits(check_top_k(logits, k, options, call.place()), logits);
  check_tensor(d_weights, "d_weights", arithmetic_dtype(job.dtype), {job.T, k}, call.place(), nullptr);
  check_indices_shape(ids, "ids", {job.T, k}, call.place());
  Tensor d_logits = call.fresh({job.T, job.E});
  job.ids = const_cast<int64_t*>(call.indices(ids));
  job.weights = const_cast<void*>(call.dense(d_weights));
  job.d_logits = d_logits.mutable_data_ptr();
  launch_top_k<true>(call, job);
  return d_logits;
}

// ---- sort -----------------------------------------------------------------------------------------------------------

// Sets memory to zero, then launches `before`, then all passes.
template <class Entries, class Before>
void run_sort(const Call& call, const SortPlan& plan, const Entries& entries, const Before& before) {
  for (const auto& each : plan.clear)
    if (each.bytes > 0)
      check_cuda(cudaMemsetAsync(each.data, 0, static_cast<size_t>(each.bytes), call.stream()), "sort");
  before();
  for (int i = 0; i < plan.passes; ++i) {
    const SortPass& pass = plan.pass[i];
    call.launch("sort_count_kernel", sort_count_kernel<Entries>, pass.chunks, kSortThreads, pass.count_shared(),
                entries, pass);
    call.launch("scan_kernel", scan_kernel<kScanThreads>, pass.scans.count, kScanThreads, kScanShared, pass.scans);
    call.launch("sort_scatter_kernel", sort_scatter_kernel<Entries>, pass.chunks, kSortThreads, pass.scatter_shared(),
                entries, pass);
  }
}

int64_t* data(Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_sort(const Tensor& expert, MaybeTensor token,
                                                                            const Tensor& weight, int64_t num_experts,
                                                                            int64_t num_tokens, int64_t capacity,
                                                                            bool by_weight) {
  Call call(weight, "weight");
  Sort job;
  job.weight_dtype = check_sort(expert, token, weight, num_experts, num_tokens, call.place());
  job.R = expert.numel();
  job.E = num_experts;
  job.T = num_tokens;
  job.K = token ? 1 : expert.size(1);
  job.expert = call.indices(expert);
  job.token = call.indices(token);
  job.weight = call.dense(weight);
  job.capacity = capacity;
  job.by_weight = by_weight;
  Tensor out_weight = call.fresh({job.R}), out_token = call.fresh_indices({job.R});
  Tensor out_offsets = call.fresh_indices({job.E + 1}), out_row = call.fresh_indices({job.R});
  Tensor out_slot_offsets = call.fresh_indices({job.T + 1}), out_counts = call.fresh_indices({job.E});
  Tensor out_place = call.fresh_indices({token ? job.R : 0});
  job.out_weight = out_weight.mutable_data_ptr();
  job.out_token = data(out_token);
  job.out_offsets = data(out_offsets);
  job.out_row = data(out_row);
  job.out_slot_offsets = data(out_slot_offsets);
  job.out_counts = data(out_counts);
  job.out_place = data(out_place);
  job.scratch = call.workspace(sort_plan(job).scratch_bytes);
  const SortPlan plan = sort_plan(job);
  run_sort(call, plan, SortEntries{job, plan.orders[2], plan.start, plan.flags}, [] {});
  return {out_weight, out_token, out_offsets, out_row, out_slot_offsets, out_counts, out_place};
}

// ---- token rounding -------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> round_tokens(const Tensor& scores, const Tensor& ids, int64_t tile) {
  Call call(scores, "scores");
  const ScoresShape s = check_scores(scores, call.place());
  STD_TORCH_CHECK(tile >= 1, "tile: expected at least 1, got ", tile);
  check_indices_shape(ids, "ids", {s.T, "K"}, call.place());
  RoundTokens job;
  job.T = s.T;
  job.E = s.E;
  job.K = ids.size(1);
  job.tile = std::min(tile, 2 * s.T + 2);  // a larger one rounds every count to 0 as well, and its sums may not fit
  job.scores = call.dense(scores);
  job.dtype = s.dtype;
  job.ids = call.indices(ids);
  Tensor expert = call.fresh_indices({rounded_rows(job)}), token = call.fresh_indices({rounded_rows(job)});
  job.out_expert = data(expert);
  job.out_token = data(token);
  job.scratch = call.workspace(round_plan(job).scratch_bytes);
  const SortPlan plan = round_plan(job);
  run_sort(call, plan, RoundEntries{job, plan.start, plan.flags}, [&] {
    call.launch("mark_choices_kernel", mark_choices_kernel<char>, divide_up(job.T * job.K, kSortThreads), kSortThreads,
                0, job, plan.flags);
    call.launch("round_counts_kernel", round_counts_kernel<char>, job.E, kSortThreads, int64_t{sizeof(int64_t)}, job,
                static_cast<const char*>(plan.flags), plan.wanted);
  });
  return {expert, token};
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("route_top_k", TORCH_BOX(&ffn_ops::cuda::route_top_k));
  m.impl("route_top_k_backward", TORCH_BOX(&ffn_ops::cuda::route_top_k_backward));
  m.impl("moe_sort", TORCH_BOX(&ffn_ops::cuda::moe_sort));
  m.impl("round_tokens", TORCH_BOX(&ffn_ops::cuda::round_tokens));
}
