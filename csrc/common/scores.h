// SPDX-License-Identifier: BSD-3-Clause
// The scores that routers compute from logits: THE list that kernels, names and error messages read. reference.py has
// the formulas.
// Included after math.h once per instruction set inside its namespace, and by names.h without vector code, for
// the list alone. No include guard, no #include, no std.

template <class V>
struct ScoreGrad {
  V value, slope;
};

// exp(z) over its sum over all experts, or over the chosen ones: of a whole row, which kernels write out.
struct SoftmaxScore {
  static constexpr const char* name = "softmax";
  static constexpr bool of_row = true;
};

// s = sigmoid(z), s' = s·(1 − s).
struct SigmoidScore {
  static constexpr const char* name = "sigmoid";
  static constexpr bool of_row = false;

  template <class V>
  static FFN_FN V fwd(V z) {
    return sigmoid(z);
  }
  template <class V>
  static FFN_FN ScoreGrad<V> grad(V z) {
    const auto [s, c] = sigmoid_pair(z);
    return {s, s * c};
  }
};

// s = √(ln(1 + exp(z))), s' = sigmoid(z) / 2s. With e = exp(−|z|) <= 1 and t = e / (2 + e) <= 1/3 the logarithm is
// max(z, 0) + 2·artanh(t), whose series ends where its next term is below a tenth of the last digit. Where s underflows
// to 0, so does s'.
struct SqrtSoftplusScore {
  static constexpr const char* name = "sqrt_softplus";
  static constexpr bool of_row = false;

  template <class V>
  static FFN_FN V fwd(V z) {
    using T = typename V::Scalar;
    const V e = exp(-abs(z)), t = e / (V(2) + e), t2 = t * t;
    V series;
    if constexpr (sizeof(T) == sizeof(float)) {
      series = horner(t2, T(1), T(1) / 3, T(1) / 5, T(1) / 7, T(1) / 9, T(1) / 11, T(1) / 13, T(1) / 15);
    } else {
      series = horner(t2, T(1), T(1) / 3, T(1) / 5, T(1) / 7, T(1) / 9, T(1) / 11, T(1) / 13, T(1) / 15, T(1) / 17,
                      T(1) / 19, T(1) / 21, T(1) / 23, T(1) / 25, T(1) / 27, T(1) / 29, T(1) / 31, T(1) / 33);
    }
    return sqrt(fma(t + t, series, max(V::zero(), z)));
  }
  template <class V>
  static FFN_FN ScoreGrad<V> grad(V z) {
    const V s = fwd(z);
    return {s, select(s == V::zero(), V::zero(), sigmoid(z) / (s + s))};
  }
};

using Scores = TypeList<SoftmaxScore, SigmoidScore, SqrtSoftplusScore>;

// Calls `f(Tag<Score>{})` for the score at `index` of the list; false if there is none.
template <class F>
FFN_FN constexpr bool dispatch_score(int index, F&& f) {
  return visit_type(Scores{}, index, f);
}
