// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: stream.h's products of a few rows on quantised weights. Where the format allows it,
// codes move into lanes of rows as words of four bytes, which costs a fraction of moving floats, and become float32
// there.

// n scales from `at` on, the rest of the lanes is of no meaning.
FFN_FN FloatLanes scale_lanes_at(const Codes& c, int64_t at, int64_t n) {
  using V = Vec<float>;
  constexpr int64_t W = V::kLanes;
  FloatLanes scales;
  if (c.scale_type == ScaleType::kFloat32) {
    scales = load_part<V>(static_cast<const float*>(c.scales) + at, n).reg;
  } else if (c.scale_type == ScaleType::kFloat16) {
    scales = load_part<V>(static_cast<const Half*>(c.scales) + at, n).reg;
  } else if (c.scale_type == ScaleType::kBFloat16) {
    scales = load_part<V>(static_cast<const BFloat16*>(c.scales) + at, n).reg;
  } else {
    const uint8_t* from = static_cast<const uint8_t*>(c.scales) + at;
    uint8_t last[W] = {};
    if (n < W) {
      __builtin_memcpy(last, from, static_cast<size_t>(n));
      from = last;
    }
    if (c.scale_type == ScaleType::kE4M3) {
      scales = e4m3_lanes(from);
    } else {
      const Uint32Lanes bits = byte_lanes(from);
      const Uint32Lanes lowest = Uint32Lanes{} + 0x00400000u, nan = Uint32Lanes{} + 0x7fc00000u;
      scales = (FloatLanes)(bits == 0u ? lowest : bits == 255u ? nan : bits << 23);
    }
  }
  return c.format == Format::kNvfp4 ? scales * c.factor : scales;
}

FFN_FN FloatLanes zero_lanes_at(const uint8_t* row, int64_t group, int64_t n) {
  constexpr int64_t W = Vec<float>::kLanes;
  uint8_t bytes[W] = {};
  __builtin_memcpy(bytes, row + group / 2, static_cast<size_t>((n + 1) / 2));
  return to_float_lanes(nibble_lanes(bytes) & 15u);
}

// Codes of W rows from element k on, as vectors along the rows for one k after the other: calls f(k, vector) for kUnit
// of them, without scales.
template <bool kFp4>
struct ReadNibbles {
  static constexpr int64_t kUnit = 32, kPerByte = 2;
  WordTable table;
  FFN_FN explicit ReadNibbles(const Codes& c)
      : table(word_table(kFp4                        ? kTwiceFp4
                         : c.format == Format::kInt4 ? kMinus8
                                                     : kPlain)) {}
  template <class F>
  FFN_FN void operator()(const uint8_t* const* rows, int64_t k, const F& f) const {
    Uint32Lanes words[4];
    transpose_words(rows, k / 2, words);
    FFN_UNROLL
    for (int d = 0; d < 4; ++d) {
      FloatLanes values[8];
      word_nibbles(table, words[d], values);
      FFN_UNROLL
      for (int e = 0; e < 8; ++e) f(k + 8 * d + e, values[e]);
    }
  }
};

struct ReadInt8 {
  static constexpr int64_t kUnit = 16, kPerByte = 1;
  FFN_FN explicit ReadInt8(const Codes&) {}
  template <class F>
  FFN_FN void operator()(const uint8_t* const* rows, int64_t k, const F& f) const {
    Uint32Lanes words[4];
    transpose_words(rows, k, words);
    FFN_UNROLL
    for (int d = 0; d < 4; ++d) {
      FFN_UNROLL
      for (int e = 0; e < 4; ++e)
        f(k + 4 * d + e, __builtin_convertvector((Int32Lanes)(words[d] << (24 - 8 * e)) >> 24, FloatLanes));
    }
  }
};

struct ReadFp8 {
  static constexpr int64_t kUnit = Vec<float>::kLanes, kPerByte = 1;
  FFN_FN explicit ReadFp8(const Codes&) {}
  template <class F>
  FFN_FN void operator()(const uint8_t* const* rows, int64_t k, const F& f) const {
    Vec<float> block[kUnit];
    FFN_UNROLL
    for (int64_t i = 0; i < kUnit; ++i) block[i].reg = e4m3_lanes(rows[i] + k);
    transpose(block);
    FFN_UNROLL
    for (int64_t i = 0; i < kUnit; ++i) f(k + i, block[i].reg);
  }
};

