// SPDX-License-Identifier: BSD-3-Clause
// top_k.cuh on the host: every option, in every dtype, against the plain formula in double; ties, NaN, infinities, many
// experts, ids that no kernel gave.
#include "../../csrc/cuda/top_k.cuh"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../../csrc/common/names.h"
#include "problems.h"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::Buffer;
using simt::check;
using simt::Random;

struct Options {
  const char* name;
  const char* score = "softmax";
  bool renormalize = false, by_logits = false, bias = false;
  int64_t num_groups = 1, top_groups = 1;
  double scale = 1;
  int64_t group_best = 2, shared = 0;

  bool softmax() const { return std::string(score) == "softmax"; }
  bool softmax_after() const { return softmax() && by_logits; }
};
const Options kOptions[] = {
    {"softmax"},
    {"renormalised", "softmax", true},
    {"softmax after", "softmax", false, true},
    {"softmax after, bias", "softmax", false, true, true},
    {"sigmoid", "sigmoid"},
    {"DeepSeek-V3", "sigmoid", true, false, true, 4, 2, 2.5},
    {"softmax, bias", "softmax", false, false, true},
    {"groups of one expert", "softmax", false, false, false, 12, 5},
    {"groups, renormalised", "softmax", true, false, false, 3, 2, 0.5},
    {"DeepSeek-V2", "softmax", false, false, false, 4, 2, 16, 1},
    {"DeepSeek-V4", "sqrt_softplus", true, false, true, 1, 1, 1.5},
    {"sqrt(softplus)", "sqrt_softplus"},
    {"Kolibri", "sigmoid", true, true, true},
    {"Inkling", "sigmoid", true, false, true, 1, 1, 8, 2, 4},
    {"softmax, shared", "softmax", false, false, false, 1, 1, 1, 2, 4},
    {"softmax after, shared", "softmax", false, true, false, 1, 1, 1, 2, 4},
    {"groups, shared", "sqrt_softplus", true, false, false, 2, 1, 1, 2, 4},
};

double sigmoid_of(double z) { return 1 / (1 + std::exp(-z)); }
double sqrt_softplus_of(double z) { return std::sqrt(std::fmax(z, 0) + std::log1p(std::exp(-std::abs(z)))); }

std::vector<double> softmax_of(const std::vector<double>& z) {
  double most = -INFINITY, sum = 0;
  for (const double v : z) most = v > most ? v : most;
  std::vector<double> p;
  for (const double v : z) p.push_back(std::exp(v - most));
  for (const double v : p) sum += v;
  for (double& v : p) v /= sum;
  return p;
}

// Indices in the order of values: larger first, NaN last, ties in the order of indices.
std::vector<int64_t> ranked(const std::vector<double>& values, std::vector<int64_t> indices) {
  std::stable_sort(indices.begin(), indices.end(), [&](int64_t a, int64_t b) {
    const double x = values[size_t(a)], y = values[size_t(b)];
    return x > y || (std::isnan(y) && !std::isnan(x));
  });
  return indices;
}
std::vector<int64_t> numbers(int64_t begin, int64_t end) {
  std::vector<int64_t> n;
  for (int64_t i = begin; i < end; ++i) n.push_back(i);
  return n;
}

struct Row {
  std::vector<int64_t> ids;
  std::vector<double> weights;
};

std::vector<double> scores_of(const Options& o, const std::vector<double>& z) {
  if (o.softmax_after()) return z;
  if (o.softmax()) return softmax_of(z);
  std::vector<double> s;
  for (const double v : z)
    s.push_back(std::isnan(v) ? v : std::string(o.score) == "sigmoid" ? sigmoid_of(v) : sqrt_softplus_of(v));
  return s;
}

