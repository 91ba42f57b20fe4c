// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: the rows that lanes_of_codes.h reads, and their scales as vectors along the rows.

// How a value comes from its code: code * scale, (code - zero) * scale or code * scale - minimum; or code * scale by an
// addition to exponents; or not at all, as sums are multiplied by scales that are powers of two.
enum class Affine { kScale, kZero, kMinimum, kExponent, kPower };

// W rows of a quantised matrix from lane0 on, of which the last is repeated where there are fewer, and where their sums
// go. The rows that are read after these lie `step` behind them.
struct CodeLanes {
  const Matrix* matrix;
  int64_t lane0, valid;
  float* tile;
  int64_t step;
};

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

// Halves, in the lower 16 bits of each lane.
FFN_FN Vec<float> half_lanes(Uint32Lanes bits) {
  typedef uint16_t Narrow __attribute__((vector_size(2 * Vec<float>::kLanes)));
  const Narrow narrow = __builtin_convertvector(bits, Narrow);
  Half halves[Vec<float>::kLanes];
  __builtin_memcpy(halves, &narrow, sizeof(halves));
  return load<Vec<float>>(halves);
}

// Whether sums of x times codes may be kept in units of any scale of kLowestPower .. kHighestPower: neither they nor
// what they are rounded to leave the normal numbers then, and a power of two changes no bit.
constexpr uint8_t kLowestPower = 87, kHighestPower = 135;
FFN_FN bool fits_powers(const float* x, int64_t n) {
  using V = Vec<float>;
  Uint32Lanes unfit{};
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const V v = load_part<V>(x + i, n - i < V::kLanes ? n - i : V::kLanes);
    const Uint32Lanes magnitude = (Uint32Lanes)v.reg & 0x7fffffffu;
    // 2^-62, 2^30: what is left of x where sums cancel, 2^-23 of it, is a normal number also in units of the scale.
    constexpr uint32_t kFrom = 65u << 23, kTo = 157u << 23;
    unfit |= (Uint32Lanes)(magnitude - kFrom > kTo - kFrom) & (Uint32Lanes)(magnitude != 0u);
  }
  uint32_t any = 0;
  for (int64_t i = 0; i < V::kLanes; ++i) any |= unfit[i];
  return any == 0;
}

// Rows of one CodeLanes and the scales of W groups of them.
template <class Layout>
struct ScaledRows {
  static constexpr Affine kAffine = Layout::kAffine;
  static constexpr int64_t W = Vec<float>::kLanes;

