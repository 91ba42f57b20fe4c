// SPDX-License-Identifier: BSD-3-Clause
// Operands of bfloat16 products in pairs of neighbours along k, as vdpbf16ps multiplies them. Included inside
// avx512_bf16's namespace and target region, after vec_avx512.h.

// sum + a's second * b's second, then + a's first * b's first: each a fused multiply-add that rounds to nearest even,
// reads denormals as zero and returns zero for them, by Intel's manual.
#ifdef FFN_OPS_EMULATE_BFLOAT16_PAIRS  // tests on machines without the instruction
FFN_FN FloatLanes flush_denormals(FloatLanes v) {
  constexpr int kDenormal = 0x20;
  return _mm512_mask_and_ps(v, _mm512_fpclass_ps_mask(v, kDenormal), v, _mm512_set1_ps(-0.0f));
}
FFN_FN FloatLanes dot_pairs_lanes(FloatLanes a, FloatLanes b, FloatLanes sum) {
  const auto first = [](FloatLanes v)
                         __attribute__((always_inline)) { return flush_denormals((FloatLanes)((Uint32Lanes)v << 16)); };
  const auto second = [](FloatLanes v) __attribute__((always_inline)) {
    return flush_denormals((FloatLanes)((Uint32Lanes)v & 0xffff0000u));
  };
  sum = flush_denormals(fma_lanes(second(a), second(b), flush_denormals(sum)));
  return flush_denormals(fma_lanes(first(a), first(b), sum));
}
#else
FFN_FN FloatLanes dot_pairs_lanes(FloatLanes a, FloatLanes b, FloatLanes sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

// A lane is the bits of two bfloat16, the first in its lower half; as a float it means nothing, so nothing here
// computes with it, and it only moves through load<> and store() of float.
struct BFloat16Pairs {
  using Scalar = float;
  using Register = FloatLanes;
  using Sum = Vec<float>;
  static constexpr int kLanes = Sum::kLanes;
  static constexpr int kKR = 2;

  Register reg;

  BFloat16Pairs() = default;
  FFN_FN explicit BFloat16Pairs(Register r) : reg(r) {}
  FFN_FN explicit BFloat16Pairs(float pair) : reg(_mm512_set1_ps(pair)) {}
  FFN_FN BFloat16Pairs(Sum first, Sum second)  // of values that are bfloat16
      : reg((Register)((Uint32Lanes)first.reg >> 16 | (Uint32Lanes)second.reg)) {}
  FFN_FN static BFloat16Pairs zero() { return BFloat16Pairs(0.0f); }

  // Two rows along the columns become pairs, of the few lanes of a narrow panel.
  static constexpr int64_t kFew = 8;
  FFN_FN static void store_few(float* to, const BFloat16* first, const BFloat16* second) {
    const __m128i a = _mm_loadu_si128((const __m128i*)first), b = _mm_loadu_si128((const __m128i*)second);
    _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi16(a, b));
    _mm_storeu_si128((__m128i*)to + 1, _mm_unpackhi_epi16(a, b));
  }

  FFN_FN friend Sum fma(BFloat16Pairs a, BFloat16Pairs b, Sum sum) {
    return Sum(dot_pairs_lanes(a.reg, b.reg, sum.reg));
  }
};

// Neighbours in memory are pairs already. With n, 0 <= n < 2 * kLanes, elements >= n are zero and not touched.
template <>
FFN_FN BFloat16Pairs load<BFloat16Pairs, BFloat16>(const BFloat16* p) {
  return BFloat16Pairs(load_lanes(reinterpret_cast<const float*>(p)));
}
template <>
FFN_FN BFloat16Pairs load<BFloat16Pairs, BFloat16>(const BFloat16* p, int n) {
  return BFloat16Pairs((FloatLanes)_mm512_maskz_loadu_epi16((__mmask32(1) << n) - 1u, p));
}

// Two rows along the columns become pairs: lanes 0 .. kLanes, kLanes .. 2 kLanes of them.
FFN_FN void load_two_steps(const BFloat16* first, const BFloat16* second, BFloat16Pairs (&pairs)[2]) {
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);  // within quarters
  const __m512i from = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                later = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  pairs[0] = BFloat16Pairs((FloatLanes)_mm512_permutex2var_epi64(low, from, high));
  pairs[1] = BFloat16Pairs((FloatLanes)_mm512_permutex2var_epi64(low, later, high));
}

#ifndef FFN_OPS_EMULATE_BFLOAT16_PAIRS
// The instruction rounds as Codec<BFloat16>::encode, but for denormals, which it takes as zero.
FFN_FN void store_two(BFloat16* p, Vec<float> first, Vec<float> second) {
  constexpr int kDenormal = 0x20;
  const __mmask16 denormal =
      _mm512_fpclass_ps_mask(first.reg, kDenormal) | _mm512_fpclass_ps_mask(second.reg, kDenormal);
  if (__builtin_expect(denormal != 0, 0)) {
    store(p, first);
    store(p + Vec<float>::kLanes, second);
  } else {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second.reg, first.reg));
  }
}
#endif
