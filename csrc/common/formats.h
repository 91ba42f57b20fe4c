// SPDX-License-Identifier: BSD-3-Clause
// The one list of formats of quantised weights, and the scalar decoding of their scales. A weight [N, K] has rows of
// codes along k. Where a scale stands in a tensor of its own, it belongs to a block of rows and columns.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "dtypes.h"

namespace ffn_ops {

enum class Format : int {
  kMxfp4,  // value = fp4 * 2^(scale - 127)
  kNvfp4,  // fp4 * (e4m3 scale * factor)
  kFp8,    // e4m3 * scale
  kInt8,   // integer * scale
  kInt4,   // (nibble - 8) * scale
  kUint4,  // (nibble - zero) * scale
  // Blocks of GGUF, which hold their scales.
  kQ8_0,
  kQ4_0,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kGgufMxfp4,
};

struct FormatInfo {
  const char* name;
  int64_t block;        // elements along k in a block of codes
  int64_t block_bytes;  // its bytes
  int tensors;          // codes, then scales, then zeros or the factor
};

// Same order as Format.
inline constexpr FormatInfo kFormats[] = {{"mxfp4", 2, 1, 2},    {"nvfp4", 2, 1, 3},    {"fp8", 1, 1, 2},
                                          {"int8", 1, 1, 2},     {"int4", 2, 1, 2},     {"uint4", 2, 1, 3},
                                          {"q8_0", 32, 34, 1},   {"q4_0", 32, 18, 1},   {"q4_k", 256, 144, 1},
                                          {"q5_k", 256, 176, 1}, {"q6_k", 256, 210, 1}, {"gguf_mxfp4", 32, 17, 1}};
inline constexpr int kFormatCount = sizeof(kFormats) / sizeof(kFormats[0]);

constexpr const FormatInfo& info_of(Format format) { return kFormats[static_cast<int>(format)]; }

enum class ScaleType : int { kFloat32, kFloat16, kBFloat16, kE8M0, kE4M3 };

// 2^(bits - 127); 255 is NaN.
constexpr float decode_e8m0(uint8_t bits) {
  return __builtin_bit_cast(float, bits == 255 ? 0x7fc00000u : bits == 0 ? 0x00400000u : uint32_t(bits) << 23);
}

constexpr float decode_e4m3(uint8_t bits) {
  const uint32_t magnitude = bits & 0x7fu;
  float value = 0;
  if (magnitude == 0x7f) value = __builtin_bit_cast(float, 0x7fc00000u);
  else if (magnitude < 8) value = static_cast<float>(magnitude) * 0x1p-9f;
  else value = __builtin_bit_cast(float, (magnitude << 20) + (120u << 23));
  return bits & 0x80 ? -value : value;
}

// Of q4_k and q5_k: scale and minimum of sub-block j of eight, six bits each in twelve bytes.
constexpr void k_scale_min(const uint8_t* s, int64_t j, int& scale, int& min) {
  scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6 << 4);
  min = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | (s[j] >> 6 << 4);
}

// A quantised matrix [N, K] in the bytes of its checkpoint. Element (n, k) has the scale at (n / block_rows, k /
// block_cols).
struct Codes {
  Format format = Format::kMxfp4;
  const uint8_t* data = nullptr;
  int64_t row_bytes = 0;
  const void* scales = nullptr;
  ScaleType scale_type = ScaleType::kFloat32;
  int64_t scale_row = 0;  // scales in a row of blocks
  int64_t block_rows = 1, block_cols = 1;
  const uint8_t* zeros = nullptr;  // nibbles, two neighbours along k in a byte, low nibble first
  int64_t zero_row_bytes = 0;
  float factor = 1;  // of the scales
};

// A stacked weight [E, N, K]: the codes of its first expert, and how many bytes each expert has.
struct StackedCodes {
  Codes first;  // but for its factor
  int64_t E = 0, N = 0, K = 0;
  int64_t data_bytes = 0, scale_bytes = 0, zero_bytes = 0;
  const float* factors = nullptr;  // [E] or null
};

}  // namespace ffn_ops
