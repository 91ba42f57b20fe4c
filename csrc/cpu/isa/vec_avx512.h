// SPDX-License-Identifier: BSD-3-Clause
// AVX-512 F, BW, DQ, VL: 64-byte registers and mask registers. Included inside the namespace and target region of
// avx512.cpp and avx512_bf16.cpp.

constexpr int kVectorBytes = 64;
constexpr bool kHasFma = true;

#include "vec_common.h"

FFN_FN FloatLanes round_even_lanes(FloatLanes a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
FFN_FN DoubleLanes round_even_lanes(DoubleLanes a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT); }

FFN_FN FloatLanes fma_lanes(FloatLanes a, FloatLanes b, FloatLanes c) { return _mm512_fmadd_ps(a, b, c); }
FFN_FN DoubleLanes fma_lanes(DoubleLanes a, DoubleLanes b, DoubleLanes c) { return _mm512_fmadd_pd(a, b, c); }

template <class T>
struct MaskType;
template <>
struct MaskType<float> {
  using Type = __mmask16;
};
template <>
struct MaskType<double> {
  using Type = __mmask8;
};
template <class T>
using MaskOf = typename MaskType<T>::Type;

FFN_FN __mmask16 less_lanes(FloatLanes a, FloatLanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
FFN_FN __mmask8 less_lanes(DoubleLanes a, DoubleLanes b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
FFN_FN __mmask16 less_equal_lanes(FloatLanes a, FloatLanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
FFN_FN __mmask8 less_equal_lanes(DoubleLanes a, DoubleLanes b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
FFN_FN __mmask16 equal_lanes(FloatLanes a, FloatLanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
FFN_FN __mmask8 equal_lanes(DoubleLanes a, DoubleLanes b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }

FFN_FN FloatLanes select_lanes(__mmask16 m, FloatLanes a, FloatLanes b) { return _mm512_mask_blend_ps(m, b, a); }
FFN_FN DoubleLanes select_lanes(__mmask8 m, DoubleLanes a, DoubleLanes b) { return _mm512_mask_blend_pd(m, b, a); }

FFN_FN FloatLanes min_lanes(FloatLanes a, FloatLanes b) { return _mm512_min_ps(a, b); }
FFN_FN DoubleLanes min_lanes(DoubleLanes a, DoubleLanes b) { return _mm512_min_pd(a, b); }
FFN_FN FloatLanes max_lanes(FloatLanes a, FloatLanes b) { return _mm512_max_ps(a, b); }
FFN_FN DoubleLanes max_lanes(DoubleLanes a, DoubleLanes b) { return _mm512_max_pd(a, b); }

FFN_FN FloatLanes scale_lanes(FloatLanes a, FloatLanes k) { return _mm512_scalef_ps(a, k); }
FFN_FN DoubleLanes scale_lanes(DoubleLanes a, DoubleLanes k) { return _mm512_scalef_pd(a, k); }

FFN_FN FloatLanes scale_down_lanes(FloatLanes a, FloatLanes k) { return scale_lanes(a, k); }
FFN_FN DoubleLanes scale_down_lanes(DoubleLanes a, DoubleLanes k) { return scale_lanes(a, k); }

FFN_FN float reduce_add_lanes(FloatLanes v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
FFN_FN double reduce_add_lanes(DoubleLanes v) {
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
  const __m128d sum = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(sum, _mm_unpackhi_pd(sum, sum)));
}

// ---- loads and stores -----------------------------------------------------------------------------------------------

FFN_FN __mmask16 tail_mask16(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
FFN_FN __mmask8 tail_mask8(int n) { return static_cast<__mmask8>((1u << n) - 1u); }

FFN_FN FloatLanes widen_bfloat16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FFN_FN __m256i narrow_bfloat16(FloatLanes v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
}
FFN_FN __m256i narrow_half(FloatLanes v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FFN_FN FloatLanes load_lanes(const float* p) { return _mm512_loadu_ps(p); }
FFN_FN FloatLanes load_lanes(const float* p, int n) { return _mm512_maskz_loadu_ps(tail_mask16(n), p); }
FFN_FN DoubleLanes load_lanes(const double* p) { return _mm512_loadu_pd(p); }
FFN_FN DoubleLanes load_lanes(const double* p, int n) { return _mm512_maskz_loadu_pd(tail_mask8(n), p); }
FFN_FN FloatLanes load_lanes(const BFloat16* p) { return widen_bfloat16(_mm256_loadu_si256((const __m256i*)p)); }
FFN_FN FloatLanes load_lanes(const BFloat16* p, int n) {
  return widen_bfloat16(_mm256_maskz_loadu_epi16(tail_mask16(n), p));
}
FFN_FN FloatLanes load_lanes(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FFN_FN FloatLanes load_lanes(const Half* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(tail_mask16(n), p));
}

FFN_FN void store_lanes(float* p, FloatLanes v) { _mm512_storeu_ps(p, v); }
FFN_FN void store_lanes(float* p, FloatLanes v, int n) { _mm512_mask_storeu_ps(p, tail_mask16(n), v); }
FFN_FN void store_lanes(double* p, DoubleLanes v) { _mm512_storeu_pd(p, v); }
FFN_FN void store_lanes(double* p, DoubleLanes v, int n) { _mm512_mask_storeu_pd(p, tail_mask8(n), v); }
FFN_FN void store_lanes(BFloat16* p, FloatLanes v) { _mm256_storeu_si256((__m256i*)p, narrow_bfloat16(v)); }
FFN_FN void store_lanes(BFloat16* p, FloatLanes v, int n) {
  _mm256_mask_storeu_epi16(p, tail_mask16(n), narrow_bfloat16(v));
}
FFN_FN void store_lanes(Half* p, FloatLanes v) { _mm256_storeu_si256((__m256i*)p, narrow_half(v)); }
FFN_FN void store_lanes(Half* p, FloatLanes v, int n) { _mm256_mask_storeu_epi16(p, tail_mask16(n), narrow_half(v)); }

FFN_FN void store_nontemporal_lanes(float* p, FloatLanes v) { _mm512_stream_ps(p, v); }
FFN_FN void store_nontemporal_lanes(double* p, DoubleLanes v) { _mm512_stream_pd(p, v); }
FFN_FN void store_nontemporal_lanes(BFloat16* p, FloatLanes v) { _mm256_stream_si256((__m256i*)p, narrow_bfloat16(v)); }
FFN_FN void store_nontemporal_lanes(Half* p, FloatLanes v) { _mm256_stream_si256((__m256i*)p, narrow_half(v)); }
FFN_FN void end_nontemporal() { _mm_sfence(); }

// ---- codes of quantised weights -------------------------------------------------------------------------------------

// One byte for each lane; one nibble for each lane, from half as many bytes: it fills the lowest four bits, and the
// bits above are not zero.
FFN_FN Uint32Lanes byte_lanes(const uint8_t* p) {
  return (Uint32Lanes)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}
FFN_FN Int32Lanes signed_byte_lanes(const uint8_t* p) {
  return (Int32Lanes)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
}
FFN_FN Uint32Lanes nibble_lanes(const uint8_t* p) {
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
  return (Uint32Lanes)_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
}

// Looks up the lowest four bits of each lane in a table of 16.
struct NibbleTable {
  __m512 values;
};
FFN_FN NibbleTable nibble_table(const float* values) { return {_mm512_load_ps(values)}; }
FFN_FN FloatLanes lookup_lanes(const NibbleTable& t, Uint32Lanes nibbles) {
  return _mm512_permutexvar_ps((__m512i)nibbles, t.values);
}

// 16 bytes of each of W rows, as W lanes of four words: word d of row i is lane i of out[d].
FFN_FN void transpose_words(const uint8_t* const* rows, int64_t at, Uint32Lanes (&out)[4]) {
  __m512i four[4];
  for (int j = 0; j < 4; ++j) {
    const auto of = [&](int i)
                        __attribute__((always_inline)) { return _mm_loadu_si128((const __m128i*)(rows[i] + at)); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(of(j)), of(j + 4), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(of(j + 8)), of(j + 12), 1);
    four[j] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  const __m512i a = _mm512_unpacklo_epi32(four[0], four[1]), b = _mm512_unpackhi_epi32(four[0], four[1]);
  const __m512i c = _mm512_unpacklo_epi32(four[2], four[3]), d = _mm512_unpackhi_epi32(four[2], four[3]);
  out[0] = (Uint32Lanes)_mm512_unpacklo_epi64(a, c);
  out[1] = (Uint32Lanes)_mm512_unpackhi_epi64(a, c);
  out[2] = (Uint32Lanes)_mm512_unpacklo_epi64(b, d);
  out[3] = (Uint32Lanes)_mm512_unpackhi_epi64(b, d);
}

// The same of 32 bytes and eight words: a third of the shuffles become loads.
constexpr bool kTransposesEight = true;
FFN_FN void transpose_eight_words(const uint8_t* const* rows, int64_t at, Uint32Lanes* out) {
  const auto of = [&](int i)
                      __attribute__((always_inline)) { return _mm256_loadu_si256((const __m256i*)(rows[i] + at)); };
  __m512i quads[8];
  for (int i = 0; i < 8; i += 4) {
    __m512i two[4];
    for (int j = 0; j < 4; ++j)
      two[j] = _mm512_inserti64x4(_mm512_castsi256_si512(of(2 * i + j)), of(2 * i + j + 4), 1);
    const __m512i a = _mm512_unpacklo_epi32(two[0], two[1]), b = _mm512_unpackhi_epi32(two[0], two[1]);
    const __m512i c = _mm512_unpacklo_epi32(two[2], two[3]), d = _mm512_unpackhi_epi32(two[2], two[3]);
    quads[i] = _mm512_unpacklo_epi64(a, c);
    quads[i + 1] = _mm512_unpackhi_epi64(a, c);
    quads[i + 2] = _mm512_unpacklo_epi64(b, d);
    quads[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int d = 0; d < 4; ++d) {  // quarters: word d of four rows and word d + 4, then of the next four rows
    out[d] = (Uint32Lanes)_mm512_shuffle_i64x2(quads[d], quads[d + 4], 0x88);
    out[d + 4] = (Uint32Lanes)_mm512_shuffle_i64x2(quads[d], quads[d + 4], 0xdd);
  }
}

// A word's eight nibbles, the lowest first, and their values, times 1 / kNibbleFactor.
constexpr float kNibbleFactor = 1;
struct WordTable {
  __m512 values;
};
FFN_FN WordTable word_table(const int8_t* values) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)values)))};
}
using NibbleWord = Uint32Lanes;
FFN_FN NibbleWord nibble_word(const WordTable&, Uint32Lanes words) { return words; }
FFN_FN FloatLanes nibble_value(const WordTable& t, const NibbleWord& words, int e) {
  return _mm512_permutexvar_ps((__m512i)(words >> (4 * e)), t.values);
}

// The same, scaled by powers of two: values are 2^100 times larger, and `pairs` of exponents, never above 0, are added.
// Two nibbles of a word, four places apart, become bfloat16 in a lane at once. Zero is the lowest integer of 16 bits,
// so that it stays zero: additions saturate.
constexpr bool kAddsExponents = true;
struct NibblePairs {
  struct Word {
    __m512i pairs[4];
  };
  __m512i values;  // twice: an index has five bits, of which the highest belongs to another nibble
  FFN_FN explicit NibblePairs(const int8_t* halves) {
    const __m512i integers = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)halves));
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(integers), _mm512_set1_ps(0x1p99f)));
    const __m512i lowest = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    const __m512i chosen = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(bits, bits), lowest);
    values = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
  }
  FFN_FN Word word(Uint32Lanes words) const {
    Word w;
    for (int e = 0; e < 4; ++e) w.pairs[e] = _mm512_permutexvar_epi16((__m512i)(words >> (4 * e)), values);
    return w;
  }
  FFN_FN static Word scaled(Word word, Uint32Lanes pairs) {
    for (__m512i& p : word.pairs) p = _mm512_adds_epi16(p, (__m512i)pairs);
    return word;
  }
  FFN_FN static FloatLanes value(const Word& word, int e) {
    const Uint32Lanes pair = (Uint32Lanes)word.pairs[e % 4];
    return (FloatLanes)(e < 4 ? pair << 16 : pair & 0xffff0000u);
  }
};

