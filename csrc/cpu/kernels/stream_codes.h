// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: stream.h's products of a few rows on quantised weights. Where the format allows it,
// codes move into lanes of rows as words of four bytes, which costs a fraction of moving floats, and become float32
// there.

// n scales from `at` on; the other lanes are undefined.
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

// Codes of W rows, a unit of k at a time, as vectors along the rows: `load` reads a unit, and `step` calls f(k within
// the unit, vector) for a part of it. Scales are not applied.
template <bool kFp4>
struct ReadNibbles {
  static constexpr int64_t kUnit = 32, kPerByte = 2;
  static constexpr int kSteps = 4;
  struct Unit {
    Uint32Lanes words[4];
  };
  WordTable table;
  FFN_FN explicit ReadNibbles(const Codes& c)
      : table(word_table(kFp4                        ? kTwiceFp4
                         : c.format == Format::kInt4 ? kMinus8
                                                     : kPlain)) {}
  FFN_FN void load(const uint8_t* const* rows, int64_t k, Unit& unit) const {
    transpose_words(rows, k / 2, unit.words);
  }
  template <class F>
  FFN_FN void step(const Unit& unit, int d, const F& f) const {
    FloatLanes values[8];
    word_nibbles(table, unit.words[d], values);
    FFN_UNROLL
    for (int e = 0; e < 8; ++e) f(8 * d + e, values[e]);
  }
};

struct ReadInt8 {
  static constexpr int64_t kUnit = 16, kPerByte = 1;
  static constexpr int kSteps = 4;
  struct Unit {
    Uint32Lanes words[4];
  };
  FFN_FN explicit ReadInt8(const Codes&) {}
  FFN_FN void load(const uint8_t* const* rows, int64_t k, Unit& unit) const { transpose_words(rows, k, unit.words); }
  template <class F>
  FFN_FN void step(const Unit& unit, int d, const F& f) const {
    FFN_UNROLL
    for (int e = 0; e < 4; ++e)
      f(4 * d + e, __builtin_convertvector((Int32Lanes)(unit.words[d] << (24 - 8 * e)) >> 24, FloatLanes));
  }
};

struct ReadFp8 {
  static constexpr int64_t kUnit = Vec<float>::kLanes, kPerByte = 1;
  static constexpr int kSteps = 1;
  struct Unit {
    const uint8_t* const* rows;
    int64_t k;
  };
  FFN_FN explicit ReadFp8(const Codes&) {}
  FFN_FN void load(const uint8_t* const* rows, int64_t k, Unit& unit) const { unit = {rows, k}; }
  template <class F>
  FFN_FN void step(const Unit& unit, int, const F& f) const {
    Vec<float> block[kUnit];
    FFN_UNROLL
    for (int64_t i = 0; i < kUnit; ++i) block[i].reg = e4m3_lanes(unit.rows[i] + unit.k);
    transpose(block);
    FFN_UNROLL
    for (int64_t i = 0; i < kUnit; ++i) f(i, block[i].reg);
  }
};

// W rows of a quantised matrix from lane0 on, of which the last is repeated where there are fewer, and where their sums
// go.
struct CodeLanes {
  const Matrix* matrix;
  int64_t lane0, valid;
  float* tile;
};

// Rows of one CodeLanes and the scales of W groups of them.
template <bool kZeros>
struct ScaledRows {
  static constexpr int64_t W = Vec<float>::kLanes;
  const uint8_t* row[W];
  int64_t block_row[W];
  alignas(64) float scales[W * W];  // [group][row]
  alignas(64) float zeros[kZeros ? W * W : 1];

  FFN_FN void begin(const CodeLanes& lanes) {
    const Matrix& m = *lanes.matrix;
    for (int64_t i = 0; i < W; ++i) {
      const int64_t index = m.first_row + (lanes.lane0 + (i < lanes.valid ? i : lanes.valid - 1)) * m.row_stride;
      row[i] = m.codes->data + index * m.codes->row_bytes;
      block_row[i] = index / m.codes->block_rows;
    }
  }
  FFN_FN void load_groups(const Codes& c, int64_t group, int64_t groups) {
    using V = Vec<float>;
    const float factor = c.format == Format::kMxfp4 || c.format == Format::kNvfp4 ? 0.5f : 1.0f;  // of kTwiceFp4
    const int64_t n = groups - group < W ? groups - group : W;
    V block[W];
    for (int64_t i = 0; i < W; ++i) block[i].reg = scale_lanes_at(c, block_row[i] * c.scale_row + group, n) * factor;
    transpose(block);
    for (int64_t i = 0; i < W; ++i) store(scales + i * W, block[i]);
    if constexpr (kZeros) {
      for (int64_t i = 0; i < W; ++i) block[i].reg = zero_lanes_at(c.zeros + block_row[i] * c.zero_row_bytes, group, n);
      transpose(block);
      for (int64_t i = 0; i < W; ++i) store(zeros + i * W, block[i]);
    }
  }
};

