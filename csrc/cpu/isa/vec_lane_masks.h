// SPDX-License-Identifier: BSD-3-Clause
// Comparisons and scaling for instruction sets whose masks are vectors of all-ones and all-zeros integers.
// Included inside the namespace and target region, after vec_common.h, by vec_baseline.h and vec_avx2.h.

template <class T>
using MaskOf = RegisterOf<IntOf<T>>;

template <class R>
FFN_FN auto less_lanes(R a, R b) {
  return a < b;
}
template <class R>
FFN_FN auto less_equal_lanes(R a, R b) {
  return a <= b;
}
template <class R>
FFN_FN auto equal_lanes(R a, R b) {
  return a == b;
}
template <class M, class R>
FFN_FN R select_lanes(M mask, R a, R b) {
  return mask ? a : b;
}
// 2^(k + offset) by its exponent bits, for integral k and a result in the normal range: the sum leaves the biased
// exponent in the lowest bits.
template <int kOffset = 0>
FFN_FN FloatLanes power_of_two_lanes(FloatLanes k) {
  return (FloatLanes)((Int32Lanes)(k + (0x1.8p23f + 127 + kOffset)) << 23);
}
template <int kOffset = 0>
FFN_FN DoubleLanes power_of_two_lanes(DoubleLanes k) {
  return (DoubleLanes)((Int64Lanes)(k + (0x1.8p52 + 1023 + kOffset)) << 52);
}

// In two factors, as 2^k itself may be out of range; the first product is exact wherever the second one rounds.
template <class R>
FFN_FN R scale_lanes(R a, R k) {
  const R half = round_even_lanes(k * 0.5f);
  return a * power_of_two_lanes(half) * power_of_two_lanes(k - half);
}
FFN_FN FloatLanes scale_down_lanes(FloatLanes a, FloatLanes k) { return a * power_of_two_lanes<64>(k) * 0x1p-64f; }
FFN_FN DoubleLanes scale_down_lanes(DoubleLanes a, DoubleLanes k) { return a * power_of_two_lanes<512>(k) * 0x1p-512; }
