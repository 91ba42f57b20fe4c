// SPDX-License-Identifier: BSD-3-Clause
// elementwise.cuh and scalar.cuh on the host: one lane's mathematics against the C library, gated activation with its
// derivatives in every dtype, activation, layout and option against plain formulas in double.
#define FFN_FN inline  // not always: a hundred kernels compile in a fraction of the time

#include "../../csrc/cuda/elementwise.cuh"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "input.h"
#include "problems.h"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::Buffer;
using simt::check;
using simt::Random;

// ---- mathematics ----------------------------------------------------------------------------------------------------

// The distance of `value` from `exact` in steps of T at `exact`.
template <class T>
double ulps(T value, long double exact) {
  const T rounded = T(exact);
  if (std::isnan(value) || std::isnan(rounded)) return std::isnan(value) && std::isnan(rounded) ? 0 : 1e9;
  if (value == rounded || std::isinf(rounded)) return value == rounded ? 0 : 1e9;
  const T step = std::nextafter(std::abs(rounded), std::numeric_limits<T>::infinity()) - std::abs(rounded);
  return double(std::abs((long double)(value)-exact) / step);
}

template <class T>
void test_math() {
  using V = Lane<T>;
  struct Function {
    const char* name;
    T (*ours)(T);
    long double (*exact)(long double);
    double bound;
  };
  const Function functions[] = {
      // bounds as in tests/cpp/vector_sweep.h
      {"exp", [](T x) { return exp(V(x)).value; }, [](long double x) { return std::exp(x); }, 1},
      {"tanh", [](T x) { return tanh(V(x)).value; }, [](long double x) { return std::tanh(x); }, 1},
      {"erf", [](T x) { return erf(V(x)).value; }, [](long double x) { return std::erf(x); }, 2},
      {"sigmoid", [](T x) { return sigmoid(V(x)).value; }, [](long double x) { return 1 / (1 + std::exp(-x)); }, 2},
      {"normal_cdf", [](T x) { return normal_point(V(x)).cdf.value; },
       [](long double x) { return std::erfc(-x * 0.70710678118654752440L) / 2; }, 12},
  };
  for (const Function& f : functions) {
    double worst = 0;
    Random random(7);
    for (int i = 0; i < 20000; ++i) {
      const double unit = double(random.next() >> 11) * 0x1p-53;
      const T x = T((random.coin() ? 1 : -1) * std::exp2(unit * 20 - 13));
      const long double exact = f.exact(x);
      if (std::abs(exact) < std::numeric_limits<T>::min()) continue;  // one more rounding where denormal
      worst = std::max(worst, ulps<T>(f.ours(x), exact));
    }
    check(worst <= f.bound, "%s of %d bytes: %g ULP", f.name, int(sizeof(T)), worst);
    check(std::isnan(f.ours(T(NAN))), "%s of NaN", f.name);
    for (const T x : {T(0), T(-0.0), T(INFINITY), -T(INFINITY)})
      check(ulps<T>(f.ours(x), f.exact(x)) <= f.bound, "%s(%g) = %g", f.name, double(x), double(f.ours(x)));
  }
}

// ---- gated activation -----------------------------------------------------------------------------------------------

struct Case {
  int pass;
  bool gated, kept, weighted, summed, all_out;
  int layout;
  int64_t rows, cols;
  bool limited = false;  // only where gated
};

// What the kernels must give, from the activation in double.
template <class Act>
void expected_at(const Case& k, double gate, double up, double d, double ddg, double ddu, const Gate& form,
                 double (&out)[3]) {
  using V = Lane<double>;
  double pass_gate = 1, pass_up = 1;  // slopes of the limits
  if (form.limited()) {
    pass_gate = gate < form.limit, pass_up = std::abs(up) < form.limit;
    gate = std::min(gate, form.limit), up = std::clamp(up, -form.limit, form.limit) + form.up_shift;
  }
  V own[kMostOwnParams];
  for (int i = 0; i < kMostOwnParams; ++i) own[i] = V(form.own[i]);
  const auto a = Act::grad2(V(gate), own);
  const double value = a.value.value, slope = a.slope.value, bend = a.curvature.value;
  double up_slope = pass_up, up_bend = 0;
  if constexpr (Act::has_up) {
    const auto h = Act::up_grad2(V(up), own);
    up = h.value.value, up_slope = h.slope.value, up_bend = h.curvature.value;
  }
  if (!k.gated) up = 1;
  ddg *= pass_gate;
  if (k.pass == 0) out[0] = value * up;
  if (k.pass == 1) out[0] = pass_gate * d * slope * up, out[1] = d * value * up_slope, out[2] = value * up;
  if (k.pass == 2)
    out[0] = ddg * up * slope + ddu * up_slope * value,
    out[1] = pass_gate * d * (ddg * up * bend + ddu * up_slope * slope),
    out[2] = d * (ddg * slope * up_slope + ddu * value * up_bend);
}

