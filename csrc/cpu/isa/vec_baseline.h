// SPDX-License-Identifier: BSD-3-Clause
// Any machine: 16-byte registers in GCC's vector extensions, without FMA on x86-64; aarch64 adds FMA and rounding.
// Included inside the namespace of baseline.cpp.

constexpr int kVectorBytes = 16;
#ifdef __aarch64__
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

#include "vec_common.h"

#ifdef __aarch64__
FFN_FN FloatLanes round_even_lanes(FloatLanes a) { return vrndnq_f32(a); }
FFN_FN DoubleLanes round_even_lanes(DoubleLanes a) { return vrndnq_f64(a); }
FFN_FN FloatLanes fma_lanes(FloatLanes a, FloatLanes b, FloatLanes c) { return vfmaq_f32(c, a, b); }
FFN_FN DoubleLanes fma_lanes(DoubleLanes a, DoubleLanes b, DoubleLanes c) { return vfmaq_f64(c, a, b); }
#else
// Adding 2^(mantissa bits) to a magnitude rounds it to an integer; larger magnitudes are integers already, and the
// sign is put back.
template <class R, class I, class T>
FFN_FN R round_even_by_magic(R a, T magic) {
  const R m = (R)((I)a & ~(I)(T(-0.0) - R{}));
  const R rounded = (m + magic) - magic;
  const I sign = (I)a & (I)(T(-0.0) - R{});
  return m < magic ? (R)((I)rounded | sign) : a;
}
FFN_FN FloatLanes round_even_lanes(FloatLanes a) { return round_even_by_magic<FloatLanes, Int32Lanes>(a, 0x1p23f); }
FFN_FN DoubleLanes round_even_lanes(DoubleLanes a) { return round_even_by_magic<DoubleLanes, Int64Lanes>(a, 0x1p52); }
FFN_FN FloatLanes fma_lanes(FloatLanes a, FloatLanes b, FloatLanes c) { return a * b + c; }
FFN_FN DoubleLanes fma_lanes(DoubleLanes a, DoubleLanes b, DoubleLanes c) { return a * b + c; }
#endif

#include "vec_lane_masks.h"

template <class R>
FFN_FN R min_lanes(R a, R b) {
  return a < b ? a : b;
}
template <class R>
FFN_FN R max_lanes(R a, R b) {
  return b < a ? a : b;
}

FFN_FN float reduce_add_lanes(FloatLanes v) { return (v[0] + v[2]) + (v[1] + v[3]); }
FFN_FN double reduce_add_lanes(DoubleLanes v) { return v[0] + v[1]; }

// ---- loads and stores -----------------------------------------------------------------------------------------------

typedef uint16_t Uint16Lanes __attribute__((vector_size(8)));

template <class R, class S>
FFN_FN R load_bits(const S* p) {
  static_assert(sizeof(R) % sizeof(S) == 0);
  R r;
  __builtin_memcpy(&r, p, sizeof(R));
  return r;
}
// The sizes are constants, so that the compiler removes the call of memcpy.
template <class R, class S>
FFN_FN R load_bits(const S* p, int n) {
  R r{};
  if (n == 1) __builtin_memcpy(&r, p, sizeof(S));
  if (n == 2) __builtin_memcpy(&r, p, 2 * sizeof(S));
  if constexpr (sizeof(R) == 4 * sizeof(S)) {
    if (n == 3) __builtin_memcpy(&r, p, 3 * sizeof(S));
    if (n == 4) __builtin_memcpy(&r, p, 4 * sizeof(S));
  }
  return r;
}
template <class R, class S>
FFN_FN void store_bits(S* p, R r) {
  __builtin_memcpy(p, &r, sizeof(R));
}
template <class R, class S>
FFN_FN void store_bits(S* p, R r, int n) {
  if (n == 1) __builtin_memcpy(p, &r, sizeof(S));
  if (n == 2) __builtin_memcpy(p, &r, 2 * sizeof(S));
  if constexpr (sizeof(R) == 4 * sizeof(S)) {
    if (n == 3) __builtin_memcpy(p, &r, 3 * sizeof(S));
    if (n == 4) __builtin_memcpy(p, &r, 4 * sizeof(S));
  }
}

