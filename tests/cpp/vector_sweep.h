// SPDX-License-Identifier: BSD-3-Clause
// Compares the functions and activations of every instruction set with the references, and checks their bounds.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "vector_failures.h"
#include "vector_reference.h"

namespace ffn_ops {

using reference::ulp_error;

// ULP: exp, tanh, erf and sigmoid are promised. normal_cdf carries the errors of exp, of two polynomials of degree 5
// and 6 (float) or 10 and 11, of their quotient and of the product; without FMA the polynomials round twice per step.
constexpr double kMathBound[kMathCount] = {2, 2, 2, 2, 12};
// Epsilons of the magnitude sums in vector_reference.h.
constexpr double kActivationBound[3] = {4, 6, 8};
constexpr double kBeta = 1.5;
template <class T>
constexpr T kOwn[kMostOwnParams] = {T(kBeta), T(kBeta), T(kBeta), T(kBeta)};

struct Worst {
  double error = 0, at = 0;
  void add(double e, double x) {
    if (!(e <= error)) error = e, at = x;
  }
};

template <class T>
const Arithmetic<T>& arithmetic_of(const VectorTable& v) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return v.arithmetic_float;
  } else {
    return v.arithmetic_double;
  }
}

// Feeds points in blocks to every instruction set, so that each reference is computed once.
template <class T>
class Sweep {
  using W = typename reference::Wider<T>::Type;
  static constexpr int kBlock = 4096;
  static constexpr T kMin = std::numeric_limits<T>::denorm_min();

 public:
  Sweep(const std::vector<const VectorTable*>& tables, bool activations)
      : tables_(tables), activations_(activations), math_(tables.size()), act_(tables.size()) {}

  void add(T x) {
    block_.push_back(x);
    if (block_.size() == kBlock) run();
  }

  void finish(const char* title) {
    while (!block_.empty()) add(T(0.25));
    for (size_t t = 0; t < tables_.size(); ++t) {
      const VectorTable& v = *tables_[t];
      std::printf("%-9s %s, ULP:", isa_name(v.isa), title);
      for (int f = 0; f < kMathCount; ++f) {
        const Worst& worst = math_[t][f];
        std::printf("  %s %.3f", kMathNames[f], worst.error);
        if (!(worst.error <= kMathBound[f]))
          fail(v, "%s(%a): %g ULP, bound %g", kMathNames[f], worst.at, worst.error, kMathBound[f]);
      }
      std::printf("\n");
      if (!activations_) continue;
      for (int a = 0; a < kActivations.kSize; ++a) {
        std::printf("%-9s   %-12s value, slope, curvature in epsilons:", isa_name(v.isa), kActivations.rows[a].name);
        for (int r = 0; r < 3; ++r) {
          const Worst& worst = act_[t][a][r];
          std::printf(" %.2f", worst.error);
          if (!(worst.error <= kActivationBound[r]))
            fail(v, "%s(%a) result %d: error %g", kActivations.rows[a].name, worst.at, r, worst.error);
        }
        std::printf("\n");
      }
    }
  }

 private:
  void run() {
    std::vector<W> want(kBlock);
    std::vector<T> out[6];
    for (auto& o : out) o.resize(kBlock);
    for (int f = 0; f < kMathCount; ++f) {
      for (int i = 0; i < kBlock; ++i) want[i] = reference::math<W>(f, block_[i]);
      for (size_t t = 0; t < tables_.size(); ++t) {
        arithmetic_of<T>(*tables_[t]).math[f](block_.data(), out[0].data(), kBlock);
        for (int i = 0; i < kBlock; ++i) {
          math_[t][f].add(ulp_error(out[0][i], want[i]), block_[i]);
          if (block_[i] == 0 && std::signbit(out[0][i]) != std::signbit(want[i]))
            fail(*tables_[t], "%s loses the sign of 0", kMathNames[f]);
        }
      }
    }
    if (activations_) {
      for (int a = 0; a < kActivations.kSize; ++a) run_activation(a, out);
    }
    block_.clear();
  }

  void run_activation(int a, std::vector<T> (&out)[6]) {
    std::vector<std::optional<reference::Point<W>>> points(kBlock);
    for (int i = 0; i < kBlock; ++i)
      points[i] = reference::activation<W>(kActivations.rows[a].name, block_[i], W(kBeta));
    for (size_t t = 0; t < tables_.size(); ++t) {
      T* const pointers[6] = {out[0].data(), out[1].data(), out[2].data(), out[3].data(), out[4].data(), out[5].data()};
      arithmetic_of<T>(*tables_[t]).activation(a, kOwn<T>, block_.data(), pointers, kBlock);
      for (int i = 0; i < kBlock; ++i) {
        const T z = block_[i];
        if (!std::isfinite(z)) continue;  // check_special
        // Denormal factors have lost digits before they are multiplied by z, w' or their squares.
        const W lost = 4 * W(kMin) * (1 + std::fabs(W(z))) * (1 + W(z) * W(z)) * (1 + W(z) * W(z));
        constexpr int kOutput[3] = {0, 2, 5};
        for (int r = 0; r < 3 && points[i]; ++r) {
          const W want = points[i]->result[r];
          const T got = out[kOutput[r]][i];
          if (std::isinf(got) && std::fabs(want) > W(std::numeric_limits<T>::max())) continue;
          const W unit = std::numeric_limits<T>::epsilon() / 2 * points[i]->magnitude[r] * points[i]->condition;
          const W excess = std::fabs(W(got) - want) - lost;
          act_[t][a][r].add(excess <= 0 ? 0 : double(excess / unit), z);
        }
        if (!same_bits(out[0][i], out[1][i]) || !same_bits(out[1][i], out[3][i]) || !same_bits(out[2][i], out[4][i]))
          fail(*tables_[t], "%s(%a): fwd, grad and grad2 differ", kActivations.rows[a].name, double(z));
      }
    }
  }

  const std::vector<const VectorTable*>& tables_;
  const bool activations_;
  std::vector<T> block_;
  std::vector<std::array<Worst, kMathCount>> math_;
  std::vector<std::array<std::array<Worst, 3>, kActivations.kSize>> act_;
};

}  // namespace ffn_ops