// dot_kernel of R times W rows of codes whose scales belong to whole units, or half ones (kHalves). Each
// multiply-add into a sum waits for the one before: several vectors of rows overlap, one alone waits.
template <class V, int H, int R, class Read, bool kHalves, bool kZeros>
void dot_words_kernel(const CodeLanes* lanes, int64_t K, const float* a) {
  constexpr int64_t W = V::kLanes, kUnit = Read::kUnit;
  const Codes& c = *lanes[0].matrix->codes;
  const int64_t groups = divide_up(K, c.block_cols);
  ScaledRows<kZeros> rows[R];
  for (int r = 0; r < R; ++r) rows[r].begin(lanes[r]);
  const Read read(c);
  V total[R][H], acc[R][H];
  FFN_UNROLL
  for (int r = 0; r < R; ++r) {
    FFN_UNROLL
    for (int t = 0; t < H; ++t) total[r][t] = acc[r][t] = V::zero();
  }
  int64_t group = 0, group_end = 0;  // of the unit at hand, and where it ends
  for (int64_t k = 0; k < K; k += kUnit) {
    if (k == group_end) {
      if (k > 0) group += kHalves ? 2 : 1;
      group_end += kHalves ? kUnit : c.block_cols;
      if (group % W == 0) {
        for (int r = 0; r < R; ++r) rows[r].load_groups(*lanes[r].matrix->codes, group, groups);
      }
    }
    const int64_t at = k / Read::kPerByte;
    if (at % 64 == 0) {
      for (int r = 0; r < R; ++r) {
        FFN_UNROLL
        for (int64_t i = 0; i < W; ++i) prefetch(rows[r].row[i] + at + kStreamBytes);
      }
    }
    typename Read::Unit units[R];
    FFN_UNROLL
    for (int r = 0; r < R; ++r) read.load(rows[r].row, k, units[r]);
#pragma GCC unroll 1
    for (int d = 0; d < Read::kSteps; ++d) {
      const int64_t in_group = (kHalves && 2 * d >= Read::kSteps ? group + 1 : group) % W * W;
      FFN_UNROLL
      for (int r = 0; r < R; ++r) {
        const V s = load<V>(rows[r].scales + in_group);
        V z = V::zero();
        if constexpr (kZeros) z = load<V>(rows[r].zeros + in_group);
        read.step(units[r], d, [&](int64_t e, FloatLanes code) __attribute__((always_inline)) {
          V b(code);
          if constexpr (kZeros) b = b - z;
          b = b * s;
          FFN_UNROLL
          for (int t = 0; t < H; ++t) acc[r][t] = fma(V(a[(k + e) * H + t]), b, acc[r][t]);
        });
      }
    }
    if ((k + kUnit) % kSumBlock == 0 || k + kUnit >= K) {
      FFN_UNROLL
      for (int r = 0; r < R; ++r) {
        FFN_UNROLL
        for (int t = 0; t < H; ++t) {
          total[r][t] = k < kSumBlock ? acc[r][t] : total[r][t] + acc[r][t];
          acc[r][t] = V::zero();
        }
      }
    }
  }
  FFN_UNROLL
  for (int r = 0; r < R; ++r) {
    FFN_UNROLL
    for (int t = 0; t < H; ++t) store(lanes[r].tile + t * kNRVectors * W, total[r][t]);
  }
}

