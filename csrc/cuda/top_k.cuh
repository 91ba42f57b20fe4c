// SPDX-License-Identifier: BSD-3-Clause
// The choice of K of E experts for each token, and the weights of the chosen: one warp for each token. Scores, their
// sums and the choice are in float32 (float64 for float64 logits); ties go to the lowest index, NaN ranks last.
#pragma once

#include "grid.h"
#include "scalar.cuh"
#include "warp.cuh"

namespace ffn_ops::cuda {

constexpr double kNormEpsilon = 1e-20;  // DeepSeek-V3's; without influence where weights are not all tiny

template <class T>
struct Candidate {
  T value;
  int index;  // -1: none
};

// Whether a ranks before b: larger, or equal and of the lower index; NaN is behind everything, none behind NaN.
template <class T>
FFN_FN bool ranks_before(const Candidate<T>& a, const Candidate<T>& b) {
  if (a.index < 0 || b.index < 0) return b.index < 0 && a.index >= 0;
  if (a.value > b.value) return true;
  if (a.value < b.value) return false;
  const bool a_is_nan = a.value != a.value, b_is_nan = b.value != b.value;
  return a_is_nan == b_is_nan ? a.index < b.index : b_is_nan;
}

// Returns the best of a warp's candidates in each lane.
template <class T>
FFN_FN Candidate<T> warp_best(Candidate<T> mine) {
#pragma unroll
  for (int by = kWarpSize / 2; by > 0; by /= 2) {
    const Candidate<T> other{__shfl_xor_sync(0xffffffffu, mine.value, by),
                             __shfl_xor_sync(0xffffffffu, mine.index, by)};
    if (ranks_before(other, mine)) mine = other;
  }
  return mine;
}

// Calls `take(j, winner)` in all lanes for the `count` best of n values, best first, leaving out those that `allowed`
// does not pass. Lane l looks after values l, l + 32, ...: it holds the best of them, and looks for the next one, the
// best behind the last winner, only when its own has won.
template <class T, class Allowed, class Take>
FFN_FN void choose_best(const T* values, int n, int count, int lane, Allowed allowed, Take take) {
  Candidate<T> last{0, -1};
  const auto next = [&] {
    Candidate<T> best{0, -1};
    for (int i = lane; i < n; i += kWarpSize) {
      const Candidate<T> candidate{values[i], i};
      if (allowed(i) && ranks_before(candidate, best) && (last.index < 0 || ranks_before(last, candidate)))
        best = candidate;
    }
    return best;
  };
  Candidate<T> mine = next();
  for (int j = 0; j < count; ++j) {
    last = warp_best(mine);
    take(j, last);
    if (last.index == mine.index) mine = next();
  }
}

// Scores of a token from its logits. Softmax needs the largest one, NaN left aside, and the sum over all (`n` of them,
// in the order of lanes; `at(i)` gives the i-th).
template <class T>
struct Score {
  int score;  // its place in the list
  T largest, sum;

  FFN_FN T operator()(T z) const {
    T value = 0;
    dispatch_score(score, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      if constexpr (S::of_row) value = exp(Lane<T>(z - largest)).value / sum;
      else value = S::fwd(Lane<T>(z)).value;
    });
    return value;
  }
  // The slope of softmax is without the part through its denominator.
  FFN_FN ScoreGrad<T> grad(T z) const {
    ScoreGrad<T> found{};
    dispatch_score(score, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      if constexpr (S::of_row) {
        found.value = found.slope = (*this)(z);
      } else {
        const auto [value, slope] = S::grad(Lane<T>(z));
        found = {value.value, slope.value};
      }
    });
    return found;
  }
};

