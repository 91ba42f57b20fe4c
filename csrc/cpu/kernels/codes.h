// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: codes of quantised weights become float32, a piece of a row at a time, in scratch that
// stays in L1. Every value is rounded as `dequantize` says: the same bits wherever it is read.

constexpr int64_t kDecodeAtOnce = 256;  // of a row, where rows are decoded side by side

// Whether both have the same layout of scales, so that one call of a kernel may read both.
FFN_FN bool same_blocks(const Codes& a, const Codes& b) {
  return a.block_rows == b.block_rows && a.block_cols == b.block_cols && a.scale_type == b.scale_type;
}

FFN_FN float scale_at(const Codes& c, int64_t at) {
  float scale = 0;
  switch (c.scale_type) {
    case ScaleType::kFloat32:
      scale = static_cast<const float*>(c.scales)[at];
      break;
    case ScaleType::kFloat16:
      scale = Codec<Half>::decode(static_cast<const Half*>(c.scales)[at]);
      break;
    case ScaleType::kBFloat16:
      scale = Codec<BFloat16>::decode(static_cast<const BFloat16*>(c.scales)[at]);
      break;
    case ScaleType::kE8M0:
      scale = decode_e8m0(static_cast<const uint8_t*>(c.scales)[at]);
      break;
    case ScaleType::kE4M3:
      scale = decode_e4m3(static_cast<const uint8_t*>(c.scales)[at]);
      break;
  }
  return c.format == Format::kNvfp4 ? scale * c.factor : scale;
}

// Lanes of `f(bytes)` for n elements, `per_byte` of them in a byte. The last bytes are copied, so that nothing behind
// them is read; whole vectors are written.
template <int kPerByte, class F>
FFN_FN void decode_bytes(const uint8_t* from, int64_t n, float* out, const F& f) {
  constexpr int64_t W = Vec<float>::kLanes;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, Vec<float>(f(from + i / kPerByte, i)));
  if (i < n) {
    uint8_t last[W] = {};
    __builtin_memcpy(last, from + i / kPerByte, static_cast<size_t>((n - i + kPerByte - 1) / kPerByte));
    store(out + i, Vec<float>(f(last, i)));
  }
}

