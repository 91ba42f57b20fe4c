// SPDX-License-Identifier: BSD-3-Clause
// One lane of float or double: what common/math.h and common/activations.h are written for, so that the same structs
// drive CPU and CUDA. And the storage types in global memory: one element, or 16 bytes of them at once.
#pragma once

#include <math.h>
#include <stdint.h>

#include "device.cuh"

#include "kernels.h"

namespace ffn_ops::cuda {

constexpr bool kHasFma = true;

FFN_FN float approximate_reciprocal(float x) {  // 1 ULP, for 2^-126 <= |x| <= 2^126
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1 / x;
#endif
}
FFN_FN float approximate_exp2(float x) {  // 2 ULP
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return ::exp2f(x);
#endif
}

// a / b for 2^-100 <= |b| <= 2^100 and no overflow or underflow, which is what math.h has, or NaN: without the branch
// to other cases that would keep elements from running side by side. Newton's step and one correction by the remainder
// leave an error of half an ULP and a hair.
FFN_FN float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  const float guess = approximate_reciprocal(b);
  const float reciprocal = ::fmaf(::fmaf(-b, guess, 1.0f), guess, guess);
  const float result = a * reciprocal;
  return ::fmaf(::fmaf(-b, result, a), reciprocal, result);
#else
  return a / b;
#endif
}
FFN_FN double quotient(double a, double b) { return a / b; }

// The interface of Vec<T> in cpu/isa/vec.h, with bool as mask. kBrief: results will be rounded to 16 bits.
template <class T, bool kBrief = false>
struct Lane {
  using Scalar = T;
  static constexpr int kLanes = 1;
  static constexpr bool kSingle = sizeof(T) == 4;

  T value;

  Lane() = default;
  FFN_FN constexpr Lane(T x) : value(x) {}
  FFN_FN static Lane zero() { return Lane(T(0)); }

  FFN_FN friend Lane operator+(Lane a, Lane b) { return Lane(a.value + b.value); }
  FFN_FN friend Lane operator-(Lane a, Lane b) { return Lane(a.value - b.value); }
  FFN_FN friend Lane operator*(Lane a, Lane b) { return Lane(a.value * b.value); }
  FFN_FN friend Lane operator/(Lane a, Lane b) { return Lane(quotient(a.value, b.value)); }
  FFN_FN friend Lane operator-(Lane a) { return Lane(-a.value); }
  FFN_FN Lane& operator+=(Lane b) { return *this = *this + b; }
  FFN_FN Lane& operator-=(Lane b) { return *this = *this - b; }
  FFN_FN Lane& operator*=(Lane b) { return *this = *this * b; }

  FFN_FN friend bool operator<(Lane a, Lane b) { return a.value < b.value; }
  FFN_FN friend bool operator<=(Lane a, Lane b) { return a.value <= b.value; }
  FFN_FN friend bool operator>(Lane a, Lane b) { return a.value > b.value; }
  FFN_FN friend bool operator>=(Lane a, Lane b) { return a.value >= b.value; }
  FFN_FN friend bool operator==(Lane a, Lane b) { return a.value == b.value; }
  FFN_FN friend bool operator!=(Lane a, Lane b) { return a.value != b.value; }
  FFN_FN friend Lane select(bool mask, Lane a, Lane b) { return mask ? a : b; }

  FFN_FN friend Lane fma(Lane a, Lane b, Lane c) {
    if constexpr (kSingle) return Lane(::fmaf(a.value, b.value, c.value));
    else return Lane(::fma(a.value, b.value, c.value));
  }
  // Where a or b is NaN, both give b.
  FFN_FN friend Lane min(Lane a, Lane b) { return a.value < b.value ? a : b; }
  FFN_FN friend Lane max(Lane a, Lane b) { return b.value < a.value ? a : b; }
  FFN_FN friend Lane abs(Lane a) {
    if constexpr (kSingle) return Lane(::fabsf(a.value));
    else return Lane(::fabs(a.value));
  }
  FFN_FN friend Lane copysign(Lane magnitude, Lane sign) {
    if constexpr (kSingle) return Lane(::copysignf(magnitude.value, sign.value));
    else return Lane(::copysign(magnitude.value, sign.value));
  }
  FFN_FN friend Lane sqrt(Lane a) {
    if constexpr (kSingle) return Lane(::sqrtf(a.value));
    else return Lane(::sqrt(a.value));
  }
  // For |a| < 2^22 (float) or 2^51 (double), which is what math.h has: adding 1.5 times the power of two above drops
  // the digits behind the point; the instruction for it runs at a quarter of the rate.
  FFN_FN friend Lane round_even(Lane a) {
    constexpr T magic = kSingle ? T(0x1.8p23) : T(0x1.8p52);
    return Lane((a.value + magic) - magic);
  }