FFN_FN Uint32Lanes widen_bits(Uint16Lanes v) { return __builtin_convertvector(v, Uint32Lanes); }
FFN_FN Uint16Lanes narrow_bits(Uint32Lanes v) { return __builtin_convertvector(v, Uint16Lanes); }

FFN_FN FloatLanes widen_bfloat16(Uint16Lanes v) { return (FloatLanes)(widen_bits(v) << 16); }

// Codec<Half>, four lanes at a time.
FFN_FN FloatLanes widen_half(Uint16Lanes v) {
  const Uint32Lanes bits = widen_bits(v);
  const Uint32Lanes sign = (bits & 0x8000u) << 16;
  const Uint32Lanes magnitude = bits & 0x7fffu;
  const Uint32Lanes normal = (magnitude << 13) + (112u << 23);
  const Uint32Lanes not_finite = normal + (112u << 23);
  const Uint32Lanes quiet = magnitude > 0x7c00u ? (not_finite | 0x400000u) : not_finite;
  const Uint32Lanes denormal = (Uint32Lanes)((FloatLanes)(magnitude | 0x3f000000u) - 0.5f);
  const Uint32Lanes finite = magnitude < 0x0400u ? denormal : normal;
  return (FloatLanes)((magnitude >= 0x7c00u ? quiet : finite) | sign);
}
FFN_FN Uint16Lanes narrow_half(FloatLanes v) {
  const Uint32Lanes bits = (Uint32Lanes)v;
  const Uint32Lanes magnitude = bits & 0x7fffffffu;
  const Uint32Lanes normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const Uint32Lanes denormal = (Uint32Lanes)((FloatLanes)magnitude + 0.5f) - 0x3f000000u;
  const Uint32Lanes finite = magnitude < 0x38800000u ? denormal : normal;
  const Uint32Lanes infinity = Uint32Lanes{} + 0x7c00u;
  const Uint32Lanes nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  const Uint32Lanes not_finite = magnitude > 0x7f800000u ? nan : infinity;
  return narrow_bits((magnitude >= 0x477ff000u ? not_finite : finite) | ((bits >> 16) & 0x8000u));
}

FFN_FN FloatLanes load_lanes(const float* p) { return load_bits<FloatLanes>(p); }
FFN_FN FloatLanes load_lanes(const float* p, int n) { return load_bits<FloatLanes>(p, n); }
FFN_FN DoubleLanes load_lanes(const double* p) { return load_bits<DoubleLanes>(p); }
FFN_FN DoubleLanes load_lanes(const double* p, int n) { return load_bits<DoubleLanes>(p, n); }
FFN_FN FloatLanes load_lanes(const BFloat16* p) { return widen_bfloat16(load_bits<Uint16Lanes>(p)); }
FFN_FN FloatLanes load_lanes(const BFloat16* p, int n) { return widen_bfloat16(load_bits<Uint16Lanes>(p, n)); }
FFN_FN FloatLanes load_lanes(const Half* p) { return widen_half(load_bits<Uint16Lanes>(p)); }
FFN_FN FloatLanes load_lanes(const Half* p, int n) { return widen_half(load_bits<Uint16Lanes>(p, n)); }

FFN_FN void store_lanes(float* p, FloatLanes v) { store_bits(p, v); }
FFN_FN void store_lanes(float* p, FloatLanes v, int n) { store_bits(p, v, n); }
FFN_FN void store_lanes(double* p, DoubleLanes v) { store_bits(p, v); }
FFN_FN void store_lanes(double* p, DoubleLanes v, int n) { store_bits(p, v, n); }
FFN_FN void store_lanes(BFloat16* p, FloatLanes v) { store_bits(p, narrow_bits(bfloat16_bits(v))); }
FFN_FN void store_lanes(BFloat16* p, FloatLanes v, int n) { store_bits(p, narrow_bits(bfloat16_bits(v)), n); }
FFN_FN void store_lanes(Half* p, FloatLanes v) { store_bits(p, narrow_half(v)); }
FFN_FN void store_lanes(Half* p, FloatLanes v, int n) { store_bits(p, narrow_half(v), n); }