template <class S, class Act>
void run_case(const Case& k, uint64_t seed) {
  using T = ComputeOf<S>;
  Random random(seed);
  const int64_t rows = k.rows, cols = k.cols;
  const auto layout = [&] { return k.layout < kLayouts ? k.layout : int(random.below(kLayouts)); };
  Input<S> gate(layout(), rows, cols, random), up(layout(), rows, cols, random), d(layout(), rows, cols, random);
  Input<S> ddg(layout(), rows, cols, random), ddu(layout(), rows, cols, random);
  Buffer<T> sum(rows * cols), weight(rows);
  for (T& v : sum) v = T(normal(random));
  for (T& v : weight) v = T(normal(random));
  const std::vector<T> sum_before(sum.begin(), sum.end());
  const int64_t kept = k.kept ? rows / 2 : rows;

  GatedAct g;
  g.rows = rows;
  g.cols = cols;
  g.dtype = Codec<S>::kDType;
  g.gate = gate.m;
  if (k.gated) g.up = up.m;
  if (k.pass > 0) g.d_out = d.m;
  if (k.pass == 2) g.dd_gate = ddg.m;
  if (k.pass == 2 && k.gated) g.dd_up = ddu.m;
  if (k.kept) g.kept = &kept;
  if (k.weighted && k.pass == 1) g.row_weight = weight.data();
  if (k.summed && k.pass == 0) g.sum = sum.data(), g.accumulate = random.coin();
  for (double& own : g.own) own = 1.5;
  if (k.limited && k.gated && !Act::has_up) g.limit = 2.25, g.up_shift = 0.75;
  const int64_t pad = random.coin() ? 0 : 16 / int64_t(sizeof(S));
  std::vector<Buffer<S>> out;
  for (int i = 0; i < 3; ++i) {
    out.emplace_back(rows * (cols + pad));
    const bool exists = k.pass == 0 ? i == 0 : k.gated || i != (k.pass == 1 ? 1 : 2);
    if (exists && (k.all_out || i == int(seed % 3))) g.out[i] = out.back().data();
    g.out_stride[i] = cols + pad;
  }
  const GatedAct asked = g;
  Buffer<T> own_values(Act::own.count());
  if (Act::learned > 0 && random.coin()) {  // then they are read from there
    for (T& own : own_values) own = T(1.5);
    for (double& own : g.own) own = NAN;
    g.own_values = own_values.data();
  }
  flatten(g);
  const PackGrid grid = gated_act_grid(g);
  const simt::Grid launch{grid.blocks, kPackThreads, 0, seed};
  if (grid.blocks > 0) {
    if (k.pass == 0) simt::launch(launch, gated_act_kernel<S, Act, GatedActForward>, g, grid);
    if (k.pass == 1) simt::launch(launch, gated_act_kernel<S, Act, GatedActBackward>, g, grid);
    if (k.pass == 2) simt::launch(launch, gated_act_kernel<S, Act, GatedActDoubleBackward>, g, grid);
  }
  const double unit = epsilon<S>();
  const auto what = [&] {
    return simt::format("%s %s pass %d layout %d gated %d kept %d %lldx%lld seed %llu", Act::name,
                        kDTypeNames[int(g.dtype)], k.pass, k.layout, k.gated, k.kept, (long long)rows, (long long)cols,
                        (unsigned long long)seed);
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols + pad; ++c) {
      double expected[3] = {};
      const bool computed = r < kept && c < cols;
      if (computed) {
        expected_at<Act>(k, gate.at(r, c), up.at(r, c), d.at(r, c), ddg.at(r, c), k.gated ? ddu.at(r, c) : 0, asked,
                         expected);
        if (asked.row_weight) expected[2] *= double(weight[r]);
        if (asked.accumulate) expected[0] += double(sum_before[size_t(r * cols + c)]);
      }
      for (int i = 0; i < 3; ++i) {
        const S got = out[size_t(i)][r * (cols + pad) + c];
        if (c >= cols || !asked.out[i]) {
          check(is_poison(got), "%s: out[%d] is written where it must not be", what().c_str(), i);
        } else {
          // The terms of a sum may cancel: magnitudes up to 3 * 3 * 3 * 3 in float32; then the rounding to storage. A
          // squared activation doubles the relative error of what is squared, whose sigmoid has 2 ULP.
          const double value = double(Codec<S>::decode(got));
          const double squared = std::is_same_v<Act, SiluSquared> ? 4 * std::abs(expected[i]) : 0;
          const double bound = unit * std::abs(expected[i]) + epsilon<T>() * (400 + squared);
          check(std::abs(value - expected[i]) <= bound, "%s: out[%d] at %lld, %lld: %g, expected %g", what().c_str(), i,
                (long long)r, (long long)c, value, expected[i]);
          if (!computed) check(value == 0, "%s: row %lld behind the kept ones", what().c_str(), (long long)r);
        }
      }
      if (c < cols && asked.sum)
        check(std::abs(double(sum[r * cols + c]) - expected[0]) <= epsilon<T>() * (std::abs(expected[0]) + 400),
              "%s: sum at %lld, %lld", what().c_str(), (long long)r, (long long)c);
    }
  }
}