template <class T, class At>
FFN_FN Score<T> softmax_of(int score, int n, int lane, At at) {
  T largest = -T(INFINITY);
  for (int i = lane; i < n; i += kWarpSize) largest = max(Lane<T>(at(i)), Lane<T>(largest)).value;
#pragma unroll
  for (int by = kWarpSize / 2; by > 0; by /= 2)
    largest = max(Lane<T>(largest), Lane<T>(__shfl_xor_sync(0xffffffffu, largest, by))).value;
  T sum = 0;
  for (int i = lane; i < n; i += kWarpSize) sum += exp(Lane<T>(at(i) - largest)).value;
  return {score, largest, warp_sum(sum)};
}

// One token's logits and chosen experts.
template <class S>
struct TopKRow {
  using T = ComputeOf<S>;
  const TopK& k;
  int64_t t;
  int lane;

  FFN_FN T logit(int64_t e) const { return decode(*element<S>(k.logits, t, e)); }
  FFN_FN int64_t& id(int64_t j) const { return k.ids[t * k.K + j]; }
  FFN_FN T& weight(int64_t j) const { return static_cast<T*>(k.weights)[t * k.K + j]; }
  // Ids of a caller may be anything: those out of range are left out.
  FFN_FN bool valid(int64_t j) const { return id(j) >= 0 && id(j) < k.E; }
  FFN_FN Score<T> score_of_all() const {
    if (!k.of_row) return {k.score, 0, 1};
    return softmax_of<T>(k.score, int(k.E), lane, [&](int e) { return logit(e); });
  }
  FFN_FN Score<T> score_of_chosen() const {
    return softmax_of<T>(k.score, int(k.K), lane, [&](int j) { return valid(j) ? logit(id(j)) : -T(INFINITY); });
  }
  FFN_FN Score<T> score_by_ids() const { return k.of_row && k.by_logits ? score_of_chosen() : score_of_all(); }
};

// Writes the values that decide the choice into `values`, and the chosen experts into ids.
template <class S, class T>
FFN_FN void choose_experts(const TopKRow<S>& row, const Score<T>& score, T* values) {
  const TopK& k = row.k;
  const int E = int(k.E - k.shared), count = int(k.K - k.shared);
  const int groups = int(k.num_groups), width = E / groups, lane = row.lane;
  const T* const bias = static_cast<const T*>(k.bias);
  // Scores increase with logits, and logits separate more values.
  const bool by_score = (bias || groups > 1) && !k.by_logits;
  for (int e = lane; e < E; e += kWarpSize) {
    const T value = by_score ? score(row.logit(e)) : row.logit(e);
    values[e] = bias ? value + bias[e] : value;
  }
  __syncwarp();
  const auto take = [&](int j, const Candidate<T>& winner) {
    if (j % kWarpSize == lane) row.id(j) = winner.index;
  };
  if (groups == 1) {
    choose_best(values, E, count, lane, [](int) { return true; }, take);
    return;
  }
  // A group's score is its best, or the sum of its two best. A group is chosen if it ranks no lower than the last of
  // the best groups.
  T* const group_scores = values + E;
  for (int g = lane; g < groups; g += kWarpSize) {
    Candidate<T> first{0, -1}, second{0, -1};
    for (int e = g * width; e < (g + 1) * width; ++e) {
      const Candidate<T> candidate{values[e], e};
      if (ranks_before(candidate, first)) second = first, first = candidate;
      else if (ranks_before(candidate, second)) second = candidate;
    }
    group_scores[g] = second.index < 0 || k.group_best < 2 ? first.value : first.value + second.value;
  }
  __syncwarp();  // shuffles do not order memory
  Candidate<T> worst{0, -1};
  choose_best(
      group_scores, groups, int(k.top_groups), lane, [](int) { return true; },
      [&](int, const Candidate<T>& winner) { worst = winner; });
  const auto in_best_groups = [&](int e) {
    const int g = e / width;
    return !ranks_before(worst, Candidate<T>{group_scores[g], g});
  };
  choose_best(values, E, count, lane, in_best_groups, take);
}