// dot_kernel of codes whose scales belong to whole units, or half ones (kHalves).
template <class V, int H, class Read, bool kHalves, bool kZeros>
void dot_words_kernel(const Matrix& m, int64_t lane0, int64_t valid, int64_t K, const float* a, float* tile,
                      const float*) {
  constexpr int64_t W = V::kLanes, kUnit = Read::kUnit;
  constexpr int64_t kAhead = kStreamBytes;
  const Codes& c = *m.codes;
  const int64_t groups = divide_up(K, c.block_cols);
  const uint8_t* row[W];
  int64_t index[W];
  for (int64_t i = 0; i < W; ++i) {
    index[i] = m.first_row + (lane0 + (i < valid ? i : valid - 1)) * m.row_stride;
    row[i] = c.data + index[i] * c.row_bytes;
  }
  const Read read(c);
  const float twice = c.format == Format::kMxfp4 || c.format == Format::kNvfp4 ? 0.5f : 1.0f;
  alignas(64) float scales[W * W];  // [group][row]
  alignas(64) float zeros[W * W];
  const auto load_groups = [&](int64_t g) __attribute__((always_inline)) {
    const int64_t n = groups - g < W ? groups - g : W;
    V block[W];
    for (int64_t i = 0; i < W; ++i)
      block[i].reg = scale_lanes_at(c, index[i] / c.block_rows * c.scale_row + g, n) * twice;
    transpose(block);
    for (int64_t i = 0; i < W; ++i) store(scales + i * W, block[i]);
    if constexpr (kZeros) {
      for (int64_t i = 0; i < W; ++i)
        block[i].reg = zero_lanes_at(c.zeros + index[i] / c.block_rows * c.zero_row_bytes, g, n);
      transpose(block);
      for (int64_t i = 0; i < W; ++i) store(zeros + i * W, block[i]);
    }
  };
  V total[H], acc[H];
  FFN_UNROLL
  for (int t = 0; t < H; ++t) total[t] = acc[t] = V::zero();
  int64_t group = 0, group_end = kHalves ? kUnit : c.block_cols;  // of the unit at hand
  load_groups(0);
  for (int64_t k = 0; k < K; k += kUnit) {
    if (k == group_end) {
      group += kHalves ? 2 : 1;
      group_end += kHalves ? kUnit : c.block_cols;
      if (group % W == 0) load_groups(group);
    }
    const int64_t at = k / Read::kPerByte;
    if (at % 64 == 0) {
      FFN_UNROLL
      for (int64_t i = 0; i < W; ++i) prefetch(row[i] + at + kAhead);
    }
    V s = load<V>(scales + group % W * W), z = V::zero();
    if constexpr (kZeros) z = load<V>(zeros + group % W * W);
    read(row, k, [&](int64_t at_k, FloatLanes code) __attribute__((always_inline)) {
      if constexpr (kHalves) {
        if (at_k == k + kUnit / 2) s = load<V>(scales + (group + 1) % W * W);
      }
      V b(code);
      if constexpr (kZeros) b = b - z;
      b = b * s;
      FFN_UNROLL
      for (int t = 0; t < H; ++t) acc[t] = fma(V(a[at_k * H + t]), b, acc[t]);
    });
    if ((k + kUnit) % kSumBlock == 0 || k + kUnit >= K) {
      FFN_UNROLL
      for (int t = 0; t < H; ++t) {
        total[t] = k < kSumBlock ? acc[t] : total[t] + acc[t];
        acc[t] = V::zero();
      }
    }
  }
  FFN_UNROLL
  for (int t = 0; t < H; ++t) store(tile + t * kNRVectors * W, total[t]);
}

