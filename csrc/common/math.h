// SPDX-License-Identifier: BSD-3-Clause
// exp, expm1, tanh, erf, sigmoid and the normal distribution for `Vec<float>` and `Vec<double>`, in plain arithmetic.
// Included inside each instruction set's namespace and target region, after vec_<isa>.h. Measured by
// tests/cpp/vector_test.
//
// Every coefficient is a weighted Remez fit (relative error, computed with 60 digits); the stated error is
// that of the fit. Bounds in ULP hold with and without FMA: float32 over every argument, float64 over a dense sweep.

template <class V>
constexpr bool kIsFloat = sizeof(typename V::Scalar) == sizeof(float);

// c0 + c1·x + c2·x² + …
template <class V>
FFN_FN V horner(V, typename V::Scalar c) {
  return V(c);
}
template <class V, class... Cs>
FFN_FN V horner(V x, typename V::Scalar c, Cs... rest) {
  return fma(horner(x, rest...), x, V(c));
}

// (exp(r) − 1 − r) / r² on |r| <= ln2/2. Error in exp(r): 2^-28.3, 2^-57.9.
template <class V>
FFN_FN V exp_tail(V r) {
  if constexpr (kIsFloat<V>) {
    return horner(r, 0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239e2p-7f, 0x1.6a2446p-10f);
  } else {
    return horner(r, 0x1.000000000000ap-1, 0x1.55555555554fap-3, 0x1.555555555087cp-5, 0x1.1111111127be6p-7,
                  0x1.6c16c1842a198p-10, 0x1.a01a012a57713p-13, 0x1.a0199a0c53efap-16, 0x1.71df2552a3075p-19,
                  0x1.28ad72dd1dd64p-22, 0x1.ad7f6e8eaa133p-26);
  }
}

// The limits of exp: beyond them the result is 0 or inf, and 2^k stays within scale_by_power_of_two's range.
template <class V>
constexpr typename V::Scalar kExpLowest = kIsFloat<V> ? -105 : -746;
template <class V>
constexpr typename V::Scalar kExpHighest = kIsFloat<V> ? 89 : 710;

// exp = 2^exponent · (head + rest), with |rest| < 0.08.
template <class V>
struct ExpParts {
  V head, rest, exponent;
};

// exp(x + correction) for x within the limits and |correction| below an ULP of x: k = round(x / ln2), r = x − k·ln2,
// exp(x) = 2^k · exp(r). ln2 is split in two; k times the first part is exact, as its last 9 (float) or 11 bits are
// zero. What r and 1 + r lose in rounding (a quarter ULP each, as |r| < 0.35) goes into `rest`.
template <bool kCorrected = false, class V>
FFN_FN ExpParts<V> exp_parts(V x, [[maybe_unused]] V correction = V::zero()) {
  using T = typename V::Scalar;
  constexpr bool f = kIsFloat<V>;
  const V minus_ln2_high(T(f ? -0x1.62e4p-1 : -0x1.62e42fefa38p-1));
  const V minus_ln2_low(T(f ? -0x1.7f7d1cf79abcap-20 : -0x1.ef35793c7673p-45));
  const V k = round_even(x * V(T(0x1.71547652b82fep0)));
  const V high = fma(k, minus_ln2_high, x);
  V r = fma(k, minus_ln2_low, high);
  V low = fma(k, minus_ln2_low, high - r);
  if constexpr (kCorrected) {
    const V sum = r + correction;
    low += (r - sum) + correction;
    r = sum;
  }
  const V head = V(1) + r;
  low += r - (head - V(1));
  return {head, fma(exp_tail(r), r * r, low), k};
}

// exp(x + correction) for x up to 40, within 0.8 ULP: half from the sum, the rest from `rest` and the fit. One more
// rounding if the result is denormal.
template <bool kCorrected = false, class V>
FFN_FN V exp_up_to_40(V x, V correction = V::zero()) {
  const auto [head, rest, exponent] = exp_parts<kCorrected>(x, correction);
  return scale_down(head + rest, exponent);
}

// 1 ULP; exp(-inf) = 0, overflow gives inf, NaN gives NaN.
template <class V>
FFN_FN V exp(V x) {
  const auto [head, rest, exponent] = exp_parts(max(V(kExpLowest<V>), min(V(kExpHighest<V>), x)));
  return scale_by_power_of_two(head + rest, exponent);
}

template <class V>
struct Expm1Pair {
  V minus_one, minus_line;
};

