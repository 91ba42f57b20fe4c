// SPDX-License-Identifier: BSD-3-Clause
// AVX2 + FMA + F16C: 32-byte registers. Included inside the namespace and target region of avx2.cpp.

constexpr int kVectorBytes = 32;
constexpr bool kHasFma = true;

#include "vec_common.h"

FFN_FN FloatLanes round_even_lanes(FloatLanes a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FFN_FN DoubleLanes round_even_lanes(DoubleLanes a) {
  return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#include "vec_lane_masks.h"

FFN_FN FloatLanes fma_lanes(FloatLanes a, FloatLanes b, FloatLanes c) { return _mm256_fmadd_ps(a, b, c); }
FFN_FN DoubleLanes fma_lanes(DoubleLanes a, DoubleLanes b, DoubleLanes c) { return _mm256_fmadd_pd(a, b, c); }

FFN_FN FloatLanes min_lanes(FloatLanes a, FloatLanes b) { return _mm256_min_ps(a, b); }
FFN_FN DoubleLanes min_lanes(DoubleLanes a, DoubleLanes b) { return _mm256_min_pd(a, b); }
FFN_FN FloatLanes max_lanes(FloatLanes a, FloatLanes b) { return _mm256_max_ps(a, b); }
FFN_FN DoubleLanes max_lanes(DoubleLanes a, DoubleLanes b) { return _mm256_max_pd(a, b); }

FFN_FN float reduce_add_lanes(FloatLanes v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
FFN_FN double reduce_add_lanes(DoubleLanes v) {
  const __m128d sum = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(sum, _mm_unpackhi_pd(sum, sum)));
}

// ---- loads and stores -----------------------------------------------------------------------------------------------

FFN_FN __m256i tail_mask32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FFN_FN __m256i tail_mask64(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

// AVX2 has no masked access to 16-bit lanes: n of them go through a buffer in pieces of 4, 2 and 1.
FFN_FN __m128i load_16bit(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
FFN_FN __m128i load_16bit(const void* p, int n) {
  if (n == 8) return load_16bit(p);
  alignas(16) uint16_t buffer[8] = {};
  const char* from = static_cast<const char*>(p);
  int i = 0;
  if (n & 4) __builtin_memcpy(buffer, from, 8), i = 4;
  if (n & 2) __builtin_memcpy(buffer + i, from + 2 * i, 4), i += 2;
  if (n & 1) __builtin_memcpy(buffer + i, from + 2 * i, 2);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
FFN_FN void store_16bit(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
FFN_FN void store_16bit(void* p, __m128i v, int n) {
  if (n == 8) return store_16bit(p, v);
  char* to = static_cast<char*>(p);
  if (n & 4) _mm_storel_epi64(reinterpret_cast<__m128i*>(to), v), to += 8, v = _mm_unpackhi_epi64(v, v);
  if (n & 2) {
    const int two = _mm_cvtsi128_si32(v);
    __builtin_memcpy(to, &two, 4), to += 4, v = _mm_srli_si128(v, 4);
  }
  if (n & 1) {
    const uint16_t one = static_cast<uint16_t>(_mm_extract_epi16(v, 0));
    __builtin_memcpy(to, &one, 2);
  }
}

FFN_FN FloatLanes widen_bfloat16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FFN_FN __m128i narrow_bfloat16(FloatLanes v) {
  const __m256i bits = (__m256i)bfloat16_bits(v);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
FFN_FN __m128i narrow_half(FloatLanes v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

FFN_FN FloatLanes load_lanes(const float* p) { return _mm256_loadu_ps(p); }
FFN_FN FloatLanes load_lanes(const float* p, int n) { return _mm256_maskload_ps(p, tail_mask32(n)); }
FFN_FN DoubleLanes load_lanes(const double* p) { return _mm256_loadu_pd(p); }
FFN_FN DoubleLanes load_lanes(const double* p, int n) { return _mm256_maskload_pd(p, tail_mask64(n)); }
FFN_FN FloatLanes load_lanes(const BFloat16* p) { return widen_bfloat16(load_16bit(p)); }
FFN_FN FloatLanes load_lanes(const BFloat16* p, int n) { return widen_bfloat16(load_16bit(p, n)); }
FFN_FN FloatLanes load_lanes(const Half* p) { return _mm256_cvtph_ps(load_16bit(p)); }
FFN_FN FloatLanes load_lanes(const Half* p, int n) { return _mm256_cvtph_ps(load_16bit(p, n)); }

FFN_FN void store_lanes(float* p, FloatLanes v) { _mm256_storeu_ps(p, v); }
FFN_FN void store_lanes(float* p, FloatLanes v, int n) { _mm256_maskstore_ps(p, tail_mask32(n), v); }
FFN_FN void store_lanes(double* p, DoubleLanes v) { _mm256_storeu_pd(p, v); }
FFN_FN void store_lanes(double* p, DoubleLanes v, int n) { _mm256_maskstore_pd(p, tail_mask64(n), v); }
FFN_FN void store_lanes(BFloat16* p, FloatLanes v) { store_16bit(p, narrow_bfloat16(v)); }
FFN_FN void store_lanes(BFloat16* p, FloatLanes v, int n) { store_16bit(p, narrow_bfloat16(v), n); }
FFN_FN void store_lanes(Half* p, FloatLanes v) { store_16bit(p, narrow_half(v)); }
FFN_FN void store_lanes(Half* p, FloatLanes v, int n) { store_16bit(p, narrow_half(v), n); }

FFN_FN void store_nontemporal_lanes(float* p, FloatLanes v) { _mm256_stream_ps(p, v); }
FFN_FN void store_nontemporal_lanes(double* p, DoubleLanes v) { _mm256_stream_pd(p, v); }
FFN_FN void store_nontemporal_lanes(BFloat16* p, FloatLanes v) { _mm_stream_si128((__m128i*)p, narrow_bfloat16(v)); }
FFN_FN void store_nontemporal_lanes(Half* p, FloatLanes v) { _mm_stream_si128((__m128i*)p, narrow_half(v)); }
FFN_FN void end_nontemporal() { _mm_sfence(); }

// ---- codes of quantised weights -------------------------------------------------------------------------------------

// One byte for each lane; one nibble for each lane, from half as many bytes: it fills the lowest four bits, and the
// bits above are not zero.
FFN_FN Uint32Lanes byte_lanes(const uint8_t* p) {
  return (Uint32Lanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
FFN_FN Int32Lanes signed_byte_lanes(const uint8_t* p) {
  return (Int32Lanes)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
FFN_FN Uint32Lanes nibble_lanes(const uint8_t* p) {
  int four = 0;
  __builtin_memcpy(&four, p, 4);
  const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  return (Uint32Lanes)_mm256_or_si256(bytes, _mm256_slli_epi64(bytes, 28));
}

// Looks up the lowest four bits of each lane in a table of 16.
struct NibbleTable {
  __m256 low, high;
};
FFN_FN NibbleTable nibble_table(const float* values) { return {_mm256_load_ps(values), _mm256_load_ps(values + 8)}; }
FFN_FN FloatLanes lookup_lanes(const NibbleTable& t, Uint32Lanes nibbles) {
  const __m256 low = _mm256_permutevar8x32_ps(t.low, (__m256i)nibbles);
  const __m256 high = _mm256_permutevar8x32_ps(t.high, (__m256i)nibbles);
  return _mm256_blendv_ps(low, high, (__m256)(nibbles << 28));
}

// 16 bytes of each of W rows, as W lanes of four words: word d of row i is lane i of out[d].
FFN_FN void transpose_words(const uint8_t* const* rows, int64_t at, Uint32Lanes (&out)[4]) {
  __m256i four[4];
  for (int j = 0; j < 4; ++j) {
    const __m128i low = _mm_loadu_si128((const __m128i*)(rows[j] + at));
    four[j] =
        _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128((const __m128i*)(rows[j + 4] + at)), 1);
  }
  const __m256i a = _mm256_unpacklo_epi32(four[0], four[1]), b = _mm256_unpackhi_epi32(four[0], four[1]);
  const __m256i c = _mm256_unpacklo_epi32(four[2], four[3]), d = _mm256_unpackhi_epi32(four[2], four[3]);
  out[0] = (Uint32Lanes)_mm256_unpacklo_epi64(a, c);
  out[1] = (Uint32Lanes)_mm256_unpackhi_epi64(a, c);
  out[2] = (Uint32Lanes)_mm256_unpacklo_epi64(b, d);
  out[3] = (Uint32Lanes)_mm256_unpackhi_epi64(b, d);
}

constexpr bool kTransposesEight = false;
FFN_FN void transpose_eight_words(const uint8_t* const*, int64_t, Uint32Lanes*) {}

// A word's eight nibbles, the lowest first, and their values, times 1 / kNibbleFactor: bytes by table, which stay at
// the top of an integer.
constexpr float kNibbleFactor = 0x1p-24f;
struct WordTable {
  __m256i values;
};
FFN_FN WordTable word_table(const int8_t* values) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values))};
}
struct NibbleWord {
  __m256i halves[2];  // even ones, odd ones
};
FFN_FN NibbleWord nibble_word(const WordTable& t, Uint32Lanes words) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {{_mm256_shuffle_epi8(t.values, _mm256_and_si256((__m256i)words, mask)),
           _mm256_shuffle_epi8(t.values, _mm256_and_si256(_mm256_srli_epi32((__m256i)words, 4), mask))}};
}
FFN_FN FloatLanes nibble_value(const WordTable&, const NibbleWord& word, int e) {
  const Uint32Lanes half = (Uint32Lanes)word.halves[e % 2], top = e < 6 ? half << (24 - e / 2 * 8) : half;
  return __builtin_convertvector((Int32Lanes)(e < 2 ? top : top & 0xff000000u), FloatLanes);
}

constexpr bool kAddsExponents = false;  // codes that scales of powers of two are applied to by integers
struct NibblePairs;
constexpr bool kLooksUpPairs = false;
template <int kBits, int kMinus>
struct BytePairs;

// Bits of e4m3 as halves: exact, but 256 times smaller.
FFN_FN FloatLanes e4m3_half_lanes(const uint8_t* p) {
  const __m128i b = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
  return _mm256_cvtph_ps(_mm_and_si128(b, _mm_set1_epi16(static_cast<short>(0xbf80))));  // the sign was there twice
}

// ---- transposition --------------------------------------------------------------------------------------------------

// 4x4 blocks within the 128-bit halves first, then the halves change places.
FFN_FN void transpose_lanes(FloatLanes (&r)[8]) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}
FFN_FN void transpose_lanes(DoubleLanes (&r)[4]) {
  const __m256d a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
  const __m256d c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
  r[0] = _mm256_permute2f128_pd(a, c, 0x20);
  r[1] = _mm256_permute2f128_pd(b, d, 0x20);
  r[2] = _mm256_permute2f128_pd(a, c, 0x31);
  r[3] = _mm256_permute2f128_pd(b, d, 0x31);
}

#include "vec.h"