// dot_kernel of any codes: rows are decoded a piece at a time.
template <class V, int H>
void dot_codes_kernel(const Matrix& m, int64_t lane0, int64_t valid, int64_t K, const float* a, float* tile,
                      const float*) {
  constexpr int64_t W = V::kLanes, kStride = kDecodeAtOnce + 16;
  alignas(64) float rows[W * kStride];
  V total[H];
  FFN_UNROLL
  for (int t = 0; t < H; ++t) total[t] = V::zero();
  for (int64_t piece = 0; piece < K; piece += kDecodeAtOnce) {
    const int64_t decoded = K - piece < kDecodeAtOnce ? K - piece : kDecodeAtOnce;
    for (int64_t i = 0; i < valid; ++i) decode_row(m, lane0 + i, piece, decoded, rows + i * kStride);
    for (int64_t c = 0; c < decoded; c += kSumBlock) {
      const int64_t length = decoded - c < kSumBlock ? decoded - c : kSumBlock;
      V acc[H];
      FFN_UNROLL
      for (int t = 0; t < H; ++t) acc[t] = V::zero();
      for (int64_t k = 0; k < length; k += W) {
        V block[W];
        FFN_UNROLL
        for (int64_t i = 0; i < W; ++i) block[i] = load<V>(rows + (i < valid ? i : 0) * kStride + c + k);
        transpose(block);
        multiply_block<H>(a + (piece + c + k) * H, block, length - k < W ? length - k : W, acc);
      }
      FFN_UNROLL
      for (int t = 0; t < H; ++t) total[t] = piece + c == 0 ? acc[t] : total[t] + acc[t];
    }
  }
  FFN_UNROLL
  for (int t = 0; t < H; ++t) store(tile + t * kNRVectors * W, total[t]);
}

using DotCodes = void (*)(const Matrix&, int64_t, int64_t, int64_t, const float*, float*, const float*);

template <int H>
FFN_FN DotCodes dot_of_codes(const Codes& c, int64_t K) {
  using V = Vec<float>;
  // Scales of whole units: the group's end is a multiple of a unit, or the row's.
  const auto whole = [&](int64_t unit) { return K % unit == 0 && (c.block_cols % unit == 0 || c.block_cols >= K); };
  switch (c.format) {
    case Format::kMxfp4:
      if (whole(32)) return &dot_words_kernel<V, H, ReadNibbles<true>, false, false>;
      break;
    case Format::kNvfp4:
      if (K % 32 == 0 && c.block_cols == 16) return &dot_words_kernel<V, H, ReadNibbles<true>, true, false>;
      break;
    case Format::kInt4:
      if (whole(32)) return &dot_words_kernel<V, H, ReadNibbles<false>, false, false>;
      break;
    case Format::kUint4:
      if (whole(32)) return &dot_words_kernel<V, H, ReadNibbles<false>, false, true>;
      break;
    case Format::kInt8:
      if (whole(16)) return &dot_words_kernel<V, H, ReadInt8, false, false>;
      break;
    case Format::kFp8:
      if (whole(V::kLanes)) return &dot_words_kernel<V, H, ReadFp8, false, false>;
      break;
    default:
      break;
  }
  return &dot_codes_kernel<V, H>;
}

// broadcast_panel of a quantised matrix.
template <class V, int N>
void broadcast_codes_panel(const Matrix& m, int64_t first, int64_t count, int64_t K, const float* x, float* dots,
                           float* copied, const float*) {
  constexpr int kHalfTile = kNRVectors / 2 * V::kLanes;
  constexpr int kRows = (kHalfTile < 16 ? kHalfTile : 16) / (N == 3 ? 4 : N), R = kRows > 0 ? kRows : 1;
  constexpr int64_t W = V::kLanes;
  for (int64_t r = 0; r < count; r += R) {
    const int64_t rows = count - r < R ? count - r : R;
    for (int64_t begin = 0; begin < K; begin += kSumBlock) {
      const int64_t n = K - begin < kSumBlock ? K - begin : kSumBlock;
      for (int64_t i = 0; i < rows; ++i) decode_row(m, first + r + i, begin, n, copied + i * kSumBlock);
      const float* at = x + begin * N * W;
      if (rows == R) {
        broadcast_kernel<V, float, R, N>(copied, n, at, dots + r * N * W, begin > 0, at, 0);
      } else {
        for (int64_t i = 0; i < rows; ++i)
          broadcast_kernel<V, float, 1, N>(copied + i * kSumBlock, n, at, dots + (r + i) * N * W, begin > 0, at, 0);
      }
    }
  }
}
