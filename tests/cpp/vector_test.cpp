// SPDX-License-Identifier: BSD-3-Clause
// Tests csrc/cpu/isa/vec*.h, csrc/common/{dtypes,math,activations}.h on every instruction set that the machine has,
// without torch. Prints the largest error of each function; exits non-zero if a bound is broken.
// `--all` runs the one-argument functions over every float32.
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "vector_failures.h"
#include "vector_storage.h"
#include "vector_sweep.h"

namespace ffn_ops {
namespace {

template <class T>
void check_shuffles(const VectorTable& v, const Arithmetic<T>& arithmetic) {
  const int n = arithmetic.lanes;
  std::vector<T> square(n * n), x(n);
  for (int i = 0; i < n * n; ++i) square[i] = T(i);
  arithmetic.transpose(square.data());
  for (int i = 0; i < n * n; ++i) {
    if (square[i] != T(i % n * n + i / n)) fail(v, "transpose %d lanes: element %d is %g", n, i, double(square[i]));
  }
  for (int i = 0; i < n; ++i) x[i] = T(1 << i);  // any lost or doubled lane shows
  if (arithmetic.reduce_add(x.data()) != T((1 << n) - 1))
    fail(v, "reduce_add: %g", double(arithmetic.reduce_add(x.data())));
}

template <class T>
void check_basics(const VectorTable& v, const Arithmetic<T>& arithmetic) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const T big = T(1) / std::numeric_limits<T>::epsilon();
  const std::vector<T> values = {0,
                                 T(-0.0),
                                 1,
                                 -1,
                                 T(0.5),
                                 T(-0.5),
                                 T(1.5),
                                 T(2.5),
                                 T(-2.5),
                                 T(1.0) / 3,
                                 big,
                                 -big,
                                 big / 2 + T(0.5),
                                 T(7.49),
                                 inf,
                                 -inf,
                                 nan,
                                 std::numeric_limits<T>::denorm_min()};
  const char* const names[] = {"+",     "-", "*",  "/", "neg", "fma", "abs", "min", "max", "round_even", "copysign",
                               "scale", "<", "<=", ">", ">=",  "==",  "!=",  "&",   "|",   "!"};
  constexpr int kResults = sizeof(names) / sizeof(names[0]);
  const int lanes = arithmetic.lanes, count = int(values.size());
  std::vector<T> a(lanes), b(lanes), c(lanes), out(kResults * lanes);
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < count; ++j) {
      for (int lane = 0; lane < lanes; ++lane) {
        a[lane] = values[(i + lane) % count];
        b[lane] = values[(j + 3 * lane) % count];
        c[lane] = values[(i * 7 + j + lane) % 10];  // finite and small, as it is an exponent too
      }
      arithmetic.basics(a.data(), b.data(), c.data(), out.data());
      for (int lane = 0; lane < lanes; ++lane) {
        const T x = a[lane], y = b[lane], z = c[lane];
        const T product = x * y;
        const T wants[] = {x + y,
                           x - y,
                           product,
                           x / y,
                           -x,
                           v.has_fma ? std::fma(x, y, z) : product + z,
                           std::fabs(x),
                           x < y ? x : y,
                           y < x ? x : y,
                           std::nearbyint(x),
                           std::copysign(x, y),
                           T(x * std::ldexp(T(1), int(std::nearbyint(z)))),
                           T(x < y),
                           T(x <= y),
                           T(x > y),
                           T(x >= y),
                           T(x == y),
                           T(x != y),
                           T(x < y && y < z),
                           T(x < y || y < z),
                           T(!(x < y))};
        for (int r = 0; r < kResults; ++r) {
          const T got = out[r * lanes + lane], want = wants[r];
          const bool zeros_of_min_max = (r == 7 || r == 8) && x == 0 && y == 0;
          if (!(std::isnan(want) ? std::isnan(got)
                                 : got == want && (zeros_of_min_max || std::signbit(got) == std::signbit(want))))
            fail(v, "%s of %g, %g, %g: %g, expected %g", names[r], double(x), double(y), double(z), double(got),
                 double(want));
        }
      }
    }
  }
}

template <class T>
std::vector<T> special_points() {
  using Limits = std::numeric_limits<T>;
  std::vector<T> points = {
      0, Limits::denorm_min(), Limits::min(), Limits::max(), Limits::infinity(), Limits::quiet_NaN()};
  // Where the code changes branch or the result leaves the range.
  for (const double edge :
       {0.625,   1.0,   6.0,    14.5,    20.0,  30.0,   38.0,  39.0,       40.0, 87.3365, 88.7228, 89.0,
        103.972, 105.0, 708.39, 709.782, 710.0, 745.13, 746.0, 0.34657359, 1e10, 1e19,    1e30}) {
    T x = T(edge), y = T(edge);
    for (int i = 0; i < 200; ++i) {
      points.push_back(x);
      points.push_back(y);
      x = std::nextafter(x, T(0));
      y = std::nextafter(y, Limits::infinity());
    }
  }
  const size_t half = points.size();
  for (size_t i = 0; i < half; ++i) points.push_back(-points[i]);
  return points;
}