Row reference(const Options& o, const std::vector<double>& z, const std::vector<double>& bias, int64_t K) {
  const int64_t E = int64_t(z.size()) - o.shared;
  const std::vector<double> scores = scores_of(o, z);
  std::vector<double> choice = (o.bias || o.num_groups > 1) && !o.by_logits ? scores : z;
  for (int64_t e = 0; o.bias && e < E; ++e) choice[size_t(e)] += bias[size_t(e)];
  std::vector<int64_t> allowed = numbers(0, E);
  if (o.num_groups > 1) {
    const int64_t width = E / o.num_groups;
    std::vector<double> sums;
    for (int64_t g = 0; g < o.num_groups; ++g) {
      const auto best = ranked(choice, numbers(g * width, (g + 1) * width));
      sums.push_back(choice[size_t(best[0])] + (width == 1 || o.group_best == 1 ? 0 : choice[size_t(best[1])]));
    }
    auto groups = ranked(sums, numbers(0, o.num_groups));
    groups.resize(size_t(o.top_groups));
    std::erase_if(allowed, [&](int64_t e) { return std::count(groups.begin(), groups.end(), e / width) == 0; });
  }
  Row row;
  row.ids = ranked(choice, allowed);
  row.ids.resize(size_t(K - o.shared));
  for (int64_t e = E; e < E + o.shared; ++e) row.ids.push_back(e);
  for (const int64_t e : row.ids) row.weights.push_back(scores[size_t(e)]);
  if (o.softmax_after()) row.weights = softmax_of(row.weights);
  double sum = 1e-20;
  for (const double w : row.weights) sum += w;
  for (double& w : row.weights) w = w * o.scale / (o.renormalize ? sum : 1);
  return row;
}

// The chain rule, entry by entry.
std::vector<double> gradient(const Options& o, const std::vector<double>& z, const std::vector<int64_t>& ids,
                             const std::vector<double>& dw) {
  std::vector<double> chosen, dz(z.size());
  if (o.softmax_after()) {
    for (const int64_t e : ids) chosen.push_back(z[size_t(e)]);
    chosen = softmax_of(chosen);
  } else {
    for (const int64_t e : ids) chosen.push_back(scores_of(o, z)[size_t(e)]);
  }
  double sum = 1e-20, dot = 0;
  for (size_t j = 0; j < ids.size(); ++j) sum += chosen[j], dot += dw[j] * chosen[j];
  const std::vector<double> all = scores_of(o, z);
  for (size_t j = 0; j < ids.size(); ++j) {
    const double ds = o.scale * (o.renormalize ? dw[j] / sum - dot / sum / sum : dw[j]), s = chosen[j];
    if (!o.softmax()) {
      const double p = sigmoid_of(z[size_t(ids[j])]);
      dz[size_t(ids[j])] += ds * (std::string(o.score) == "sigmoid" ? p * (1 - p) : p / (2 * s));
    } else if (o.softmax_after()) {
      for (size_t i = 0; i < ids.size(); ++i) dz[size_t(ids[i])] += ds * s * ((i == j) - chosen[i]);
    } else {
      for (size_t e = 0; e < z.size(); ++e) dz[e] += ds * s * ((int64_t(e) == ids[j]) - all[e]);
    }
  }
  return dz;
}

template <class S>
struct Problem {
  using T = ComputeOf<S>;
  const Options& o;
  int64_t T_, E, K;
  bool transposed;
  Buffer<S> logits;
  Buffer<T> bias, weights;
  Buffer<int64_t> ids;

  Problem(const Options& o, int64_t T, int64_t E, int64_t K, bool transposed)
      : o(o), T_(T), E(E), K(K), transposed(transposed), logits(T * E), bias(E), weights(T * K), ids(T * K) {}

