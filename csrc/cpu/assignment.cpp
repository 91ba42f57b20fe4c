// SPDX-License-Identifier: BSD-3-Clause
// Assignments of all tokens to experts, on the CPU: BASE's balanced one, and rounding to tiles.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "routes.h"

namespace ffn_ops {
namespace {

// ---- BASE -----------------------------------------------------------------------------------------------------------

// The assignment of T tokens to E experts with the largest sum of scores, floor(T / E) or one more for each expert: a
// transportation problem, solved by shortest augmenting paths over the experts. Tokens are added one by one; each
// takes the cheapest chain of moves that ends at an expert with room. T mod E experts may hold one more than the
// others: that right moves along chains too, through one node that stands for all of them.
class Assignment {
 public:
  Assignment(int64_t T, int64_t E, std::vector<double> scores)
      : T_(T),
        E_(E),
        quota_(T / E),
        extras_(T % E),
        scores_(std::move(scores)),
        load_(index(E)),
        potential_(index(E + 1)),
        expert_(index(T), -1),
        moves_(index(E * E)) {}

  const std::vector<int64_t>& solve() {
    for (int64_t t = 0; t < T_; ++t) add(t);
    return expert_;
  }

 private:
  struct Move {
    double cost;
    int64_t token;
    bool operator<(const Move& other) const {  // the queue's top is the cheapest, then the lowest token
      return cost != other.cost ? cost > other.cost : token > other.token;
    }
  };
  static size_t index(int64_t i) { return static_cast<size_t>(i); }
  double score(int64_t t, int64_t e) const { return scores_[index(t * E_ + e)]; }

  // The cheapest move of a token from a to b, or none.
  const Move* cheapest(int64_t a, int64_t b) {
    auto& queue = moves_[index(a * E_ + b)];
    while (!queue.empty() && expert_[index(queue.top().token)] != a) queue.pop();
    return queue.empty() ? nullptr : &queue.top();
  }

  void place(int64_t t, int64_t e) {
    expert_[index(t)] = e;
    for (int64_t b = 0; b < E_; ++b)
      if (b != e) moves_[index(e * E_ + b)].push({score(t, e) - score(t, b), t});
  }

  // Dijkstra over experts and, last, the node of the extra places, with potentials that keep costs from going below 0.
  void add(int64_t t) {
    const double infinite = std::numeric_limits<double>::infinity();
    const int64_t extra = E_;
    std::vector<double> distance(index(E_ + 1), infinite);
    std::vector<int64_t> from(index(E_ + 1), -1), moved(index(E_ + 1), -1);
    std::vector<char> done(index(E_ + 1));
    double best = -infinite;
    for (int64_t e = 0; e < E_; ++e) best = std::max(best, score(t, e) + potential_[index(e)]);
    for (int64_t e = 0; e < E_; ++e) distance[index(e)] = best - score(t, e) - potential_[index(e)];
    int64_t end = -1;
    for (;;) {
      int64_t a = -1;
      for (int64_t e = 0; e <= E_; ++e)
        if (!done[index(e)] && distance[index(e)] < infinite && (a < 0 || distance[index(e)] < distance[index(a)]))
          a = e;
      done[index(a)] = 1;
      if (a == extra ? extras_used_ < extras_ : load_[index(a)] < quota_) {
        end = a;
        break;
      }
      const auto relax = [&](int64_t b, double cost, int64_t token) {
        if (done[index(b)]) return;
        const double reduced = std::max(0.0, cost + potential_[index(a)] - potential_[index(b)]);
        if (distance[index(a)] + reduced < distance[index(b)]) {
          distance[index(b)] = distance[index(a)] + reduced;
          from[index(b)] = a;
          moved[index(b)] = token;
        }
      };
      if (a == extra) {  // an expert with one more token gives up the extra place, and then a token
        for (int64_t b = 0; b < E_; ++b)
          if (load_[index(b)] > quota_) relax(b, 0, -1);
      } else {
        for (int64_t b = 0; b < E_; ++b) {
          const Move* move = a == b ? nullptr : cheapest(a, b);
          if (move) relax(b, move->cost, move->token);
        }
        if (load_[index(a)] == quota_ && extras_ > 0) relax(extra, 0, -1);
      }
    }
    for (int64_t e = 0; e <= E_; ++e) potential_[index(e)] += std::min(distance[index(e)], distance[index(end)]);
    apply(t, end, from, moved);
  }

  void apply(int64_t t, int64_t end, const std::vector<int64_t>& from, const std::vector<int64_t>& moved) {
    std::vector<std::pair<int64_t, int64_t>> placed;  // token, expert
    if (end == E_) ++extras_used_;
    for (int64_t b = end; b >= 0; b = from[index(b)]) {
      const int64_t a = from[index(b)];
      if (a < 0) placed.emplace_back(t, b);
      else if (moved[index(b)] >= 0) placed.emplace_back(moved[index(b)], b);
    }
    for (const auto& [token, e] : placed) {
      const int64_t before = expert_[index(token)];
      if (before >= 0) --load_[index(before)];
      ++load_[index(e)];
    }
    for (const auto& [token, e] : placed) place(token, e);
  }