// NaN and infinities, and no NaN from any finite argument.
template <class T>
void check_special(const VectorTable& v) {
  const auto& arithmetic = arithmetic_of<T>(v);
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> z = special_points<T>();
  while (z.size() % arithmetic.lanes) z.push_back(nan);
  std::vector<T> out[6];
  for (auto& o : out) o.resize(z.size());
  T* const pointers[6] = {out[0].data(), out[1].data(), out[2].data(), out[3].data(), out[4].data(), out[5].data()};
  for (int a = 0; a < kActivations.kSize; ++a) {
    const std::string name = kActivations.rows[a].name;
    arithmetic.activation(a, kOwn<T>, z.data(), pointers, int64_t(z.size()));
    const T at_minus_inf = name == "tanh"                                                  ? T(-1)
                           : name == "identity"                                            ? -inf
                           : name == "relu" || name == "relu_squared" || name == "sigmoid" ? T(0)
                                                                                           : nan;
    const T at_inf = name == "tanh" || name == "sigmoid" ? T(1) : inf;
    for (size_t i = 0; i < z.size(); ++i) {
      const T value = out[0][i], slope = out[2][i];
      if (std::isnan(z[i]) && !std::isnan(value)) fail(v, "%s(nan) = %g", name.c_str(), double(value));
      if (std::isnan(z[i]) &&
          (name == "relu" || name == "leaky_relu" || name == "identity" ? slope != 1 : !std::isnan(slope)))
        fail(v, "%s'(nan) = %g", name.c_str(), double(slope));
      if (std::isinf(z[i]) && reference::activation<T>(kActivations.rows[a].name, 0, 1)) {
        const T want = z[i] > 0 ? at_inf : at_minus_inf;
        if (std::isnan(want) ? !std::isnan(value) : value != want)
          fail(v, "%s(%g) = %g", name.c_str(), double(z[i]), double(value));
      }
      for (const auto& o : out) {
        if (std::isfinite(T(kBeta) * z[i]) && std::isnan(o[i])) fail(v, "%s(%a) has a NaN", name.c_str(), double(z[i]));
      }
      if (z[i] == 0 && name.find("relu") == 0 && slope != 0) fail(v, "%s'(0) = %g", name.c_str(), double(slope));
    }
  }
}

template <class T>
void sweep_random(const std::vector<const VectorTable*>& tables, int count, const char* title) {
  Sweep<T> sweep(tables, true);
  for (const T x : special_points<T>()) sweep.add(x);
  std::mt19937_64 random(1);
  const auto uniform = [&](double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(random);
  };
  const double exp_limit = sizeof(T) == 4 ? 106 : 750;
  for (int i = 0; i < count; ++i) {
    sweep.add(T(uniform(-3, 3)));
    sweep.add(T(uniform(-40, 40)));
    sweep.add(T(uniform(-exp_limit, exp_limit)));
    const T small = T(std::exp(uniform(-exp_limit, 3)));
    sweep.add(i % 2 ? small : -small);
  }
  sweep.finish(title);
}

void sweep_bits(const std::vector<const VectorTable*>& tables, uint64_t step) {
  Sweep<float> sweep(tables, false);
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += step) sweep.add(bits_as<float>(uint32_t(bits)));
  sweep.finish(step == 1 ? "float32, every argument" : "float32, dense");
}

}  // namespace
}  // namespace ffn_ops

int main(int argc, char** argv) {
  using namespace ffn_ops;
  const bool all = argc > 1 && !std::strcmp(argv[1], "--all");
  std::vector<const VectorTable*> tables;
  for (const Isa isa : kIsas) {
    if (vector_table(isa) && isa_supported(isa)) tables.push_back(vector_table(isa));
  }
  for (const VectorTable* v : tables) {
    const int lanes = v->arithmetic_float.lanes;
    check_tails(*v, v->storage_double, v->arithmetic_double.lanes);
    check_tails(*v, v->storage_float, lanes);
    check_tails(*v, v->storage_half, lanes);
    check_tails(*v, v->storage_bfloat16, lanes);
    check_codec(*v, v->storage_half, lanes, "float16");
    check_codec(*v, v->storage_bfloat16, lanes, "bfloat16");
    check_shuffles(*v, v->arithmetic_float);
    check_shuffles(*v, v->arithmetic_double);
    check_basics(*v, v->arithmetic_float);
    check_basics(*v, v->arithmetic_double);
    check_special<float>(*v);
    check_special<double>(*v);
  }
  sweep_bits(tables, all ? 1 : 4099);
  sweep_random<float>(tables, 100000, "float32, random");
  sweep_random<double>(tables, 100000, "float64, random");
  std::printf("%s: %d failures\n", failures ? "FAILED" : "passed", failures);
  return failures ? 1 : 0;
}