// exp(x) − 1 and exp(x) − 1 − x, x up to 40. Nothing cancels near 0: there head − 1 is exact, and so is its distance
// from x, which is the rounding error of head; what the sum leaves is exp's tail.
template <class V>
FFN_FN Expm1Pair<V> expm1_pair(V x) {
  const auto [head, rest, exponent] = exp_parts(max(V(kExpLowest<V>), x));
  const V most = scale_down(head, exponent) - V(1), least = scale_down(rest, exponent);
  return {most + least, (most - x) + least};
}

template <class V>
struct SigmoidPair {
  V sigmoid, complement;
};

// s = 1/(1+exp(−z)) and 1 − s. With e = exp(−|z|) <= 1 nothing overflows: the larger of the two is q = 1/(1+e), the
// smaller e·q = e − e·(e·q). The last form is the more accurate one, as the rounding of q and of e·q is scaled down by
// e; without FMA it rounds once too often, so e/(1+e), corrected by the rounding error of the sum, replaces it.
// Both have 2 ULP, of which exp contributes 1.4 if e is at the bottom and the result at the top of a binade.
template <class V>
FFN_FN SigmoidPair<V> sigmoid_pair(V z) {
  const V e = exp_up_to_40(max(V(kExpLowest<V>), -abs(z)));
  const V sum = V(1) + e;
  const V larger = V(1) / sum;
  V smaller;
  if constexpr (kHasFma) {
    smaller = fma(-e, e * larger, e);
  } else {
    const V ratio = e / sum;
    smaller = ratio - ratio * larger * (e - (sum - V(1)));
  }
  const auto negative = z < V::zero();
  return {select(negative, smaller, larger), select(negative, larger, smaller)};
}

// 2 ULP.
template <class V>
FFN_FN V sigmoid(V z) {
  return sigmoid_pair(z).sigmoid;
}

// (tanh(x) − x) / x³ as a polynomial in t = x², |x| <= 0.625. Error in tanh: 2^-27.8, 2^-56.4.
template <class V>
FFN_FN V tanh_tail(V t) {
  if constexpr (kIsFloat<V>) {
    return horner(t, -0x1.555532p-2f, 0x1.110726p-3f, -0x1.b83c5ap-5f, 0x1.52269ap-6f, -0x1.75e1c6p-8f);
  } else {
    return horner(t, -0x1.55555555554ffp-2, 0x1.111111110accep-3, -0x1.ba1ba1b506507p-5, 0x1.664f477adba5fp-6,
                  -0x1.226e162c0d28fp-7, 0x1.d6cf28116ececp-9, -0x1.7d68a34a7ba7ep-10, 0x1.33661390c925fp-11,
                  -0x1.df557f1371d15p-13, 0x1.43912d7cec0b5p-14, -0x1.0da73f5eba698p-16);
  }
}

// 0.8 ULP. |x| < 0.625: the polynomial; else 1 − q with q = 2/(exp(2|x|)+1) < 0.45. The rounding errors of the sums and
// of the quotient are added back, because the error of torch's tanh is hardly more than half an ULP. From |x| = 20 on
// the result is 1.
template <class V>
FFN_FN V tanh(V x) {
  const V magnitude = abs(x);
  const V t = x * x;
  const V small = fma(tanh_tail(t) * t, magnitude, magnitude);

  const V capped = min(V(20), magnitude);
  const auto [head, rest, exponent] = exp_parts(capped + capped);
  const V mantissa = head + rest;
  const V e = scale_down(mantissa, exponent);
  const V e_low = scale_down((head - mantissa) + rest, exponent);
  const V sum = e + V(1);
  const V sum_low = (V(1) - (sum - e)) + e_low;
  const V q = V(2) / sum;
  V remainder = -(q * sum_low);
  if constexpr (kHasFma) remainder += fma(-q, sum, V(2));
  const V large = V(1) - q;
  const V large_low = (V(1) - large) - q;
  // q · remainder / 2 is the error of q.
  const V corrected = large + fma(V(-0.5) * q, remainder, large_low);
  return copysign(select(magnitude < V(typename V::Scalar(0.625)), small, corrected), x);
}