  S& logit(int64_t t, int64_t e) { return logits[transposed ? e * T_ + t : t * E + e]; }
  std::vector<double> row(int64_t t) {
    std::vector<double> z;
    for (int64_t e = 0; e < E; ++e) z.push_back(double(Codec<S>::decode(logit(t, e))));
    return z;
  }
  TopK job() {
    TopK k;
    k.T = T_;
    k.E = E;
    k.K = K;
    k.logits = transposed ? Matrix{logits.data(), 1, T_} : Matrix{logits.data(), E, 1};
    k.dtype = Codec<S>::kDType;
    if (o.bias) k.bias = bias.data();
    k.score = kScores.index(o.score);
    k.of_row = o.softmax();
    k.renormalize = o.renormalize;
    k.by_logits = o.by_logits;
    k.shared = o.shared;
    k.num_groups = o.num_groups;
    k.top_groups = o.top_groups;
    k.group_best = o.group_best;
    k.scale = o.scale;
    k.ids = ids.data();
    k.weights = weights.data();
    return k;
  }
  void launch(uint64_t seed) {
    TopK k = job();
    const TopKGrid grid = top_k_grid(k);
    Buffer<char> scratch(grid.scratch_bytes);
    if (grid.scratch_bytes > 0) k.scratch = scratch.data();
    if (grid.blocks > 0) simt::launch({grid.blocks, grid.threads, grid.shared_bytes, seed}, top_k_kernel<S>, k);
  }
  void check_forward(uint64_t seed) {
    launch(seed);
    const double unit = sizeof(T) == 8 ? 1e-13 : 3e-6;
    for (int64_t t = 0; t < T_; ++t) {
      const Row expected = reference(o, row(t), {bias.begin(), bias.end()}, K);
      for (int64_t j = 0; j < K; ++j) {
        const int64_t id = ids[t * K + j];
        const double got = double(weights[t * K + j]), exact = expected.weights[size_t(j)];
        check(id == expected.ids[size_t(j)], "%s, E %lld, K %lld, token %lld, slot %lld: expert %lld, expected %lld",
              o.name, (long long)E, (long long)K, (long long)t, (long long)j, (long long)id,
              (long long)expected.ids[size_t(j)]);
        check(got == exact || std::abs(got - exact) <= unit * std::abs(exact) + 1e-38 ||
                  (std::isnan(got) && std::isnan(exact)),
              "%s, E %lld: weight %g, expected %g", o.name, (long long)E, got, exact);
      }
    }
  }
  void check_backward(uint64_t seed) {
    Random random(seed);
    Buffer<T> dw(T_ * K);
    Buffer<S> dz(T_ * E);
    for (T& v : dw) v = T(normal(random));
    TopK k = job();
    k.weights = dw.data();
    k.d_logits = dz.data();
    const TopKGrid grid = top_k_grid(k);
    if (grid.blocks > 0) simt::launch({grid.blocks, grid.threads, 0, seed}, top_k_backward_kernel<S>, k);
    for (int64_t t = 0; t < T_; ++t) {
      const std::vector<int64_t> chosen(&ids[t * K], &ids[t * K] + K);
      const auto expected = gradient(o, row(t), chosen, {&dw[t * K], &dw[t * K] + K});
      for (int64_t e = 0; e < E; ++e) {
        const double got = double(Codec<S>::decode(dz[t * E + e])), exact = expected[size_t(e)];
        check(std::abs(got - exact) <= epsilon<S>() * std::abs(exact) + 100 * epsilon<T>(),
              "%s backward, E %lld, K %lld: %g, expected %g", o.name, (long long)E, (long long)K, got, exact);
      }
    }
    // Ids that no kernel gave: nothing outside is touched.
    for (int64_t& id : ids)
      if (random.coin()) id = random.coin() ? int64_t(random.next()) : E;
    if (grid.blocks > 0) simt::launch({grid.blocks, grid.threads, 0, seed}, top_k_backward_kernel<S>, k);
  }
};

template <class S>
void test_dtype() {
  uint64_t seed = 0;
  for (const Options& o : kOptions) {
    const int64_t shapes[][3] = {{0, 12, 3},   {1, 12, 5},   {7, 12, 3}, {5, 36, 4},
                                 {3, 132, 40}, {2, 300, 33}, {2, 12, 12}};
    for (const auto& [T, E, K] : shapes) {
      if (K > (E - o.shared) / o.num_groups * o.top_groups || (E - o.shared) % o.num_groups) continue;
      Random random(++seed);
      Problem<S> p(o, T, E, K + o.shared, seed & 1);
      // Far enough from each other that rounding decides nothing, or equal.
      for (int64_t t = 0; t < T; ++t)
        for (int64_t e = 0; e < E; ++e)
          p.logit(t, e) = Codec<S>::encode(ComputeOf<S>(double(random.below(64)) / 8 - 4));
      for (auto& b : p.bias) b = ComputeOf<S>(normal(random) / 4);
      p.check_forward(seed);
      p.check_backward(seed);
    }
  }
}