  const uint8_t* row[W];
  int64_t block_row[W];
  int64_t ahead, scales_ahead;      // bytes from a row, and its scales, to those that are read after these rows
  alignas(64) float scales[W * W];  // [group][row]
  alignas(64) float offsets[kAffine == Affine::kZero || kAffine == Affine::kMinimum ? W * W : 1];  // minima: negative
  Uint32Lanes
      exponents[4];  // kExponent: bytes of four groups in each lane, the first `skipped` of them of groups before
  int64_t skipped = 0;
  Uint32Lanes unfit{};  // not 0: a scale does not fit the reader

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
    if constexpr (kAffine == Affine::kExponent) load_exponents(c, group, n, groups);
    else if constexpr (kAffine == Affine::kPower) load_powers(c, group, n, groups);
    else if constexpr (Layout::kInBlocks) load_block_scales(group, n);
    else load_scales(c, group, n);
  }
  FFN_FN void load_exponents(const Codes& c, int64_t group, int64_t n, int64_t groups) {
    uint8_t copied[W][16];
    const uint8_t* from[W];
    skipped = Layout::kInBlocks || group <= groups - 16 || groups < 16 ? 0 : group - (groups - 16);
    for (int64_t i = 0; i < W; ++i) {
      from[i] = copied[i];
      if constexpr (Layout::kInBlocks) {
        __builtin_memset(copied[i], kPlainExponent, 16);
        for (int64_t j = 0; j < n; ++j) copied[i][j] = row[i][(group + j) * info_of(Layout::kFormat).block_bytes];
      } else {
        const uint8_t* at = static_cast<const uint8_t*>(c.scales) + block_row[i] * c.scale_row + group;
        if (groups >= 16) {
          from[i] = at - skipped;
        } else {
          __builtin_memset(copied[i], kPlainExponent, 16);
          __builtin_memcpy(copied[i], at, static_cast<size_t>(n));
        }
      }
    }
    transpose_words(from, 0, exponents);
    constexpr uint8_t kLowest = kAffine == Affine::kPower ? kLowestPower : 2;
    constexpr uint8_t kRange = (kAffine == Affine::kPower ? kHighestPower : 227) - kLowest;
    for (const Uint32Lanes w : exponents) unfit |= (Uint32Lanes)((Uint8Lanes)w - kLowest > kRange);
  }
  FFN_FN void load_powers(const Codes& c, int64_t group, int64_t n, int64_t groups) {
    load_exponents(c, group, n, groups);
    constexpr uint32_t kLess = 127 - (__builtin_bit_cast(uint32_t, Layout::Read::kFactor) >> 23);
    const auto put = [&](int64_t j, int64_t at) __attribute__((always_inline)) {
      const Uint32Lanes word = exponents[at / 4] - kLess * 0x01010101u;
      const uint32_t shift = static_cast<uint32_t>(at % 4 * 8);
      const Uint32Lanes bits = shift < 24 ? word << (23 - shift) : word >> 1;
      store(scales + j * W, Vec<float>((FloatLanes)(bits & 0x7f800000u)));
    };
    if (n == W && skipped == 0) {
      FFN_UNROLL
      for (int64_t j = 0; j < W; ++j) put(j, j);
    } else {
      for (int64_t j = 0; j < n; ++j) put(j, j + skipped);
    }
  }
  FFN_FN void load_scales(const Codes& c, int64_t group, int64_t n) {
    using V = Vec<float>;
    V block[W], second[W];
    const bool plain = c.scale_type == ScaleType::kFloat32;
    for (int64_t i = 0; i < W && plain; ++i)
      block[i] = load_part<V>(static_cast<const float*>(c.scales) + block_row[i] * c.scale_row + group, n);
    for (int64_t i = 0; i < W; ++i) {
      if (!plain) block[i].reg = scale_lanes_at(c, block_row[i] * c.scale_row + group, n);
      if constexpr (kAffine == Affine::kZero)
        second[i].reg = zero_lanes_at(c.zeros + block_row[i] * c.zero_row_bytes, group, n);
    }
    transpose(block);
    for (int64_t i = 0; i < n; ++i) store_scale(i, block[i]);
    if constexpr (kAffine == Affine::kZero) {
      transpose(second);
      for (int64_t i = 0; i < W; ++i) store(offsets + i * W, second[i] * V(1 / Layout::Read::kFactor));
    }
  }
  // Of GGUF blocks: those of one group of all rows lie side by side at once.
  FFN_FN void load_block_scales(int64_t group, int64_t n) {
    using V = Vec<float>;
    constexpr Format kFormat = Layout::kFormat;
    constexpr int64_t kBytes = info_of(kFormat).block_bytes;
    constexpr int64_t kGroups = info_of(kFormat).block / (kFormat == Format::kQ6_K ? 16 : 32);  // of a block
    if constexpr (kFormat == Format::kGgufMxfp4) {
      uint8_t bytes[W][W];
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < W; ++i) bytes[j][i] = row[i][(group + j) * kBytes];
      for (int64_t j = 0; j < n; ++j) store_scale(j, V(e8m0_lanes(byte_lanes(bytes[j]))));
    } else if constexpr (kGroups == 1) {
      Half halves[W][W];
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < W; ++i) __builtin_memcpy(&halves[j][i], row[i] + (group + j) * kBytes, 2);
      for (int64_t j = 0; j < n; ++j) store_scale(j, load<V>(halves[j]));
    } else {
      constexpr int64_t kTogether = kGroups < W ? kGroups : W;
      const int64_t from = group % kGroups;
      for (int64_t j = 0; j < n; j += kTogether) {
        const int64_t at = (group + j) / kGroups * kBytes;
        const auto byte = [&](const Uint32Lanes* words, int64_t i) __attribute__((always_inline)) {
          return words[i / 4] << static_cast<uint32_t>(24 - i % 4 * 8);
        };
        const auto integer = [](Int32Lanes v) __attribute__((always_inline)) {
          return V(__builtin_convertvector(v >> 24, FloatLanes));
        };
        Uint32Lanes words[4], more[4];
        if constexpr (kFormat == Format::kQ6_K) {
          transpose_words(row, at + 192, words);
          transpose_words(row, at + 194, more);
          const V d = half_lanes(more[3] >> 16);
          FFN_UNROLL
          for (int64_t i = 0; i < kTogether; ++i) store_scale(j + i, d * integer((Int32Lanes)byte(words, from + i)));
        } else {  // k_scale_min, four at a time
          transpose_words(row, at, words);
          const V d = half_lanes(words[0]), less = V::zero() - half_lanes(words[0] >> 16);
          const auto six = [&](Uint32Lanes low, Uint32Lanes high) __attribute__((always_inline)) {
            return (low & 0x0f0f0f0fu) | ((high >> 2) & 0x30303030u);
          };
          const Uint32Lanes scale[2] = {words[1] & 0x3f3f3f3fu, six(words[3], words[1])};
          const Uint32Lanes min[2] = {words[2] & 0x3f3f3f3fu, six(words[3] >> 4, words[2])};
          FFN_UNROLL
          for (int64_t i = 0; i < kTogether; ++i) {
            store_scale(j + i, d * integer((Int32Lanes)byte(scale, from + i)));
            store(offsets + (j + i) * W, less * integer((Int32Lanes)byte(min, from + i)));
          }
        }
      }
    }
  }
  FFN_FN void store_scale(int64_t i, Vec<float> scale) {
    constexpr float kFactor = Layout::Read::kFactor;
    const Vec<float> scaled = scale * Vec<float>(kFactor);
    if constexpr (kFactor != 1) unfit |= (Uint32Lanes)((scaled * Vec<float>(1 / kFactor)).reg != scale.reg);
    store(scales + i * W, scaled);
  }
  // In both halves of a lane, as NibblePairs takes them: 2^(byte - 127 - 100) is that of bfloat16.
  FFN_FN Uint32Lanes exponent_pairs(int64_t group) const {
    const int64_t in_groups = group % W + skipped;
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