template <class S>
__global__ void top_k_kernel(TopK k) {
  using T = ComputeOf<S>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t t = int64_t(blockIdx.x) * (blockDim.x / kWarpSize) + warp, each = top_k_values(k);
  if (t >= k.T) return;
  T* const values =
      k.scratch ? static_cast<T*>(k.scratch) + t * each : reinterpret_cast<T*>(dynamic_shared()) + warp * each;
  const TopKRow<S> row{k, t, lane};
  Score<T> score{};
  if (!k.of_row || !k.by_logits) score = row.score_of_all();
  if (!k.given) choose_experts(row, score, values);
  for (int64_t j = lane; j < k.K; j += kWarpSize) {
    if (k.given) row.id(j) = k.given[t * k.K + j];
    else if (j >= k.K - k.shared) row.id(j) = k.E - k.K + j;
  }
  if (k.of_row && k.by_logits) score = row.score_of_chosen();
  T sum = 0;
  for (int64_t j = lane; j < k.K; j += kWarpSize) {  // each lane reads the ids that it wrote
    const T s = row.valid(j) ? score(row.logit(row.id(j))) : T(0);
    row.weight(j) = s;
    sum += s;
  }
  T factor = T(k.scale);
  if (k.renormalize) factor /= warp_sum(sum) + T(kNormEpsilon);
  for (int64_t j = lane; j < k.K; j += kWarpSize) row.weight(j) *= factor;
}

// With w = scale * s / (sum of the chosen s): ds = scale * (dw - <dw, s> / sum) / sum; dz is ds through the softmax of
// all, of the chosen, or through the score of each. An expert may be chosen twice where the caller chooses.
template <class S>
__global__ void top_k_backward_kernel(TopK k) {
  using T = ComputeOf<S>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t t = int64_t(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  if (t >= k.T) return;
  const TopKRow<S> row{k, t, lane};
  const Score<T> score = row.score_by_ids();
  T factor = T(k.scale), shift = 0;
  if (k.renormalize) {
    T sum = 0, dot = 0;
    for (int64_t j = lane; j < k.K; j += kWarpSize)
      if (row.valid(j)) sum += score(row.logit(row.id(j)));
    sum = warp_sum(sum) + T(kNormEpsilon);
    for (int64_t j = lane; j < k.K; j += kWarpSize)
      if (row.valid(j)) dot += row.weight(j) * (score(row.logit(row.id(j))) / sum);
    factor /= sum;
    shift = warp_sum(dot);
  }
  // Through the softmax's denominator; a renormalised weight does not depend on it.
  T common = 0;
  if (k.of_row && !k.renormalize) {
    for (int64_t j = lane; j < k.K; j += kWarpSize)
      if (row.valid(j)) common += factor * (row.weight(j) - shift) * score(row.logit(row.id(j)));
    common = warp_sum(common);
  }
  S* const dz = static_cast<S*>(k.d_logits) + t * k.E;
  const bool of_all = k.of_row && !k.by_logits, of_chosen = !of_all || k.renormalize;
  for (int64_t e = lane; e < k.E; e += kWarpSize)  // not 0 * s, which is NaN where another score is
    dz[e] = encode<S>(of_chosen ? T(0) : -common * score(row.logit(e)));
  __syncwarp();  // before the chosen are written over
  for (int64_t j = lane; j < k.K; j += kWarpSize) {
    if (!row.valid(j)) continue;
    T ds = factor * (row.weight(j) - shift) - common;
    bool first = true;  // the first of those with the same expert adds them up
    for (int64_t i = 0; i < k.K; ++i) {
      if (i == j || row.id(i) != row.id(j)) continue;
      first = first && i > j;
      ds += factor * (row.weight(i) - shift) - (of_all ? T(0) : common);
    }
    if (first) dz[row.id(j)] = encode<S>(score.grad(row.logit(row.id(j))).slope * ds);
  }
}

}  // namespace ffn_ops::cuda