alignas(64) constexpr float kFp4Values[16] = {0,     0.5f,  1,     1.5f,  2,     3,     4,     6,
                                              -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
alignas(64) constexpr float kNibbleValues[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) constexpr float kOffset8Values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

constexpr int8_t kTwiceFp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int8_t kMinus8[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr int8_t kPlain[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

FFN_FN FloatLanes to_float_lanes(Uint32Lanes v) { return __builtin_convertvector((Int32Lanes)v, FloatLanes); }

// n elements with one scale, from element k of the row on.
template <class Values>
FFN_FN void decode_nibbles(const uint8_t* row, int64_t k, int64_t n, const Values& values, float scale, float* out) {
  if (k % 2 != 0 && n > 0) {  // in the middle of a byte
    *out++ = values.at(row[k / 2] >> 4) * scale;
    ++k, --n;
  }
  const FloatLanes s = broadcast_lanes(scale);
  decode_bytes<2>(row + k / 2, n, out, [&](const uint8_t* p, int64_t) __attribute__((always_inline)) {
    return values.lanes(nibble_lanes(p)) * s;
  });
}

struct TableValues {
  const float* table;
  NibbleTable lookup;
  FFN_FN explicit TableValues(const float* values) : table(values), lookup(nibble_table(values)) {}
  FFN_FN float at(int nibble) const { return table[nibble]; }
  FFN_FN FloatLanes lanes(Uint32Lanes nibbles) const { return lookup_lanes(lookup, nibbles); }
};

struct MinusZero {
  float zero;
  FFN_FN float at(int nibble) const { return static_cast<float>(nibble) - zero; }
  FFN_FN FloatLanes lanes(Uint32Lanes nibbles) const { return to_float_lanes(nibbles & 15u) - broadcast_lanes(zero); }
};

FFN_FN FloatLanes e4m3_lanes(const uint8_t* p) {
  const FloatLanes v = e4m3_half_lanes(p) * 256.0f;  // the exponent of a half is 8 less
  const Uint32Lanes not_a_number = Uint32Lanes{} + 0x7fc00000u;
  return ((Uint32Lanes)v & 0x7fffffffu) == 0x43f00000u ? (FloatLanes)not_a_number : v;  // 480 has the bits of NaN
}

FFN_FN bool has_e4m3_nan(const uint8_t* p, int64_t n) {
  uint64_t any = 0;
  const auto next = [&any](const uint8_t* from, size_t bytes) __attribute__((always_inline)) {
    uint64_t eight = 0;
    __builtin_memcpy(&eight, from, bytes);
    any |= (eight & 0x7f7f7f7f7f7f7f7fu) + 0x0101010101010101u;  // 0x7f alone reaches the highest bit
  };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) next(p + i, 8);
  if (i < n) next(p + i, static_cast<size_t>(n - i));
  return (any & 0x8080808080808080u) != 0;
}

FFN_FN FloatLanes e8m0_lanes(Uint32Lanes bits) {
  const Uint32Lanes lowest = Uint32Lanes{} + 0x00400000u, nan = Uint32Lanes{} + 0x7fc00000u;
  return (FloatLanes)(bits == 0u ? lowest : bits == 255u ? nan : bits << 23);
}

// n elements from k on that have one scale.
FFN_FN void decode_run(const Codes& c, const uint8_t* row, int64_t n_row, int64_t k, int64_t n, float scale,
                       float* out) {
  const FloatLanes s = broadcast_lanes(scale);
  switch (c.format) {
    case Format::kMxfp4:
    case Format::kNvfp4:
      return decode_nibbles(row, k, n, TableValues(kFp4Values), scale, out);
    case Format::kInt4:
      return decode_nibbles(row, k, n, TableValues(kOffset8Values), scale, out);
    case Format::kUint4: {
      const int64_t g = k / c.block_cols;
      const int byte = c.zeros[n_row / c.block_rows * c.zero_row_bytes + g / 2];
      return decode_nibbles(row, k, n, MinusZero{static_cast<float>(g % 2 ? byte >> 4 : byte & 15)}, scale, out);
    }
    case Format::kFp8:
      if (__builtin_fabsf(scale) < 0x1p119f && !has_e4m3_nan(row + k, n)) {
        const FloatLanes larger = s * 256.0f;  // a power of two: exact, like the halves
        return decode_bytes<1>(row + k, n, out, [&](const uint8_t* p, int64_t) __attribute__((always_inline)) {
          return e4m3_half_lanes(p) * larger;
        });
      }
      return decode_bytes<1>(
          row + k, n, out, [&](const uint8_t* p, int64_t) __attribute__((always_inline)) { return e4m3_lanes(p) * s; });
    case Format::kInt8:
      return decode_bytes<1>(row + k, n, out, [&](const uint8_t* p, int64_t) __attribute__((always_inline)) {
        return __builtin_convertvector(signed_byte_lanes(p), FloatLanes) * s;
      });
    default:
      return;
  }
}

FFN_FN float half_at(const uint8_t* p) {
  Half h;
  __builtin_memcpy(&h, p, 2);
  return Codec<Half>::decode(h);
}

// n elements from k on, within a run of 16 (q6_k) or 32 of a GGUF block.
FFN_FN void decode_gguf_run(const Codes& c, const uint8_t* row, int64_t k, int64_t n, float* out) {
  const FormatInfo& info = info_of(c.format);
  const uint8_t* b = row + k / info.block * info.block_bytes;
  const int64_t in_block = k % info.block, i = in_block % 32;
  const bool high = in_block % 64 >= 32;
  const auto int_lanes = [](Uint32Lanes v) __attribute__((always_inline)) { return to_float_lanes(v); };
  switch (c.format) {
    case Format::kQ8_0: {
      const FloatLanes d = broadcast_lanes(half_at(b));
      return decode_bytes<1>(b + 2 + i, n, out, [&](const uint8_t* p, int64_t) __attribute__((always_inline)) {
        return d * __builtin_convertvector(signed_byte_lanes(p), FloatLanes);
      });
    }
    case Format::kQ4_0:
    case Format::kGgufMxfp4: {
      // The low nibbles are elements 0 .. 15, the high ones 16 .. 31.
      const bool fp4 = c.format == Format::kGgufMxfp4;
      const FloatLanes d = broadcast_lanes(fp4 ? decode_e8m0(b[0]) : half_at(b));
      const TableValues values(fp4 ? kFp4Values : kOffset8Values);
      const uint8_t* qs = b + (fp4 ? 1 : 2);
      for (int64_t at = i, end = i + n; at < end;) {
        const int64_t stop = at < 16 && end > 16 ? 16 : end;
        const int shift = at < 16 ? 0 : 4;
        decode_bytes<1>(qs + at % 16, stop - at, out + (at - i),
                        [&](const uint8_t* p, int64_t)
                            __attribute__((always_inline)) { return d * values.lanes(byte_lanes(p) >> shift); });
        at = stop;
      }
      return;
    }
    case Format::kQ4_K:
    case Format::kQ5_K: {
      int scale = 0, min = 0;
      k_scale_min(b + 4, in_block / 32, scale, min);
      const FloatLanes d = broadcast_lanes(half_at(b) * static_cast<float>(scale));
      const FloatLanes m = broadcast_lanes(half_at(b + 2) * static_cast<float>(min));
      const int shift = high ? 4 : 0;
      if (c.format == Format::kQ4_K)
        return decode_bytes<1>(b + 16 + in_block / 64 * 32 + i, n, out,
                               [&](const uint8_t* p, int64_t) __attribute__((always_inline)) {
                                 return d * int_lanes((byte_lanes(p) >> shift) & 15u) - m;
                               });
      // The fifth bits: bit j of byte i belongs to element i of sub-block j.
      uint8_t fifth[32 + Vec<float>::kLanes] = {};
      __builtin_memcpy(fifth, b + 16 + i, static_cast<size_t>(n));
      const int bit = static_cast<int>(in_block / 32);
      return decode_bytes<1>(b + 48 + in_block / 64 * 32 + i, n, out,
                             [&](const uint8_t* p, int64_t at) __attribute__((always_inline)) {
                               const Uint32Lanes h = (byte_lanes(fifth + at) >> bit) & 1u;
                               return d * int_lanes(((byte_lanes(p) >> shift) & 15u) | (h << 4)) - m;
                             });
    }
    case Format::kQ6_K: {
      // 128 elements at a time: four runs of 32, the low four bits in 64 bytes, the high two in 32.
      const int64_t half = in_block / 128, quarter = in_block % 128 / 32;
      const auto scale = static_cast<float>(static_cast<int8_t>(b[192 + in_block / 16]));
      const FloatLanes d = broadcast_lanes(half_at(b + 208) * scale);
      const int shift = quarter >= 2 ? 4 : 0, high_shift = static_cast<int>(2 * quarter);
      uint8_t top[32 + Vec<float>::kLanes] = {};
      __builtin_memcpy(top, b + 128 + half * 32 + i, static_cast<size_t>(n));
      return decode_bytes<1>(b + half * 64 + quarter % 2 * 32 + i, n, out,
                             [&](const uint8_t* p, int64_t at) __attribute__((always_inline)) {
                               const Uint32Lanes h = (byte_lanes(top + at) >> high_shift) & 3u;
                               const Uint32Lanes q = ((byte_lanes(p) >> shift) & 15u) | (h << 4);
                               return d * (int_lanes(q) - 32.0f);
                             });
    }
    default:
      return;
  }
}

// That have one scale.
FFN_FN int64_t columns_of_group(const Codes& c) {
  return c.scales ? c.block_cols : c.format == Format::kQ6_K ? 16 : 32;
}

// Elements [k, k + n) of a row into scratch that holds whole vectors behind them.
inline void decode_row(const Codes& c, int64_t n_row, int64_t k, int64_t n, float* out) {
  const uint8_t* row = c.data + n_row * c.row_bytes;
  if (c.scales) {
    const int64_t scale_row = n_row / c.block_rows * c.scale_row;
    while (n > 0) {
      const int64_t left = c.block_cols - k % c.block_cols, run = left < n ? left : n;
      decode_run(c, row, n_row, k, run, scale_at(c, scale_row + k / c.block_cols), out);
      k += run, out += run, n -= run;
    }
  } else {
    const int64_t of_one_scale = columns_of_group(c);
    while (n > 0) {
      const int64_t left = of_one_scale - k % of_one_scale, run = left < n ? left : n;
      decode_gguf_run(c, row, k, run, out);
      k += run, out += run, n -= run;
    }
  }
}

// Whether decode_row writes no further than the whole vectors that hold the n elements: a run of one scale that ends
// within a vector is written to the vector's end.
inline bool decodes_whole_vectors(const Codes& c, int64_t k, int64_t n) {
  constexpr int64_t W = Vec<float>::kLanes;
  const int64_t of_one_scale = columns_of_group(c);
  return k % of_one_scale + n <= of_one_scale || (of_one_scale % W == 0 && k % W == 0);
}

// Row r of a quantised matrix, from column k on.
FFN_FN void decode_row(const Matrix& m, int64_t r, int64_t k, int64_t n, float* out) {
  decode_row(*m.codes, m.first_row + r * m.row_stride, m.first_col + k, n, out);
}

// `dequantize`: rows [row0, row1) of codes, rounded to the storage dtype of `out`.
void dequantize(const Dequantize& d, int64_t row0, int64_t row1) {
  constexpr int64_t W = Vec<float>::kLanes;
  alignas(64) float piece[kDecodeAtOnce + W];
  dispatch_storage<float>(d.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    for (int64_t r = row0; r < row1; ++r) {
      S* to = static_cast<S*>(d.out) + r * d.cols;
      for (int64_t k = 0; k < d.cols; k += kDecodeAtOnce) {
        const int64_t n = d.cols - k < kDecodeAtOnce ? d.cols - k : kDecodeAtOnce;
        decode_row(*d.codes, r, k, n, piece);
        for (int64_t i = 0; i < n; i += W) store_part(to + k + i, load<Vec<float>>(piece + i), n - i < W ? n - i : W);
      }
    }
  });
}
