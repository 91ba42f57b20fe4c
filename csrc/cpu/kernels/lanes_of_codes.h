// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: codes of W rows as vectors along the rows, step by step of k, for products of a few
// rows and for packing. Codes move into lanes as words of four bytes, which costs a fraction of moving floats, and
// become float32 there. Formats and shapes that no reader is for are decoded by codes.h.

// How a value comes from its code: code * scale, (code - zero) * scale or code * scale - minimum; or code * scale by an
// addition to exponents.
enum class Affine { kScale, kZero, kMinimum, kExponent };

// W rows of a quantised matrix from lane0 on, of which the last is repeated where there are fewer, and where their sums
// go. The rows that are read after these lie `step` behind them.
struct CodeLanes {
  const Matrix* matrix;
  int64_t lane0, valid;
  float* tile;
  int64_t step;
};

FFN_FN int64_t columns_of_group(const Codes& c) {
  return c.scales ? c.block_cols : c.format == Format::kQ6_K ? 16 : 32;
}

FFN_FN int64_t scale_bytes(const Codes& c) {
  return c.scale_type == ScaleType::kFloat32                                    ? 4
         : c.scale_type == ScaleType::kE8M0 || c.scale_type == ScaleType::kE4M3 ? 1
                                                                                : 2;
}

// n scales from `at` on in a tensor of them; the other lanes are undefined.
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
    scales = c.scale_type == ScaleType::kE4M3 ? e4m3_lanes(from) : e8m0_lanes(byte_lanes(from));
  }
  return c.format == Format::kNvfp4 ? scales * c.factor : scales;
}

FFN_FN FloatLanes zero_lanes_at(const uint8_t* row, int64_t group, int64_t n) {
  constexpr int64_t W = Vec<float>::kLanes;
  uint8_t bytes[W] = {};
  __builtin_memcpy(bytes, row + group / 2, static_cast<size_t>((n + 1) / 2));
  return to_float_lanes(nibble_lanes(bytes) & 15u);
}

// Scales of n groups of a row of GGUF blocks from `group`, a multiple of W, on, and their minima where there are any.
template <Format kFormat>
FFN_FN void gguf_scales(const uint8_t* row, int64_t group, int64_t n, Vec<float>& scales, Vec<float>& minima) {
  using V = Vec<float>;
  constexpr int64_t W = V::kLanes, kBlock = info_of(kFormat).block, kBytes = info_of(kFormat).block_bytes;
  constexpr int64_t kGroups = kFormat == Format::kQ6_K ? 16 : kBlock / 32;  // of a block
  uint16_t halves[2][W] = {};
  uint8_t bytes[2][W + 8] = {};
  for (int64_t i = 0; i < n; i += kGroups) {
    const uint8_t* b = row + (group + i) / kGroups * kBytes;
    if constexpr (kFormat == Format::kGgufMxfp4) {
      bytes[0][i] = b[0];
    } else if constexpr (kGroups == 1) {
      __builtin_memcpy(&halves[0][i], b, 2);
    } else {
      const int64_t from = group % kGroups, together = kGroups < W ? kGroups : W;
      for (int64_t j = 0; j < together; ++j) {
        __builtin_memcpy(&halves[0][i + j], b + (kFormat == Format::kQ6_K ? 208 : 0), 2);
        if constexpr (kGroups == 8) __builtin_memcpy(&halves[1][i + j], b + 2, 2);
      }
      if constexpr (kFormat == Format::kQ6_K) {
        __builtin_memcpy(bytes[0] + i, b + 192 + from, together);
      } else {  // k_scale_min, four at a time
        uint32_t packed[3], each[2][2];
        __builtin_memcpy(packed, b + 4, 12);
        for (int j = 0; j < 2; ++j) {
          each[j][0] = packed[j] & 0x3f3f3f3fu;
          each[j][1] = ((packed[2] >> (4 * j)) & 0x0f0f0f0fu) | (((packed[j] >> 6) & 0x03030303u) << 4);
          uint8_t eight[8];
          __builtin_memcpy(eight, each[j], 8);
          __builtin_memcpy(bytes[j] + i, eight + from, together);
        }
      }
    }
  }
  const auto half = [&](int i)
                        __attribute__((always_inline)) { return load<V>(reinterpret_cast<const Half*>(halves[i])); };
  const auto integer = [&](int i) __attribute__((always_inline)) {
    return V(__builtin_convertvector((Int32Lanes)(byte_lanes(bytes[i]) << 24) >> 24, FloatLanes));
  };
  if constexpr (kFormat == Format::kGgufMxfp4) scales = V(e8m0_lanes(byte_lanes(bytes[0])));
  else scales = kGroups == 1 ? half(0) : half(0) * integer(0);
  if constexpr (kGroups == 8) minima = half(1) * integer(1);
}