// The same of any codes: rows are decoded a piece at a time.
template <class V, int H>
void dot_codes_kernel(const CodeLanes* lanes, int64_t K, const float* a) {
  constexpr int64_t W = V::kLanes, kStride = kDecodeAtOnce + 16;
  const int64_t valid = lanes->valid;
  alignas(64) float rows[W * kStride];
  V total[H];
  FFN_UNROLL
  for (int t = 0; t < H; ++t) total[t] = V::zero();
  for (int64_t piece = 0; piece < K; piece += kDecodeAtOnce) {
    const int64_t decoded = K - piece < kDecodeAtOnce ? K - piece : kDecodeAtOnce;
    for (int64_t i = 0; i < valid; ++i)
      decode_row(*lanes->matrix, lanes->lane0 + i, piece, decoded, rows + i * kStride);
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
  for (int t = 0; t < H; ++t) store(lanes->tile + t * kNRVectors * W, total[t]);
}

using DotCodes = void (*)(const CodeLanes*, int64_t K, const float* a);

// The kernels of H tokens for one vector of rows and for kNRVectors of them (null: none).
struct DotKernels {
  DotCodes one, many;
};

template <int H, class Read, bool kHalves, bool kZeros>
FFN_FN DotKernels dot_words() {
  DotKernels kernels = {&dot_words_kernel<Vec<float>, H, 1, Read, kHalves, kZeros>, nullptr};
  // Several tokens have several sums, which overlap; and decoding bytes takes so long that no sum waits.
  if constexpr (H <= 2 && Read::kPerByte == 2)
    kernels.many = &dot_words_kernel<Vec<float>, H, kNRVectors, Read, kHalves, kZeros>;
  return kernels;
}

template <int H>
FFN_FN DotKernels dot_of_codes(const Codes& c, int64_t K) {
  // Scales of whole units: the group's end is a multiple of a unit, or the row's.
  const auto whole = [&](int64_t unit) { return K % unit == 0 && (c.block_cols % unit == 0 || c.block_cols >= K); };
  switch (c.format) {
    case Format::kMxfp4:
      if (whole(32)) return dot_words<H, ReadNibbles<true>, false, false>();
      break;
    case Format::kNvfp4:
      if (K % 32 == 0 && c.block_cols == 16) return dot_words<H, ReadNibbles<true>, true, false>();
      break;
    case Format::kInt4:
      if (whole(32)) return dot_words<H, ReadNibbles<false>, false, false>();
      break;
    case Format::kUint4:
      if (whole(32)) return dot_words<H, ReadNibbles<false>, false, true>();
      break;
    case Format::kInt8:
      if (whole(16)) return dot_words<H, ReadInt8, false, false>();
      break;
    case Format::kFp8:
      if (whole(ReadFp8::kUnit)) return dot_words<H, ReadFp8, false, false>();
      break;
    default:
      break;
  }
  return {&dot_codes_kernel<Vec<float>, H>, nullptr};
}

// dot_task of quantised weights.
inline void dot_codes_task(const ScheduledGemm& g, int64_t task, void* scratch) {
  using V = Vec<float>;
  constexpr int64_t W = V::kLanes, kWidth = kNRVectors * W;
  float* tile = static_cast<float*>(scratch);
  const auto* a = static_cast<const float*>(g.packed_a);
  const int64_t operands = g.gated ? 2 : 1;
  // Operands of one format: gate and up are read in one call.
  const Codes& c = *g.b[0].matrix.codes;
  const DotKernels kernels = choose<kMR>(g.mr, [](auto rows) { return &dot_of_codes<decltype(rows)::value>; })(c, g.K);
  const bool alike = !g.gated || (g.b[1].matrix.codes->format == c.format && same_blocks(*g.b[1].matrix.codes, c));
  const Schedule::Panels panels = g.guided_panels(task);
  for (int64_t q = panels.begin; q < panels.end; ++q) {
    const int64_t col = q * g.nr, cols = g.N - col < g.nr ? g.N - col : g.nr;
    const int64_t vectors = divide_up(cols, W);
    CodeLanes lanes[kNRVectors];
    for (int64_t i = 0; i < operands * vectors; ++i) {
      const int64_t lane = i % vectors * W, operand = i / vectors;
      lanes[i] = {&g.b[operand].matrix, col + lane, cols - lane < W ? cols - lane : W,
                  tile + operand * (kWidth / 2) + lane};
    }
    if (operands * vectors == kNRVectors && alike && kernels.many) {
      kernels.many(lanes, g.K, a);
    } else {
      for (int64_t i = 0; i < operands * vectors; ++i) {
        const Codes& each = *lanes[i].matrix->codes;
        (alike ? kernels : choose<kMR>(g.mr, [](auto rows) { return &dot_of_codes<decltype(rows)::value>; })(each, g.K))
            .one(lanes + i, g.K, a);
      }
    }
    finish_tile<V>(g, 0, tile, {0, g.M, col, cols}, nullptr);
  }
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