// Rows of NaN, infinities and equal values.
void test_special_rows() {
  const float nan = NAN, inf = INFINITY;
  std::vector<std::vector<float>> rows = {std::vector<float>(12, nan),
                                          std::vector<float>(12, -inf),
                                          std::vector<float>(12, 0.0f),
                                          {nan, 1, 2, nan, nan, nan, nan, nan, nan, nan, nan, nan},
                                          {inf, 1, inf, 0, 0, 0, 0, 0, 0, 0, 0, 0},
                                          {0, 1, -0.0f, 1, 0, 1, -0.0f, 1, 0, 1, -0.0f, 1},
                                          {-inf, -inf, 3, nan, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf}};
  for (const Options& o : kOptions) {
    Problem<float> p(o, int64_t(rows.size()), 12, (12 - o.shared) / o.num_groups * o.top_groups < 4 ? 4 : 4 + o.shared,
                     false);
    for (int64_t t = 0; t < p.T_; ++t)
      for (int64_t e = 0; e < 12; ++e) p.logit(t, e) = rows[size_t(t)][size_t(e)];
    for (float& b : p.bias) b = 0;
    p.check_forward(3);
  }
}

// Experts that the caller chose, one of them twice: their weights, and a gradient in which both slots are added up.
void test_given() {
  for (const Options& o : kOptions) {
    if (o.bias || o.shared > 0 || o.num_groups > 1) continue;
    Problem<double> p(o, 5, 12, 4, false);
    Buffer<int64_t> given(5 * 4);
    Random random(8);
    for (double& z : p.logits) z = normal(random);
    for (int64_t i = 0; i < 5 * 4; ++i) given[i] = i % 4 == 3 ? given[i - 1] : int64_t(random.below(12));
    Buffer<double> dw(5 * 4), dz(5 * 12);
    for (double& v : dw) v = normal(random);
    TopK k = p.job();
    k.given = given.data();
    const TopKGrid grid = top_k_grid(k);
    simt::launch({grid.blocks, grid.threads, grid.shared_bytes, 1}, top_k_kernel<double>, k);
    for (int64_t t = 0; t < 5; ++t) {
      const std::vector<int64_t> ids(&given[t * 4], &given[t * 4] + 4);
      std::vector<double> weights;
      for (const int64_t e : ids) weights.push_back(scores_of(o, p.row(t))[size_t(e)]);
      if (o.softmax_after()) weights = softmax_of(weights);
      double sum = 1e-20;
      for (const double w : weights) sum += w;
      for (int64_t j = 0; j < 4; ++j) {
        const double exact = weights[size_t(j)] * o.scale / (o.renormalize ? sum : 1);
        check(p.ids[t * 4 + j] == ids[size_t(j)], "%s: another expert than the given", o.name);
        check(std::abs(p.weights[t * 4 + j] - exact) < 1e-13, "%s: weight of a given expert", o.name);
      }
    }
    k = p.job();
    k.weights = dw.data();
    k.d_logits = dz.data();
    simt::launch({grid.blocks, grid.threads, 0, 2}, top_k_backward_kernel<double>, k);
    for (int64_t t = 0; t < 5; ++t) {
      const auto expected = gradient(o, p.row(t), {&given[t * 4], &given[t * 4] + 4}, {&dw[t * 4], &dw[t * 4] + 4});
      for (int64_t e = 0; e < 12; ++e)
        check(std::abs(dz[t * 12 + e] - expected[size_t(e)]) < 1e-13, "%s: gradient of given experts", o.name);
    }
  }
}

// Scores that no shared memory holds go through scratch; a token's bits do not depend on where they are, or on others.
void test_many_experts() {
  const Options o = kOptions[6];
  Random random(4);
  Problem<double> p(o, 3, 7000, 5, false), alone(o, 1, 7000, 5, false);
  for (double& z : p.logits) z = normal(random);
  for (int64_t e = 0; e < 7000; ++e) alone.bias[e] = p.bias[e] = normal(random) / 1000;
  check(top_k_grid(p.job()).scratch_bytes == 3 * 7004 * 8 && top_k_grid(p.job()).shared_bytes == 0, "scratch");
  p.check_forward(1);
  std::copy_n(&p.logits[7000], 7000, alone.logits.begin());
  alone.launch(2);
  check(std::memcmp(&p.weights[5], alone.weights.data(), 5 * 8) == 0, "a token's weights depend on the others");
}

}  // namespace

int main() {
  test_dtype<float>();
  test_dtype<double>();
  test_dtype<Half>();
  test_dtype<BFloat16>();
  test_special_rows();
  test_given();
  test_many_experts();
  return simt::report("top_k_test");
}