#include "code_readers.h"

// Rows of one CodeLanes and the scales of W groups of them.
template <class Layout>
struct ScaledRows {
  static constexpr Affine kAffine = Layout::kAffine;
  static constexpr int64_t W = Vec<float>::kLanes;

  const uint8_t* row[W];
  int64_t block_row[W];
  int64_t ahead, scales_ahead;      // bytes from a row, and its scales, to those that are read after these rows
  alignas(64) float scales[W * W];  // [group][row]
  alignas(64) float offsets[kAffine == Affine::kZero || kAffine == Affine::kMinimum ? W * W : 1];
  Uint32Lanes exponents[4];  // kExponent: bytes of four groups in each lane
  Uint32Lanes unfit{};       // not 0: a scale does not fit the reader

  FFN_FN void begin(const CodeLanes& lanes) {
    const Matrix& m = *lanes.matrix;
    const Codes& c = *m.codes;
    for (int64_t i = 0; i < W; ++i) {
      const int64_t index = m.first_row + (lanes.lane0 + (i < lanes.valid ? i : lanes.valid - 1)) * m.row_stride;
      row[i] = c.data + index * c.row_bytes;
      block_row[i] = c.scales ? index / c.block_rows : 0;
    }
    ahead = lanes.step * m.row_stride * c.row_bytes;
    scales_ahead = c.scales ? lanes.step * m.row_stride / c.block_rows * c.scale_row * scale_bytes(c) : 0;
  }
  FFN_FN void load_groups(const Codes& c, int64_t group, int64_t groups) {
    const int64_t n = groups - group < W ? groups - group : W;
    if (c.scales) {
      const int64_t bytes = scale_bytes(c);
      const char* from = static_cast<const char*>(c.scales) + (block_row[0] * c.scale_row + W * group) * bytes;
      for (int64_t at = 0; at < W * n * bytes; at += 64) prefetch_l2(from + scales_ahead + at);
    }
    if constexpr (kAffine == Affine::kExponent) load_exponents(c, group, n);
    else load_scales(c, group, n);
  }
  FFN_FN void load_exponents(const Codes& c, int64_t group, int64_t n) {
    uint8_t copied[W][16];
    const uint8_t* from[W];
    for (int64_t i = 0; i < W; ++i) {
      from[i] = copied[i];
      if constexpr (Layout::kInBlocks) {
        __builtin_memset(copied[i], kPlainExponent, 16);
        for (int64_t j = 0; j < n; ++j) copied[i][j] = row[i][(group + j) * info_of(Layout::kFormat).block_bytes];
      } else {
        const uint8_t* at = static_cast<const uint8_t*>(c.scales) + block_row[i] * c.scale_row + group;
        if (n == 16) {
          from[i] = at;
        } else {
          __builtin_memset(copied[i], kPlainExponent, 16);
          __builtin_memcpy(copied[i], at, static_cast<size_t>(n));
        }
      }
    }
    transpose_words(from, 0, exponents);
    for (const Uint32Lanes w : exponents) unfit |= (Uint32Lanes)((Uint8Lanes)w - uint8_t{2} > uint8_t{225});
  }
  FFN_FN void load_scales(const Codes& c, int64_t group, int64_t n) {
    using V = Vec<float>;
    V block[W], second[W];
    const bool plain = c.scale_type == ScaleType::kFloat32;
    for (int64_t i = 0; i < W && plain && !Layout::kInBlocks; ++i)
      block[i] = load_part<V>(static_cast<const float*>(c.scales) + block_row[i] * c.scale_row + group, n);
    for (int64_t i = 0; i < W; ++i) {
      if constexpr (!Layout::kInBlocks) {
        if (!plain) block[i].reg = scale_lanes_at(c, block_row[i] * c.scale_row + group, n);
        if constexpr (kAffine == Affine::kZero)
          second[i].reg = zero_lanes_at(c.zeros + block_row[i] * c.zero_row_bytes, group, n);
      } else {
        gguf_scales<Layout::kFormat>(row[i], group, n, block[i], second[i]);
      }
    }
    transpose(block);
    constexpr float kFactor = Layout::Read::kFactor;
    for (int64_t i = 0; i < W; ++i) {
      const V scaled = block[i] * V(kFactor);
      if (i < n) unfit |= (Uint32Lanes)((scaled * V(1 / kFactor)).reg != block[i].reg);
      store(scales + i * W, scaled);
    }
    if constexpr (kAffine != Affine::kScale) {
      transpose(second);
      for (int64_t i = 0; i < W; ++i) store(offsets + i * W, second[i]);
    }
  }
  // In both halves of a lane, as NibblePairs takes them: 2^(byte - 127 - 100) is that of bfloat16.
  FFN_FN Uint32Lanes exponent_pairs(int64_t group) const {
    const int64_t in_groups = group % W;
    const Uint32Lanes less = ((exponents[in_groups / 4] >> static_cast<uint32_t>(in_groups % 4 * 8)) & 255u) - 227u;
    return (less << 23) | ((less << 7) & 0xffffu);
  }
  FFN_FN bool fit() const {
    uint32_t any = 0;
    for (int64_t i = 0; i < W; ++i) any |= unfit[i];
    return any == 0;
  }