  // a · 2^k as in vec.h: in two factors, as 2^k itself may be out of range; the first product is exact wherever the
  // second one rounds.
  FFN_FN friend Lane scale_by_power_of_two(Lane a, Lane k) {
    const Lane half = round_even(k * Lane(T(0.5)));
    return a * power_of_two<0>(half) * power_of_two<0>(k - half);
  }
  FFN_FN friend Lane scale_down(Lane a, Lane k) {
    if constexpr (kSingle) return a * power_of_two<64>(k) * Lane(T(0x1p-64));
    else return a * power_of_two<512>(k) * Lane(T(0x1p-512));
  }

 private:
  // 2^(k + offset) by its exponent bits: the sum leaves the biased exponent in the lowest bits.
  template <int kOffset>
  FFN_FN static Lane power_of_two(Lane k) {
    if constexpr (kSingle) {
      const float sum = k.value + (0x1.8p23f + 127 + kOffset);
      return Lane(__builtin_bit_cast(float, __builtin_bit_cast(uint32_t, sum) << 23));
    } else {
      const double sum = k.value + (0x1.8p52 + 1023 + kOffset);
      return Lane(__builtin_bit_cast(double, __builtin_bit_cast(uint64_t, sum) << 52));
    }
  }
};

#include "../common/math.h"

// The largest relative error of e is 2^-17, for |z| near 90: a thirtieth of the rounding to float16.
FFN_FN SigmoidPair<Lane<float, true>> sigmoid_pair(Lane<float, true> z) {
  const float e = approximate_exp2(max(Lane<float>(-152.0f), Lane<float>(-::fabsf(z.value) * 1.44269504f)).value);
  const float larger = approximate_reciprocal(1 + e), smaller = e * larger;
  return {z.value < 0 ? smaller : larger, z.value < 0 ? larger : smaller};
}

#include "../common/activations.h"

#include "../common/scores.h"
#include "../common/gate_math.h"

// ---- storage --------------------------------------------------------------------------------------------------------

template <class S>
using ComputeOf = typename Codec<S>::Compute;

// For activations of stored values.
template <class S>
using LaneOf = Lane<ComputeOf<S>, sizeof(S) == 2>;

// As Codec<S>: what takes a dozen instructions there is one here. Only the payload of a NaN may differ.
template <class S>
FFN_FN ComputeOf<S> decode(S x) {
#ifdef __CUDA_ARCH__
  if constexpr (__is_same(S, Half)) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
  }
#endif
  return Codec<S>::decode(x);
}

template <class S>
FFN_FN S encode(ComputeOf<S> x) {
#ifdef __CUDA_ARCH__
  if constexpr (__is_same(S, Half)) {
    Half half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
    return half;
  }
  if constexpr (__is_same(S, BFloat16)) {
    BFloat16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
  }
#endif
  return Codec<S>::encode(x);
}

// Two at once, the first one in the lower half.
template <class S>
FFN_FN uint32_t encode_pair(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  if constexpr (__is_same(S, Half)) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return encode<S>(first).bits | uint32_t(encode<S>(second).bits) << 16;
#endif
}

// What one instruction moves.
struct alignas(16) Words {
  uint32_t word[4];
};