template <class S, class... Acts>
void test_gated_act(TypeList<Acts...>) {
  const int64_t shapes[][2] = {{1, 1}, {3, 5}, {2, 64}, {1, 4099}, {37, 24}, {5, 520}, {0, 4}, {4, 0}, {600, 3}};
  uint64_t seed = 1;
  const auto run = [&]<class Act>(Tag<Act>) {
    for (int pass = 0; pass < 3; ++pass)
      for (const auto& shape : shapes) {
        Random random(++seed);
        const bool plain = seed % 3 == 0;  // often the fast way: dense, flat
        run_case<S, Act>({pass, random.coin(), !plain && random.coin(), !plain && random.coin(), random.coin(),
                          random.coin(), plain ? 0 : kLayouts, shape[0], shape[1], random.coin()},
                         seed);
      }
  };
  (run(Tag<Acts>{}), ...);
}

// Each layout with each pass, one activation.
template <class S>
void test_layouts() {
  for (int layout = 0; layout < kLayouts; ++layout)
    for (int pass = 0; pass < 3; ++pass)
      for (const bool kept : {false, true})
        run_case<S, Silu>({pass, true, kept, true, true, true, layout, 19, 72, !kept}, uint64_t(100 + layout));
}

// The same values, 16 bytes at a time and one by one, whole packs and parts, have the same bits; nothing is read behind
// an input's end.
template <class S>
void test_bits_do_not_depend_on_alignment() {
  Random random(3);
  const int64_t n = 1003;
  Buffer<S> aligned(n), unaligned(n + 1), out(n), out_unaligned(n + 1);
  for (int64_t i = 0; i < n; ++i) aligned[i] = unaligned[i + 1] = Codec<S>::encode(ComputeOf<S>(normal(random)));
  const auto run = [&](const S* in, S* to) {
    GatedAct g;
    g.rows = 1;
    g.cols = n;
    g.dtype = Codec<S>::kDType;
    g.gate = g.up = {in, n, 1};
    g.out[0] = to;
    const PackGrid grid = gated_act_grid(g);
    simt::launch({grid.blocks, kPackThreads, 0, 5}, gated_act_kernel<S, Gelu, GatedActForward>, g, grid);
    return grid.vector;
  };
  check(run(aligned.data(), out.data()) != 0 && run(unaligned.data() + 1, out_unaligned.data() + 1) == 0,
        "vector access");
  check(std::memcmp(out.data(), out_unaligned.data() + 1, size_t(n) * sizeof(S)) == 0, "bits depend on alignment");
}

template <class S>
void test_dtype() {
  test_gated_act<S>(Activations{});
  test_layouts<S>();
  test_bits_do_not_depend_on_alignment<S>();
}

}  // namespace

int main() {
  test_math<float>();
  test_math<double>();
  test_dtype<float>();
  test_dtype<double>();
  test_dtype<Half>();
  test_dtype<BFloat16>();
  return simt::report("elementwise_test");
}
