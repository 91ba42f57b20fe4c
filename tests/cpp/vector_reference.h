// SPDX-License-Identifier: BSD-3-Clause
// References for vector_test.cpp in a wider type: double for float, long double for double. Plain formulas.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <optional>

#include "../../csrc/common/names.h"

namespace ffn_ops::reference {

template <class T>
struct Wider;
template <>
struct Wider<float> {
  using Type = double;
};
template <>
struct Wider<double> {
  using Type = long double;
};

template <class W>
W power_of_two(int exponent) {
  // std::ldexp without the call.
  if constexpr (sizeof(W) == sizeof(double)) {
    if (exponent > -1023 && exponent < 1024) return __builtin_bit_cast(W, uint64_t(exponent + 1023) << 52);
  }
  return std::ldexp(W(1), exponent);
}

// |got − want| in units of T's last place at `want`; 0 if both are the same infinity or both NaN, else infinite.
template <class T, class W>
double ulp_error(T got, W want) {
  using Limits = std::numeric_limits<T>;
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got) ? 0 : HUGE_VAL;
  // What rounds to infinity must be infinite; where one rounding decides, both neighbours stand.
  const W limit = power_of_two<W>(Limits::max_exponent);
  if (std::isinf(got))
    return std::signbit(got) == std::signbit(want) && std::fabs(want) > limit * (1 - Limits::epsilon()) ? 0 : HUGE_VAL;
  if (std::fabs(want) >= limit) return HUGE_VAL;
  const int exponent = want == 0 ? Limits::min_exponent : std::max(std::ilogb(want) + 1, Limits::min_exponent);
  return double(std::fabs(W(got) - want) * power_of_two<W>(Limits::digits - exponent));
}

template <class W>
W sigmoid(W z) {
  return z < 0 ? std::exp(z) / (1 + std::exp(z)) : 1 / (1 + std::exp(-z));
}
template <class W>
W normal_cdf(W z) {
  return std::erfc(-z * W(0.70710678118654752440084436210485L)) / 2;
}
template <class W>
W normal_density(W z) {
  return std::exp(-z * z / 2) * W(0.39894228040143267793994605993438L);
}

// In the order of kMathNames.
template <class W>
W math(int function, W x) {
  switch (function) {
    case 0:
      return std::exp(x);
    case 1:
      return std::tanh(x);
    case 2:
      return std::erf(x);
    case 3:
      return sigmoid(x);
    default:
      return normal_cdf(x);
  }
}

// Value, slope and curvature, and for each the sum of the magnitudes of its terms: an error is measured in epsilons of
// that, as a sum that cancels cannot keep more. `condition` is 1 + |w| where w, the argument of exp, is itself rounded,
// and 3 for gelu, whose Φ has the wider bound of normal_cdf.
template <class W>
struct Point {
  W result[3], magnitude[3], condition = 1;
};

template <class W>
Point<W> gated_sigmoid(W z, W w, W dw, W ddw) {
  const W s = sigmoid(w), c = sigmoid(-w), abs_z = std::fabs(z);
  return {{z * s, s + z * dw * s * c, s * c * (2 * dw + z * ddw + z * dw * dw * (c - s))},
          {abs_z * s, s + abs_z * std::fabs(dw) * s * c,
           s * c * (std::fabs(2 * dw) + std::fabs(z * ddw) + abs_z * dw * dw)}};
}

// Nothing of activations that are made of these functions alone: their values are compared with reference.py.
template <class W>
std::optional<Point<W>> activation(const char* name, W z, W beta) {
  const std::string_view is = name;
  if (is == "relu") return Point<W>{{z > 0 ? z : 0, W(z > 0), 0}, {1, 1, 1}};
  if (is == "relu_squared")
    return Point<W>{{z > 0 ? z * z : 0, z > 0 ? 2 * z : 0, W(z > 0 ? 2 : 0)}, {z * z, 2 * std::fabs(z), 2}};
  if (is == "sigmoid") {
    const W s = sigmoid(z), c = sigmoid(-z);
    return Point<W>{{s, s * c, s * c * (c - s)}, {s, s * c, s * c}};
  }
  if (is == "tanh") {
    const W t = std::tanh(z), slope = 4 * sigmoid(2 * z) * sigmoid(-2 * z);
    return Point<W>{{t, slope, -2 * t * slope}, {std::fabs(t), 1, 2 * std::fabs(t)}};
  }
  if (is == "gelu") {
    const W cdf = normal_cdf(z), density = normal_density(z);
    Point<W> point = {{z * cdf, cdf + z * density, (2 - z * z) * density},
                      {std::fabs(z) * cdf, cdf + std::fabs(z) * density, (2 + z * z) * density}};
    point.condition = 3;
    return point;
  }
  if (is == "gelu_tanh") {
    const W scale = 2 * std::sqrt(2 / W(3.14159265358979323846264338327950L)), cubic = W(0.044715L);
    const W w = scale * (z + cubic * z * z * z);
    Point<W> point = gated_sigmoid(z, w, scale * (1 + 3 * cubic * z * z), scale * 6 * cubic * z);
    point.condition = 1 + std::fabs(w);
    return point;
  }
  if (is == "silu") return gated_sigmoid(z, z, W(1), W(0));
  if (is == "swish") {
    Point<W> point = gated_sigmoid(z, beta * z, beta, W(0));
    point.condition = 1 + std::fabs(beta * z);
    return point;
  }
  if (is == "identity") return Point<W>{{z, 1, 0}, {std::fabs(z), 1, 1}};
  return {};
}

}  // namespace ffn_ops::reference