 private:
  static constexpr int kPlainExponent = 127;
};

// What reads a format: `Reader` of codes, or a part of one.
template <Format kFormat_, class Reader, Affine kAffine_ = Affine::kScale>
struct CodeLayout {
  using Read = Reader;
  static constexpr Format kFormat = kFormat_;
  static constexpr bool kInBlocks = info_of(kFormat_).tensors == 1;  // scales, with their codes
  static constexpr Affine kAffine = kAffine_;
};

// Calls f(layout) where a reader is for rows of K such codes.
template <class F>
FFN_FN bool with_layout(const Codes& c, int64_t K, const F& f) {
  // Scales of whole units: the group's end is a multiple of a unit, or the row's.
  const auto whole = [&](int64_t unit) { return K % unit == 0 && (c.block_cols % unit == 0 || c.block_cols >= K); };
  const auto read = [&](bool fits, auto layout) {
    if (fits) f(layout);
    return fits;
  };
  constexpr Affine kPowers = kAddsExponents ? Affine::kExponent : Affine::kScale;  // of two
  switch (c.format) {
    case Format::kMxfp4:
      if (c.scale_type == ScaleType::kE8M0)
        return read(whole(32), CodeLayout<Format::kMxfp4, ReadNibbles<true, kAddsExponents>, kPowers>{});
      return read(whole(32), CodeLayout<Format::kMxfp4, ReadNibbles<true, false>>{});
    case Format::kNvfp4:
      return read(K % 32 == 0 && c.block_cols == 16, CodeLayout<Format::kNvfp4, ReadNibbles<true, false>>{});
    case Format::kInt4:
      return read(whole(32), CodeLayout<Format::kInt4, ReadNibbles<false, false>>{});
    case Format::kUint4:
      return read(whole(32), CodeLayout<Format::kUint4, ReadNibbles<false, false>, Affine::kZero>{});
    case Format::kInt8:
      return read(whole(16), CodeLayout<Format::kInt8, ReadInt8>{});
    case Format::kFp8:
      return read(whole(16), CodeLayout<Format::kFp8, ReadFp8>{});
    case Format::kQ8_0:
      return read(true, CodeLayout<Format::kQ8_0, ReadQ80>{});
    case Format::kQ4_0:
      return read(true, CodeLayout<Format::kQ4_0, ReadBlocks4<false, false>>{});
    case Format::kGgufMxfp4:
      return read(true, CodeLayout<Format::kGgufMxfp4, ReadBlocks4<true, kAddsExponents>, kPowers>{});
    case Format::kQ4_K:
      return read(true, CodeLayout<Format::kQ4_K, ReadQ4K<false>, Affine::kMinimum>{});
    case Format::kQ5_K:
      return read(true, CodeLayout<Format::kQ5_K, ReadQ4K<true>, Affine::kMinimum>{});
    case Format::kQ6_K:
      return read(true, CodeLayout<Format::kQ6_K, ReadQ6K>{});
  }
  return false;
}