// The scaled normal tail: Q(x) / exp(−x²/2), with Q(x) = 1 − Φ(x), for 0 <= x <= 14.5 (float) or 39 (double), where Q
// underflows. All coefficients are positive, so the evaluation has no cancellation. Error: 2^-31.6, 2^-58.1.
template <class V>
FFN_FN V scaled_tail_numerator(V x) {
  if constexpr (kIsFloat<V>) {
    return horner(x, 0x1p-1f, 0x1.fdeccep-2f, 0x1.ef9bf4p-3f, 0x1.151b24p-4f, 0x1.624e58p-7f, 0x1.a480b6p-11f);
  } else {
    return horner(x, 0x1p-1, 0x1.a698f8a122dadp-1, 0x1.59e222a3dd966p-1, 0x1.6aa6136086eafp-2, 0x1.0b27676c8613cp-3,
                  0x1.1fa2a6394fea1p-5, 0x1.c9b6ee92b604dp-8, 0x1.0a0a2fc9a47abp-10, 0x1.b1ff4e0cf5016p-14,
                  0x1.c39aaf0902e06p-18, 0x1.cc91a09ce8aadp-23);
  }
}
template <class V>
FFN_FN V scaled_tail_denominator(V x) {
  if constexpr (kIsFloat<V>) {
    return horner(x, 0x1p0f, 0x1.cb389p0f, 0x1.6a4ecp0f, 0x1.446314p-1f, 0x1.5f6f26p-3f, 0x1.bc0d6p-6f, 0x1.0782f8p-9f);
  } else {
    return horner(x, 0x1p0, 0x1.396d911fe246bp1, 0x1.6705622b8529bp1, 0x1.fce5ae6890bfap0, 0x1.f10e7508d5645p-1,
                  0x1.603a9e45d3e51p-2, 0x1.72c76c735084ap-4, 0x1.230fdc0969162p-6, 0x1.4fa472d57dc04p-9,
                  0x1.1087fb109215dp-12, 0x1.1b00408e63714p-16, 0x1.209e65144e91cp-21);
  }
}
template <class V>
FFN_FN V scaled_normal_tail(V x) {
  return scaled_tail_numerator(x) / scaled_tail_denominator(x);
}

// a² − square, where square is a² rounded: exactly by one FMA, or by Veltkamp's split of a into halves of its digits.
template <class V>
FFN_FN V square_error(V a, V square) {
  if constexpr (kHasFma) {
    return fma(a, a, -square);
  } else {
    const V scaled = a * V(kIsFloat<V> ? 0x1p12 + 1 : 0x1p27 + 1);
    const V high = scaled - (scaled - a);
    const V low = a - high;
    return ((high * high - square) + (high + high) * low) + low * low;
  }
}

template <class V>
struct NormalPoint {
  V cdf, density;
};

// Φ(z) and φ(z) = exp(−z²/2)/√(2π): Φ(−|z|) = exp(−z²/2) · scaled_normal_tail(|z|), with a relative error of a few ULP
// in the whole tail, because z² is kept to twice its digits.
template <class V>
FFN_FN NormalPoint<V> normal_point(V z) {
  using T = typename V::Scalar;
  const V magnitude = min(V(T(kIsFloat<V> ? 14.5 : 39)), abs(z));
  const V square = magnitude * magnitude;
  const V e = exp_up_to_40<true>(V(T(-0.5)) * square, V(T(-0.5)) * square_error(magnitude, square));
  const V tail = e * scaled_normal_tail(magnitude);
  return {select(z < V::zero(), tail, V(1) - tail), e * V(T(0x1.9884533d43651p-2))};
}

// (erf(x) − x) / x as a polynomial in t = x², |x| <= 1. Error in erf: 2^-29.6, 2^-62.7.
template <class V>
FFN_FN V erf_tail(V t) {
  if constexpr (kIsFloat<V>) {
    return horner(t, 0x1.06eba8p-3f, -0x1.81273ep-2f, 0x1.ce2cf8p-4f, -0x1.b7f90ep-6f, 0x1.5405b2p-8f, -0x1.a3f706p-11f,
                  0x1.496a44p-14f);
  } else {
    return horner(t, 0x1.06eba8214db69p-3, -0x1.812746b0379e6p-2, 0x1.ce2f21a042b2p-4, -0x1.b82ce3128499dp-6,
                  0x1.565bcd0db02f5p-8, -0x1.c02db3d8ed50ep-11, 0x1.f9a321a12293ap-14, -0x1.f4d1df39a25adp-17,
                  0x1.b9def1a222659p-20, -0x1.5f1d36e47c1eep-23, 0x1.f7a413923d77bp-27, -0x1.386ac4ee1ff2fp-30,
                  0x1.0579b59c94542p-34);
  }
}

// 2 ULP. |x| < 1: the polynomial; else 1 − erfc|x| = 1 − 2·exp(−x²)·scaled_normal_tail(√2·|x|), where erfc is below
// 0.16, so its errors count little. From |x| = 6 on the result is 1.
template <class V>
FFN_FN V erf(V x) {
  using T = typename V::Scalar;
  const V magnitude = abs(x);
  const V small = fma(erf_tail(x * x), magnitude, magnitude);
  const V capped = min(V(6), magnitude);
  const V e = exp_up_to_40(-(capped * capped));
  const V large = V(1) - (e + e) * scaled_normal_tail(V(T(0x1.6a09e667f3bcdp0)) * capped);
  return copysign(select(magnitude < V(1), small, large), x);
}
