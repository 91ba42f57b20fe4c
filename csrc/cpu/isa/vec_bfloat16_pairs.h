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