  int64_t T_, E_, quota_, extras_, extras_used_ = 0;
  std::vector<double> scores_;
  std::vector<int64_t> load_;
  std::vector<double> potential_;
  std::vector<int64_t> expert_;
  std::vector<std::priority_queue<Move>> moves_;
};

std::vector<double> finite_scores(const Tensor& scores) {
  const DType dtype = check_scores(scores).dtype;
  const Tensor dense = torch::stable::contiguous(scores);
  std::vector<double> values(static_cast<size_t>(scores.numel()));
  for (size_t i = 0; i < values.size(); ++i) {
    const double v = dtype == DType::kFloat64 ? static_cast<const double*>(dense.const_data_ptr())[i]
                                              : static_cast<const float*>(dense.const_data_ptr())[i];
    constexpr double kLimit = 1e30;  // sums of differences stay finite; NaN is the worst
    values[i] = std::isnan(v) ? -kLimit : std::clamp(v, -kLimit, kLimit);
  }
  return values;
}

// Tokens whose mask is false get expert E.
Tensor balanced_assignment(const Tensor& scores, std::optional<Tensor> mask) {
  const std::vector<double> values = finite_scores(scores);
  const int64_t T = scores.size(0), E = scores.size(1);
  std::vector<int64_t> real(static_cast<size_t>(T));
  std::iota(real.begin(), real.end(), 0);
  if (mask) {
    check_mask(*mask, T);
    const Tensor dense = torch::stable::contiguous(*mask);
    const auto* flags = static_cast<const bool*>(dense.const_data_ptr());
    std::erase_if(real, [&](int64_t t) { return !flags[t]; });
  }
  std::vector<double> rows;
  rows.reserve(real.size() * static_cast<size_t>(E));
  for (int64_t t : real) rows.insert(rows.end(), values.begin() + t * E, values.begin() + (t + 1) * E);
  const auto count = static_cast<int64_t>(real.size());
  Assignment assignment(count, E, std::move(rows));
  const std::vector<int64_t>& expert = assignment.solve();
  Tensor ids = fresh_indices({T});
  auto* out = static_cast<int64_t*>(ids.mutable_data_ptr());
  std::fill(out, out + T, E);
  for (size_t i = 0; i < real.size(); ++i) out[real[i]] = expert[i];
  return ids;
}

// ---- token rounding -------------------------------------------------------------------------------------------------

// Each expert's tokens, their number rounded to the nearest multiple of `tile` (half up, at most T): the expert
// loses its lowest scores, or gets the highest of the other tokens. Entries that are left over get expert E.
std::tuple<Tensor, Tensor> round_tokens(const Tensor& scores, const Tensor& ids, int64_t tile) {
  const std::vector<double> values = finite_scores(scores);
  const int64_t T = scores.size(0), E = scores.size(1);
  STD_TORCH_CHECK(tile >= 1, "tile: expected at least 1, got ", tile);
  check_indices_shape(ids, "ids", {T, "K"});
  const Tensor dense = torch::stable::contiguous(ids);
  const auto* chosen = static_cast<const int64_t*>(dense.const_data_ptr());
  tile = std::min(tile, 2 * T + 2);  // a larger one rounds every count to 0 as well, and its sums may not fit
  const int64_t K = ids.size(1), R = T * K + E * std::min(tile / 2, T);
  std::vector<char> chose(static_cast<size_t>(T * E));
  std::vector<int64_t> counts(static_cast<size_t>(E));
  for (int64_t i = 0; i < T * K; ++i) {
    if (chosen[i] < 0 || chosen[i] >= E) continue;
    char& flag = chose[static_cast<size_t>(i / K * E + chosen[i])];
    counts[static_cast<size_t>(chosen[i])] += !flag;
    flag = 1;
  }
  Tensor expert = fresh_indices({R}), token = fresh_indices({R});
  auto* experts = static_cast<int64_t*>(expert.mutable_data_ptr());
  auto* tokens = static_cast<int64_t*>(token.mutable_data_ptr());
  std::vector<int64_t> order(static_cast<size_t>(T));
  int64_t used = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t wanted = std::min(T, (counts[static_cast<size_t>(e)] + tile / 2) / tile * tile);
    std::iota(order.begin(), order.end(), 0);
    const auto at = [&](int64_t t) { return static_cast<size_t>(t * E + e); };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      if (chose[at(a)] != chose[at(b)]) return chose[at(a)] > chose[at(b)];
      return values[at(a)] > values[at(b)];
    });
    for (int64_t i = 0; i < wanted; ++i, ++used) {
      experts[used] = e;
      tokens[used] = order[static_cast<size_t>(i)];
    }
  }
  std::fill(experts + used, experts + R, E);
  std::fill(tokens + used, tokens + R, 0);
  return {expert, token};
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("balanced_assignment", TORCH_BOX(&ffn_ops::balanced_assignment));
  m.impl("round_tokens", TORCH_BOX(&ffn_ops::round_tokens));
}