// Unsigned codes of kBits, of which kMinus is taken, in the lowest bits of a word's bytes; the bits above are not read.
// Two of them, two bytes apart, become bfloat16 in a lane at once.
constexpr bool kLooksUpPairs = true;
template <int kBits, int kMinus>
struct CodeTable {
  uint16_t values[64] = {};
  constexpr CodeTable() {
    for (int i = 0; i < 64; ++i)
      values[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, float(i % (1 << kBits) - kMinus)) >> 16);
  }
};
template <int kBits, int kMinus>
struct BytePairs {
  alignas(64) static constexpr CodeTable<kBits, kMinus> kTable{};
  struct Word {
    __m512i pairs[2];
  };
  FFN_FN static Word word(Uint32Lanes words) {
    const __m512i first = _mm512_load_si512(kTable.values), second = _mm512_load_si512(kTable.values + 32);
    Word w;
    for (int e = 0; e < 2; ++e) {
      const __m512i at = (__m512i)(words >> (8 * e));
      w.pairs[e] = kBits < 6 ? _mm512_permutexvar_epi16(at, first) : _mm512_permutex2var_epi16(first, at, second);
    }
    return w;
  }
  FFN_FN static FloatLanes value(const Word& word, int e) {
    const Uint32Lanes pair = (Uint32Lanes)word.pairs[e % 2];
    return (FloatLanes)(e < 2 ? pair << 16 : pair & 0xffff0000u);
  }
};