// Not every machine has such stores.
template <class S, class R>
FFN_FN void store_nontemporal_lanes(S* p, R v) {
  store_lanes(p, v);
}
FFN_FN void end_nontemporal() {}

// ---- transposition --------------------------------------------------------------------------------------------------

FFN_FN void transpose_lanes(FloatLanes (&r)[4]) {
  const FloatLanes a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5),
                   b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const FloatLanes c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5),
                   d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}
FFN_FN void transpose_lanes(DoubleLanes (&r)[2]) {
  const DoubleLanes a = __builtin_shufflevector(r[0], r[1], 0, 2), b = __builtin_shufflevector(r[0], r[1], 1, 3);
  r[0] = a;
  r[1] = b;
}

// ---- codes of quantised weights -------------------------------------------------------------------------------------

// One byte for each lane; one nibble for each lane, from half as many bytes: it fills the lowest four bits, and the
// bits above are not zero.
FFN_FN Uint32Lanes byte_lanes(const uint8_t* p) { return Uint32Lanes{p[0], p[1], p[2], p[3]}; }
FFN_FN Int32Lanes signed_byte_lanes(const uint8_t* p) { return (Int32Lanes)(byte_lanes(p) << 24) >> 24; }
FFN_FN Uint32Lanes nibble_lanes(const uint8_t* p) {
  const uint32_t first = p[0], second = p[1];
  return Uint32Lanes{first, first >> 4, second, second >> 4};
}

// Looks up the lowest four bits of each lane in a table of 16.
struct NibbleTable {
  const float* values;
};
FFN_FN NibbleTable nibble_table(const float* values) { return {values}; }
FFN_FN FloatLanes lookup_lanes(const NibbleTable& t, Uint32Lanes nibbles) {
  return FloatLanes{t.values[nibbles[0] & 15u], t.values[nibbles[1] & 15u], t.values[nibbles[2] & 15u],
                    t.values[nibbles[3] & 15u]};
}

// 16 bytes of each of W rows, as W lanes of four words: word d of row i is lane i of out[d].
FFN_FN void transpose_words(const uint8_t* const* rows, int64_t at, Uint32Lanes (&out)[4]) {
  FloatLanes four[4];
  for (int i = 0; i < 4; ++i) four[i] = load_bits<FloatLanes>(rows[i] + at);
  transpose_lanes(four);
  for (int d = 0; d < 4; ++d) out[d] = (Uint32Lanes)four[d];
}

constexpr bool kTransposesEight = false;
FFN_FN void transpose_eight_words(const uint8_t* const*, int64_t, Uint32Lanes*) {}

// A word's eight nibbles, the lowest first, and their values, times 1 / kNibbleFactor.
constexpr float kNibbleFactor = 1;
struct WordTable {
  float values[16];
};
FFN_FN WordTable word_table(const int8_t* values) {
  WordTable t;
  for (int i = 0; i < 16; ++i) t.values[i] = values[i];
  return t;
}
using NibbleWord = Uint32Lanes;
FFN_FN NibbleWord nibble_word(const WordTable&, Uint32Lanes words) { return words; }
FFN_FN FloatLanes nibble_value(const WordTable& t, const NibbleWord& words, int e) {
  return lookup_lanes({t.values}, words >> (4 * e));
}
constexpr bool kAddsExponents = false;  // codes that scales of powers of two are applied to by integers
struct NibblePairs;
constexpr bool kLooksUpPairs = false;
template <int kBits, int kMinus>
struct BytePairs;

// Bits of e4m3 as halves: exact, but 256 times smaller.
FFN_FN FloatLanes e4m3_half_lanes(const uint8_t* p) {
  const Uint32Lanes b = byte_lanes(p);
  return widen_half(narrow_bits(((b & 0x80u) << 8) | ((b & 0x7fu) << 7)));
}

#include "vec.h"
