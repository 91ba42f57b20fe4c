// SPDX-License-Identifier: BSD-3-Clause
// Routing on the CPU: the choice of experts and the sort of routed rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "routes.h"

namespace ffn_ops {
namespace {

// ---- top k ----------------------------------------------------------------------------------------------------------

void run_top_k(const TopK& job, void (*kernel)(const TopK&, int64_t, int64_t, void*)) {
  constexpr int64_t kRows = 64;
  const int64_t workers = workers_for(static_cast<double>(job.T * job.E), 1 << 13, threads());
  Workspace workspace;
  const int64_t bytes = divide_up(top_k_scratch_bytes(job), 128) * 128;
  char* scratch = static_cast<char*>(workspace.take(static_cast<size_t>(bytes * workers), "scratch of each thread"));
  Phases phases;
  phases.add(divide_up(job.T, kRows), [&](int64_t task, int64_t worker) {
    kernel(job, task * kRows, std::min(job.T, (task + 1) * kRows), scratch + worker * bytes);
  });
  phases.run(workers);
}

// Experts [T, K] that stand in a tensor; their values are read.
const int64_t* check_chosen(const Tensor& ids, int64_t experts) {
  const auto* chosen = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < ids.numel(); ++i)
    STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < experts, "ids: expected indices below ", experts, ", got ",
                    chosen[i]);
  return chosen;
}

std::tuple<Tensor, Tensor> route_top_k(const Tensor& logits, std::optional<Tensor> bias, std::optional<Tensor> given,
                                       int64_t k, int64_t shared, std::string score, bool renormalize, bool by_logits,
                                       int64_t num_groups, int64_t top_groups, int64_t group_best, double scale) {
  const TopKOptions options{shared, score, renormalize, by_logits, num_groups, top_groups, group_best, scale};
  TopK job{check_top_k(logits, k, options), {}};
  check_given(given, bias, options, job.T, k);
  job.logits = matrix(logits, storage_dtype(logits, "logits"));
  std::vector<Tensor> keep;
  if (bias) check_tensor(*bias, "bias", arithmetic_dtype(job.logits.dtype), {job.E - shared}, {}, nullptr);
  job.bias = dense_data(bias, keep);
  if (given) {
    keep.push_back(torch::stable::contiguous(*given));
    job.given = check_chosen(keep.back(), job.E);
  }
  Tensor ids = fresh_indices({job.T, job.K});
  Tensor weights = fresh_arithmetic(job.logits.dtype, {job.T, job.K});
  job.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  job.weights = weights.mutable_data_ptr();
  run_top_k(job, kernels().top_k);
  return {weights, ids};
}

Tensor route_top_k_backward(const Tensor& d_weights, const Tensor& logits, const Tensor& ids, std::string score,
                            bool renormalize, bool by_logits, double scale) {
  const int64_t k = ids.dim() == 2 ? ids.size(1) : 0;
  TopK job{check_top_k(logits, k, {0, score, renormalize, by_logits, 1, 1, 2, scale}), {}};
  job.logits = matrix(logits, storage_dtype(logits, "logits"));
  check_tensor(d_weights, "d_weights", arithmetic_dtype(job.logits.dtype), {job.T, k}, {}, nullptr);
  check_indices_shape(ids, "ids", {job.T, k});
  const Tensor dense_ids = torch::stable::contiguous(ids), dense_d = torch::stable::contiguous(d_weights);
  Tensor d_logits = fresh(logits, {job.T, job.E});
  job.ids = const_cast<int64_t*>(check_chosen(dense_ids, job.E));
  job.weights = const_cast<void*>(dense_d.const_data_ptr());
  job.d_logits = d_logits.mutable_data_ptr();
  run_top_k(job, kernels().top_k_backward);
  return d_logits;
}

// ---- sort -----------------------------------------------------------------------------------------------------------

// Entries: pairs of a token and an expert, in the order of tokens.
struct Entries {
  int64_t R, E, T, K;
  const int64_t* expert;
  const int64_t* token;  // null: entry i belongs to token i / K
  bool counts(int64_t i) const {
    return expert[i] >= 0 && expert[i] < E && (!token || (token[i] >= 0 && token[i] < T));
  }
};