// Calls f(k, vectors of R times W rows) for each k of [begin, end), which are whole words of rows of K, or whole units
// of blocks, and after(next k) behind each part of a unit. False where a code or a scale has no value that the reader
// knows: nothing that f did may be used then.
template <class Layout, int R, class F, class After>
FFN_FN bool for_each_code(const CodeLanes* lanes, int64_t K, int64_t begin, int64_t end, const F& f,
                          const After& after) {
  using V = Vec<float>;
  using Read = typename Layout::Read;
  constexpr Affine kAffine = Layout::kAffine;
  constexpr int64_t W = V::kLanes, kUnit = Read::kUnit;
  constexpr int kSteps = Read::kUnit / Read::kParts;
  const Codes& c = *lanes[0].matrix->codes;
  const int64_t columns = columns_of_group(c), groups = divide_up(K, columns);
  ScaledRows<Layout> rows[R];
  int64_t group = begin / columns, group_end = (group + 1) * columns;  // of the part at hand, and where it ends
  [[maybe_unused]] Uint32Lanes exponents[R];
  const auto load_group = [&](bool first = false) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      if (first) rows[r].begin(lanes[r]);
      if (first || group % W == 0) rows[r].load_groups(*lanes[r].matrix->codes, group / W * W, groups);
      if constexpr (kAffine == Affine::kExponent) exponents[r] = rows[r].exponent_pairs(group);
    }
  };
  load_group(true);
  Read read(c);
  constexpr int64_t kLine = 64 / Read::kBytes, kAsked = W > kLine ? W / kLine : 1;  // units of a line; rows
  for (int64_t k = begin; k < end; k += kUnit) {
    const int64_t at = read.offset(k);
    const int parts = end - k < kUnit ? static_cast<int>((end - k) / kSteps) : Read::kParts;
    typename Read::Unit units[R];
    FFN_UNROLL
    for (int r = 0; r < R; ++r) read.load(rows[r].row, at, parts, units[r]);
    // A line of each row is asked for once, evenly: many at once would wait for each other.
    const int64_t later = at + kStreamBytes, turn = (k - begin) / kUnit * kAsked % W;
    int64_t asked = 0;
#pragma GCC unroll 1
    for (int part = 0; part < parts; ++part) {
      for (; asked * parts < (part + 1) * kAsked; ++asked) {
        FFN_UNROLL
        for (int r = 0; r < R; ++r)
          prefetch(rows[r].row[turn + asked] + later + (later < c.row_bytes ? 0 : rows[r].ahead - c.row_bytes));
      }
      const int64_t k_part = k + part * kSteps;
      if (k_part == group_end) {
        ++group;
        group_end += columns;
        load_group();
      }
      V scales[R], offsets[R];
      decltype(read.word(units[0], 0)) words[R];
      FFN_UNROLL
      for (int r = 0; r < R; ++r) {
        words[r] = read.word(units[r], part);
        if constexpr (kAffine == Affine::kExponent) {
          words[r] = Read::Nibbles::scaled(words[r], exponents[r]);
        } else {
          scales[r] = load<V>(rows[r].scales + group % W * W);
          if constexpr (kAffine != Affine::kScale) offsets[r] = load<V>(rows[r].offsets + group % W * W);
        }
      }
      FFN_UNROLL
      for (int e = 0; e < kSteps; ++e) {
        V b[R];
        FFN_UNROLL
        for (int r = 0; r < R; ++r) {
          b[r] = V(read.value(words[r], e));
          if constexpr (kAffine == Affine::kZero) b[r] = b[r] - offsets[r];
          if constexpr (kAffine != Affine::kExponent) b[r] = b[r] * scales[r];
          if constexpr (kAffine == Affine::kMinimum) b[r] = b[r] - offsets[r];
        }
        f(k_part + e, b);
      }
      after(k_part + kSteps);
    }
  }
  bool ok = read.ok();
  for (int r = 0; r < R; ++r) ok = ok && rows[r].fit();
  return ok;
}