// N values of storage type S in registers, a multiple of 16 bytes.
template <class S, int N = 16 / int(sizeof(S))>
struct Pack {
  static constexpr int kSize = N;
  static constexpr int kWords = N * int(sizeof(S)) / 16;
  static_assert(kWords * 16 == N * int(sizeof(S)));
  Words words[kWords];

  FFN_FN S raw(int i) const {
    if constexpr (sizeof(S) == 2) {
      return {uint16_t(words[i / 8].word[i % 8 / 2] >> (i % 2 * 16))};
    } else if constexpr (sizeof(S) == 4) {
      return __builtin_bit_cast(S, words[i / 4].word[i % 4]);
    } else {
      const uint32_t* at = words[i / 2].word + i % 2 * 2;
      return __builtin_bit_cast(S, uint64_t(at[0]) | uint64_t(at[1]) << 32);
    }
  }
  // Only into a pack that is zero there.
  FFN_FN void set_raw(int i, S value) {
    if constexpr (sizeof(S) == 2) {
      words[i / 8].word[i % 8 / 2] |= uint32_t(value.bits) << (i % 2 * 16);
    } else if constexpr (sizeof(S) == 4) {
      words[i / 4].word[i % 4] = __builtin_bit_cast(uint32_t, value);
    } else {
      uint64_t bits = __builtin_bit_cast(uint64_t, value);  // not const: nvcc 13.0 would try it as a constant, and fail
      words[i / 2].word[i % 2 * 2] = uint32_t(bits);
      words[i / 2].word[i % 2 * 2 + 1] = uint32_t(bits >> 32);
    }
  }
  FFN_FN ComputeOf<S> operator[](int i) const { return decode(raw(i)); }
  FFN_FN static Pack of(const ComputeOf<S> (&values)[N]) {
    Pack pack{};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (sizeof(S) > 2) pack.set_raw(i, encode<S>(values[i]));
      else if (i % 2 == 0) pack.words[i / 8].word[i % 8 / 2] = encode_pair<S>(values[i], values[i + 1]);
    }
    return pack;
  }
};

// One value, with the functions of a pack.
template <class S>
struct Single {
  S value;
  FFN_FN ComputeOf<S> operator[](int) const { return decode(value); }
  FFN_FN static Single of(const ComputeOf<S> (&values)[1]) { return {encode<S>(values[0])}; }
};

template <class S, int N>
struct ElementsType {
  using Type = Pack<S, N>;
};
template <class S>
struct ElementsType<S, 1> {
  using Type = Single<S>;
};
// N values in registers: one, or whole packs.
template <class S, int N>
using Elements = typename ElementsType<S, N>::Type;

template <int N, class S>
FFN_FN Elements<S, N> load_elements(const S* from) {
  return *reinterpret_cast<const Elements<S, N>*>(from);
}
template <class S, class E>
FFN_FN void store_elements(S* to, const E& elements) {
  *reinterpret_cast<E*>(to) = elements;
}

// The first n of N values that are `stride` apart; the others are zero and their memory is not touched. With `vector`
// the address is a multiple of 16 and the stride 1: whole packs move 16 bytes at a time.
template <int N, class S>
FFN_FN Pack<S, N> load_pack(const S* from, int64_t stride, int n, bool vector) {
  Pack<S, N> pack{};
  if (vector && n >= N) {
#pragma unroll
    for (int i = 0; i < Pack<S, N>::kWords; ++i) pack.words[i] = reinterpret_cast<const Words*>(from)[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < n) pack.set_raw(i, from[i * stride]);
  }
  return pack;
}

template <int N, class S>
FFN_FN void store_pack(S* to, const Pack<S, N>& pack, int n, bool vector) {
  if (vector && n >= N) {
#pragma unroll
    for (int i = 0; i < Pack<S, N>::kWords; ++i) reinterpret_cast<Words*>(to)[i] = pack.words[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < n) to[i] = pack.raw(i);
  }
}

template <class S>
FFN_FN const S* element(const Matrix& m, int64_t r, int64_t c) {
  return static_cast<const S*>(m.data) + r * m.row_stride + c * m.col_stride;
}

}  // namespace ffn_ops::cuda
