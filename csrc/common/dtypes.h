// SPDX-License-Identifier: BSD-3-Clause
// The one list of storage dtypes, and the scalar conversions that define the result of every vector load and store.
// This normal header is included before any target region, so it must not use intrinsics.
#pragma once

#include <stdint.h>

// Function qualifier of all code that is included once per instruction set; CUDA defines its own before this line.
#ifndef FFN_FN
#define FFN_FN inline __attribute__((always_inline))
#endif

namespace ffn_ops {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class... Ts>
struct TypeList {
  static constexpr int kSize = sizeof...(Ts);
};

template <class T>
struct Tag {
  using Type = T;
};

// Calls `f(Tag<T>{})` for the `index`-th type of the list; false if there is none. The lambda's type is private to its
// translation unit, so this instantiation is too, and inlining moves it into the caller's target.
template <class... Ts, class F>
FFN_FN constexpr bool visit_type(TypeList<Ts...>, int index, F&& f) {
  int i = 0;
  return ((index == i++ && (f(Tag<Ts>{}), true)) || ...);
}

// Same order as `StorageTypes` and `kDTypeNames`.
enum class DType : int { kFloat64, kFloat32, kFloat16, kBFloat16 };
using StorageTypes = TypeList<double, float, Half, BFloat16>;
inline constexpr const char* kDTypeNames[] = {"float64", "float32", "float16", "bfloat16"};
static_assert(sizeof(kDTypeNames) / sizeof(kDTypeNames[0]) == StorageTypes::kSize);

// Bytes of one element in memory.
constexpr int64_t storage_size(DType dtype) {
  constexpr int64_t sizes[] = {8, 4, 2, 2};
  return sizes[static_cast<int>(dtype)];
}

// The type of the arithmetic for a storage dtype.
constexpr DType arithmetic_dtype(DType storage) {
  return storage == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

template <class F>
FFN_FN constexpr bool dispatch_dtype(DType dtype, F&& f) {
  return visit_type(StorageTypes{}, static_cast<int>(dtype), f);
}

// `Compute` is the type of the arithmetic. `encode` rounds to nearest even, keeps NaN NaN (quieted, upper payload bits
// kept) and never flushes denormals.
template <class S>
struct Codec;

template <>
struct Codec<double> {
  using Compute = double;
  static constexpr DType kDType = DType::kFloat64;
  static constexpr double decode(double x) { return x; }
  static constexpr double encode(double x) { return x; }
};

template <>
struct Codec<float> {
  using Compute = float;
  static constexpr DType kDType = DType::kFloat32;
  static constexpr float decode(float x) { return x; }
  static constexpr float encode(float x) { return x; }
};

template <>
struct Codec<BFloat16> {
  using Compute = float;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr float decode(BFloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
  static constexpr BFloat16 encode(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  }
};

template <>
struct Codec<Half> {
  using Compute = float;
  static constexpr DType kDType = DType::kFloat16;

  static constexpr float decode(Half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    uint32_t bits = 0;
    if (magnitude > 0x7c00u) {
      bits = 0x7fc00000u | (magnitude << 13);
    } else if (magnitude == 0x7c00u) {
      bits = 0x7f800000u;
    } else if (magnitude >= 0x0400u) {
      bits = (magnitude << 13) + (112u << 23);
    } else {
      // A denormal is magnitude · 2^-24. Put it into the mantissa of 0.5, whose last bit is worth 2^-24, and subtract
      // 0.5.
      bits = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, 0x3f000000u | magnitude) - 0.5f);
    }
    return __builtin_bit_cast(float, bits | sign);
  }

  static constexpr Half encode(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half = 0;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520, half way from the largest half to the next power of two
      half = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal half
      half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    } else {
      // The sum's last bit weighs 2^-24, as a denormal half's does: the addition itself rounds to nearest even.
      half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
    }
    return {uint16_t(half | ((bits >> 16) & 0x8000u))};
  }
};

}  // namespace ffn_ops