// Marks the entries that stay if each expert takes at most `capacity`: all first choices before any second, earlier
// tokens first; or the largest weights first, ties in that order.
template <class W>
std::vector<char> keep_within_capacity(const Entries& in, const W* weight, int64_t capacity, bool by_weight) {
  std::vector<char> kept(static_cast<size_t>(in.R));
  std::vector<std::vector<int64_t>> queue(static_cast<size_t>(in.E));
  const int64_t rows = in.token ? in.R : in.T, slots = in.token ? 1 : in.K;
  for (int64_t k = 0; k < slots; ++k) {
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t i = t * slots + k;
      if (in.counts(i)) queue[static_cast<size_t>(in.expert[i])].push_back(i);
    }
  }
  for (std::vector<int64_t>& wanting : queue) {
    if (by_weight)
      std::stable_sort(wanting.begin(), wanting.end(), [&](int64_t a, int64_t b) {
        return weight[a] > weight[b] || (std::isnan(weight[b]) && !std::isnan(weight[a]));
      });
    for (size_t n = 0; n < wanting.size() && static_cast<int64_t>(n) < capacity; ++n)
      kept[static_cast<size_t>(wanting[n])] = 1;
  }
  return kept;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_sort(const Tensor& expert,
                                                                            std::optional<Tensor> token,
                                                                            const Tensor& weight, int64_t num_experts,
                                                                            int64_t num_tokens, int64_t capacity,
                                                                            bool by_weight) {
  const DType dtype = check_sort(expert, token, weight, num_experts, num_tokens);
  const Tensor dense_expert = torch::stable::contiguous(expert), dense_weight = torch::stable::contiguous(weight);
  const Tensor dense_token = token ? torch::stable::contiguous(*token) : dense_expert;
  Entries in;
  in.R = expert.numel();
  in.E = num_experts;
  in.T = num_tokens;
  in.K = token ? 1 : expert.size(1);
  in.expert = static_cast<const int64_t*>(dense_expert.const_data_ptr());
  in.token = token ? static_cast<const int64_t*>(dense_token.const_data_ptr()) : nullptr;

  Tensor out_token = fresh_indices({in.R}), out_weight = fresh(weight, {in.R}), out_row = fresh_indices({in.R});
  Tensor out_offsets = fresh_indices({in.E + 1}), out_slot_offsets = fresh_indices({in.T + 1});
  Tensor out_counts = fresh_indices({in.E}), out_place = fresh_indices({token ? in.R : 0});
  auto data = [](Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); };
  int64_t *tokens = data(out_token), *row = data(out_row), *offsets = data(out_offsets);
  int64_t *slot_offsets = data(out_slot_offsets), *counts = data(out_counts), *place = data(out_place);

  std::fill(counts, counts + in.E, 0);
  for (int64_t i = 0; i < in.R; ++i)
    if (in.counts(i)) ++counts[in.expert[i]];
  std::vector<char> kept;
  if (capacity >= 0 && in.E > 0 && *std::max_element(counts, counts + in.E) > capacity) {
    if (dtype == DType::kFloat64)
      kept = keep_within_capacity(in, static_cast<const double*>(dense_weight.const_data_ptr()), capacity, by_weight);
    else kept = keep_within_capacity(in, static_cast<const float*>(dense_weight.const_data_ptr()), capacity, by_weight);
  }
  const int64_t most = kept.empty() ? in.R : capacity;
  offsets[0] = 0;
  for (int64_t e = 0; e < in.E; ++e) offsets[e + 1] = offsets[e] + std::min(most, counts[e]);

  // Entries in the order of tokens: as they come, or sorted.
  std::vector<int64_t> order;
  if (token) {
    std::fill(slot_offsets, slot_offsets + in.T + 1, 0);
    for (int64_t i = 0; i < in.R; ++i)
      if (in.token[i] >= 0 && in.token[i] < in.T) ++slot_offsets[in.token[i] + 1];
    std::partial_sum(slot_offsets, slot_offsets + in.T + 1, slot_offsets);
    std::vector<int64_t> next(slot_offsets, slot_offsets + in.T + 1);
    order.resize(static_cast<size_t>(in.R));
    for (int64_t i = 0; i < in.R; ++i) {
      const bool real = in.token[i] >= 0 && in.token[i] < in.T;
      order[static_cast<size_t>(next[static_cast<size_t>(real ? in.token[i] : in.T)]++)] = i;
    }
  } else {
    for (int64_t t = 0; t <= in.T; ++t) slot_offsets[t] = t * in.K;
  }
  std::vector<int64_t> next(offsets, offsets + in.E + 1);
  const auto size = static_cast<size_t>(storage_size(dtype));
  const char* from = static_cast<const char*>(dense_weight.const_data_ptr());
  char* to = static_cast<char*>(out_weight.mutable_data_ptr());
  const auto fill = [&](auto tag) {
    using W = decltype(tag);
    int64_t t = 0, slot = 0;  // of entry p, where entries come token by token
    for (int64_t p = 0; p < in.R; ++p) {
      const int64_t i = order.empty() ? p : order[static_cast<size_t>(p)];
      const bool stays = in.counts(i) && (kept.empty() || kept[static_cast<size_t>(i)]);
      const int64_t r = next[static_cast<size_t>(stays ? in.expert[i] : in.E)]++;
      if (!token) {
        tokens[r] = t;
        if (++slot == in.K) slot = 0, ++t;
      } else {
        tokens[r] = in.token[i] >= 0 && in.token[i] < in.T ? in.token[i] : 0;
      }
      reinterpret_cast<W*>(to)[r] = reinterpret_cast<const W*>(from)[i];
      row[p] = r;
      if (token) place[i] = r;
    }
  };
  if (size == 8) fill(double());
  else fill(float());
  return {out_weight, out_token, out_offsets, out_row, out_slot_offsets, out_counts, out_place};
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("route_top_k", TORCH_BOX(&ffn_ops::route_top_k));
  m.impl("route_top_k_backward", TORCH_BOX(&ffn_ops::route_top_k_backward));
  m.impl("moe_sort", TORCH_BOX(&ffn_ops::moe_sort));
}