// Bits of e4m3 as halves: exact, but 256 times smaller.
FFN_FN FloatLanes e4m3_half_lanes(const uint8_t* p) {
  const __m256i b = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  return _mm512_cvtph_ps(
      _mm256_and_si256(b, _mm256_set1_epi16(static_cast<short>(0xbf80))));  // the sign was there twice
}

// ---- transposition --------------------------------------------------------------------------------------------------

// 4x4 blocks within the 128-bit quarters first, then two rounds move the quarters.
FFN_FN void transpose_lanes(FloatLanes (&r)[16]) {
  __m512 pairs[16], quads[16], halves[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      halves[i + j] = _mm512_shuffle_f32x4(quads[i + j], quads[i + j + 4], 0x88);
      halves[i + j + 4] = _mm512_shuffle_f32x4(quads[i + j], quads[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_f32x4(halves[j], halves[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_f32x4(halves[j], halves[j + 8], 0xdd);
  }
}
FFN_FN void transpose_lanes(DoubleLanes (&r)[8]) {
  __m512d pairs[8], halves[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_pd(r[i], r[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_pd(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      halves[i + j] = _mm512_shuffle_f64x2(pairs[i + j], pairs[i + j + 2], 0x88);
      halves[i + j + 2] = _mm512_shuffle_f64x2(pairs[i + j], pairs[i + j + 2], 0xdd);
    }
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_f64x2(halves[j], halves[j + 4], 0x88);
    r[j + 4] = _mm512_shuffle_f64x2(halves[j], halves[j + 4], 0xdd);
  }
}

#include "vec.h"
