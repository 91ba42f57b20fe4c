// SPDX-License-Identifier: BSD-3-Clause
// Codes of quantised weights become float32: a few neighbours of a row at a time, which a thread reads first and makes
// numbers of later. Every value is rounded as dequantize on the CPU rounds it.
#pragma once

#include "gemm_grid.h"
#include "scalar.cuh"

namespace ffn_ops::cuda {

// How a code becomes a number, once blocks of GGUF are read. A format not named is one of bytes.
enum class CodeKind { kFp4, kNibble, kByte, kE4M3 };
FFN_FN CodeKind code_kind(Format format) {
  switch (format) {
    case Format::kMxfp4:
    case Format::kNvfp4:
    case Format::kGgufMxfp4:
      return CodeKind::kFp4;
    case Format::kInt4:
    case Format::kUint4:
      return CodeKind::kNibble;
    case Format::kFp8:
      return CodeKind::kE4M3;
    default:
      return CodeKind::kByte;
  }
}

// (number(code) - offset) * scale - minus, for `count` codes: bytes of two words, or nibbles of the first.
template <int kWide>
struct CodedChunk {
  uint32_t words[2];
  int count, offset;
  float scale, minus;
};

// Row n of an expert.
struct CodedRow {
  const uint8_t* data;
  const char* scales;
  const uint8_t* zeros;
  float factor;
};

FFN_FN int64_t block_of(int64_t index, int shift, int64_t block) { return shift >= 0 ? index >> shift : index / block; }

FFN_FN int64_t scale_size(ScaleType type) {
  return type == ScaleType::kFloat32 ? 4 : type == ScaleType::kFloat16 || type == ScaleType::kBFloat16 ? 2 : 1;
}

FFN_FN CodedRow coded_row(const CodedWeight& w, int64_t expert, int64_t n) {
  CodedRow row{w.first.data + expert * w.data_bytes + n * w.first.row_bytes, nullptr, nullptr, 1.0f};
  if (!w.first.scales) return row;
  const int64_t block = block_of(n, w.row_shift, w.first.block_rows);
  row.scales = static_cast<const char*>(w.first.scales) + expert * w.scale_bytes +
               block * w.first.scale_row * scale_size(w.first.scale_type);
  if (w.first.zeros) row.zeros = w.first.zeros + expert * w.zero_bytes + block * w.first.zero_row_bytes;
  if (w.factors) row.factor = w.factors[expert];
  return row;
}

FFN_FN float scale_of_group(const CodedWeight& w, const CodedRow& row, int64_t group) {
  float scale = 0;
  switch (w.first.scale_type) {
    case ScaleType::kFloat32:
      scale = reinterpret_cast<const float*>(row.scales)[group];
      break;
    case ScaleType::kFloat16:
      scale = decode(reinterpret_cast<const Half*>(row.scales)[group]);
      break;
    case ScaleType::kBFloat16:
      scale = decode(reinterpret_cast<const BFloat16*>(row.scales)[group]);
      break;
    case ScaleType::kE8M0:
      scale = decode_e8m0(static_cast<uint8_t>(row.scales[group]));
      break;
    case ScaleType::kE4M3:
      scale = decode_e4m3(static_cast<uint8_t>(row.scales[group]));
      break;
  }
  return w.factors ? scale * row.factor : scale;
}

FFN_FN int zero_of_group(const CodedRow& row, int64_t group) { return row.zeros[group / 2] >> (group % 2 * 4) & 15; }

// `bytes` bytes, of which `count` are there; in whole words where `aligned` says so.
template <int kBytes>
FFN_FN void read_codes(const uint8_t* from, int count, bool aligned, uint32_t (&words)[2]) {
  if (aligned && count == kBytes) {
    if constexpr (kBytes == 2) {
      words[0] = *reinterpret_cast<const uint16_t*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 4; ++i) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kBytes; ++i)
    if (i < count) words[i / 4] |= uint32_t{from[i]} << (i % 4 * 8);
}

FFN_FN float half_of(const uint8_t* from) { return decode(Half{uint16_t(from[0] | from[1] << 8)}); }

// The block of GGUF that holds element k of a row, and the element's place in it.
template <Format kFormat>
FFN_FN const uint8_t* gguf_block(const uint8_t* row, int64_t k, int& at) {
  constexpr int64_t kBlock = info_of(kFormat).block, kBytes = info_of(kFormat).block_bytes;
  at = int(k % kBlock);
  return row + k / kBlock * kBytes;
}

// Of blocks of GGUF, whose rows end with a whole chunk.
template <int kWide>
FFN_FN void read_gguf(Format format, const uint8_t* row, int64_t k, CodedChunk<kWide>& c) {
  const uint8_t *low = nullptr, *high = nullptr;
  int at = 0, shift = 0, high_shift = 0, high_mask = 0;
  switch (format) {
    case Format::kQ8_0: {
      const uint8_t* const b = gguf_block<Format::kQ8_0>(row, k, at);
      c.scale = half_of(b);
      low = b + 2 + at;
      break;
    }
    case Format::kQ4_0: {  // low nibbles, then high ones
      const uint8_t* const b = gguf_block<Format::kQ4_0>(row, k, at);
      c.scale = half_of(b);
      c.offset = 8;
      low = b + 2 + at % 16;
      shift = at / 16 * 4;
      break;
    }
    case Format::kGgufMxfp4: {
      const uint8_t* const b = gguf_block<Format::kGgufMxfp4>(row, k, at);
      c.scale = decode_e8m0(b[0]);
      low = b + 1 + at % 16;
      shift = at / 16 * 4;
      break;
    }
    case Format::kQ4_K:
    case Format::kQ5_K: {
      const bool five = format == Format::kQ5_K;
      const uint8_t* const b = five ? gguf_block<Format::kQ5_K>(row, k, at) : gguf_block<Format::kQ4_K>(row, k, at);
      int scale = 0, min = 0;
      k_scale_min(b + 4, at / 32, scale, min);
      c.scale = half_of(b) * float(scale);
      c.minus = half_of(b + 2) * float(min);
      low = b + (five ? 48 : 16) + at / 64 * 32 + at % 32;
      shift = at / 32 % 2 * 4;
      if (!five) break;
      high = b + 16 + at % 32;  // bit j of byte i: of element i of the j-th 32
      high_shift = at / 32;
      high_mask = 1;
      break;
    }
    default: {  // q6_k: of 128 elements the low four bits are in 64 bytes, the high two in 32
      const uint8_t* const b = gguf_block<Format::kQ6_K>(row, k, at);
      const int half = at / 128, quarter = at % 128 / 32;
      c.scale = half_of(b + 208) * float(static_cast<int8_t>(b[192 + at / 16]));
      c.offset = 32;
      low = b + half * 64 + quarter % 2 * 32 + at % 32;
      shift = quarter / 2 * 4;
      high = b + 128 + half * 32 + at % 32;
      high_shift = 2 * quarter;
      high_mask = 3;
    }
  }
  const int mask = format == Format::kQ8_0 ? 255 : 15;
#pragma unroll
  for (int e = 0; e < kWide; ++e) {
    uint32_t code = uint32_t(low[e] >> shift & mask);
    if (high) code |= uint32_t(high[e] >> high_shift & high_mask) << 4;
    if (format == Format::kGgufMxfp4) c.words[0] |= code << (4 * e);
    else c.words[e / 4] |= code << (e % 4 * 8);
  }
}

// The first `count` (not above 0: none) of the row's elements from k on, a multiple of kWide; they have one scale.
template <int kWide>
FFN_FN CodedChunk<kWide> read_chunk(const CodedWeight& w, const CodedRow& row, int64_t k, int count) {
  CodedChunk<kWide> c{{0, 0}, count, 0, 0, 0};
  if (count <= 0) return c;
  const Format format = w.first.format;
  if (!row.scales) {
    read_gguf(format, row.data, k, c);
    return c;
  }
  const CodeKind kind = code_kind(format);
  if (kind == CodeKind::kFp4 || kind == CodeKind::kNibble)
    read_codes<kWide / 2>(row.data + k / 2, (count + 1) / 2, w.whole_words, c.words);
  else read_codes<kWide>(row.data + k, count, w.whole_words, c.words);
  if (format == Format::kInt4) c.offset = 8;
  const int64_t group = block_of(k, w.col_shift, w.first.block_cols);
  c.scale = scale_of_group(w, row, group);
  if (row.zeros) c.offset = zero_of_group(row, group);
  return c;
}

// The numbers of a chunk; behind its end zeros.
template <int kWide>
FFN_FN void decode_chunk(Format format, const CodedChunk<kWide>& c, float (&values)[kWide]) {
  const CodeKind kind = code_kind(format);
  const bool nibbles = kind == CodeKind::kFp4 || kind == CodeKind::kNibble;
  uint32_t codes[kWide];
#pragma unroll
  for (int i = 0; i < kWide; ++i) codes[i] = nibbles ? c.words[0] >> (4 * i) & 15 : c.words[i / 4] >> (i % 4 * 8) & 255;
  if (kind == CodeKind::kFp4 || kind == CodeKind::kE4M3) {
    // The magnitude as exponent and mantissa of a float, whose exponent has another bias.
    const bool fp4 = kind == CodeKind::kFp4;
    const uint32_t sign = fp4 ? 8 : 128;
    const float bias = fp4 ? 0x1p126f : 0x1p120f;
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      const uint32_t magnitude = codes[i] & (sign - 1);
      const float value = __builtin_bit_cast(float, magnitude << (fp4 ? 22 : 20)) * bias;
      values[i] = magnitude == 127 ? __builtin_bit_cast(float, 0x7fc00000u) : codes[i] & sign ? -value : value;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWide; ++i) values[i] = float(int(static_cast<int8_t>(codes[i])) - c.offset);
  }
#pragma unroll
  for (int i = 0; i < kWide; ++i) values[i] = i < c.count ? values[i] * c.scale - c.minus : 0.0f;
}

// A thread writes a chunk of the weight.
template <class S>
__global__ void FFN_KERNEL_BOUNDS(kDequantizeThreads, 2) dequantize_kernel(Dequantize d) {
  constexpr int kWide = kCodesAtOnce;
  const CodedWeight& w = d.w;
  const int64_t chunks = (w.K + kWide - 1) / kWide;
  const int64_t thread = int64_t(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  const int64_t row = thread / chunks, k = thread % chunks * kWide;
  if (row >= w.E * w.N) return;
  const int count = w.K - k < kWide ? int(w.K - k) : kWide;
  const CodedRow coded = coded_row(w, row / w.N, row % w.N);
  float values[kWide];
  decode_chunk(w.first.format, read_chunk<kWide>(w, coded, k, count), values);
  store_pack(static_cast<S*>(d.out) + row * w.K + k, Pack<S, kWide>::of(values), count,
             w.K * int64_t{sizeof(S)} % 16 == 0);
}

}  // namespace ffn_ops::cuda
