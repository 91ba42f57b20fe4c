// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: stream.h's products of a few rows on quantised weights.

// dot_kernel of R times W rows of codes. Each multiply-add into a sum waits for the one before: several vectors of rows
// and C blocks of k overlap, one alone waits. False where a code is none that readers know.
template <class Layout, int H, int R, int C>
bool dot_layout_kernel(const CodeLanes* lanes, int64_t K, const float* a) {
  using V = Vec<float>;
  constexpr int64_t W = V::kLanes;
  V total[R][H], acc[C][R][H];
  FFN_UNROLL
  for (int r = 0; r < R; ++r) {
    FFN_UNROLL
    for (int t = 0; t < H; ++t) {
      total[r][t] = V::zero();
      FFN_UNROLL
      for (int i = 0; i < C; ++i) acc[i][r][t] = V::zero();
    }
  }
  const bool ok = for_each_code<Layout, R, C>(
      lanes, K, 0, K,
      [&](int i, int64_t k, const V(&b)[R]) __attribute__((always_inline)) {
        FFN_UNROLL
        for (int t = 0; t < H; ++t) {
          const V at(a[k * H + t]);
          FFN_UNROLL
          for (int r = 0; r < R; ++r) acc[i][r][t] = fma(at, b[r], acc[i][r][t]);
        }
      },
      [&](int64_t k, int blocks) __attribute__((always_inline)) {
        if (k % kSumBlock != 0 && k < K) return;
        FFN_UNROLL
        for (int i = 0; i < C; ++i) {
          if (i >= blocks) break;
          FFN_UNROLL
          for (int r = 0; r < R; ++r) {
            FFN_UNROLL
            for (int t = 0; t < H; ++t) {
              total[r][t] = i == 0 && k <= kSumBlock ? acc[i][r][t] : total[r][t] + acc[i][r][t];
              acc[i][r][t] = V::zero();
            }
          }
        }
      });
  FFN_UNROLL
  for (int r = 0; r < R; ++r) {
    FFN_UNROLL
    for (int t = 0; t < H; ++t) store(lanes[r].tile + t * kNRVectors * W, total[r][t]);
  }
  return ok;
}

// The same of one token, where scales are powers of two: sums are kept in units of the scale at hand, so that no code
// is multiplied by one. What fits_powers refuses may not come here.
template <class Layout, int R>
bool dot_powers_kernel(const CodeLanes* lanes, int64_t K, const float* a) {
  using V = Vec<float>;
  using Read = typename Layout::Read;
  constexpr int64_t W = V::kLanes, kUnit = Read::kUnit, kGroup = 32;
  constexpr int B = kUnit / kSumBlock;  // blocks of k that run side by side
  constexpr int kSteps = kUnit / Read::kParts, kGroupParts = kGroup / kSteps, kBlockParts = kSumBlock / kSteps;
  const Codes& c = *lanes[0].matrix->codes;
  const Read read(c);
  ScaledRows<Layout> rows[R];
  V total[R];
  for (int r = 0; r < R; ++r) {
    rows[r].begin(lanes[r]);
    total[r] = V::zero();
  }
  const auto multiply = [&](int64_t k, int64_t length, auto blocks) __attribute__((always_inline)) {
    constexpr int kBlocks = decltype(blocks)::value;
    const int64_t at = read.offset(k), group = k / kGroup;
    AskedRows<Layout, R> ask(rows, c, k);
    typename Read::Unit units[R];
    FFN_UNROLL
    for (int r = 0; r < R; ++r) {
      if (group % W == 0) rows[r].load_groups(*lanes[r].matrix->codes, group, K / kGroup);
      Read::load(rows[r].row, at, static_cast<int>(length / kSteps), units[r]);
    }
    const auto scale = [&](int64_t g, int r)
                           __attribute__((always_inline)) { return load<V>(rows[r].scales + g % W * W); };
    for (int first = 0; first * kSumBlock < length; first += kBlocks) {
      V acc[kBlocks][R];
      FFN_UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        FFN_UNROLL
        for (int r = 0; r < R; ++r) acc[i][r] = V::zero();
      }
      const int64_t block = k + first * kSumBlock, left = k + length - block;
      const int parts = left < kSumBlock ? static_cast<int>(left / kSteps) : kBlockParts;
#pragma GCC unroll 1
      for (int part = 0; part < parts; ++part) {
        ask.until(first * kBlockParts + (part + 1) * kBlocks, Read::kParts);
        if (part == kGroupParts) {
          FFN_UNROLL
          for (int i = 0; i < kBlocks; ++i) {
            FFN_UNROLL
            for (int r = 0; r < R; ++r) {
              const int64_t g = (block + i * kSumBlock) / kGroup;
              const Uint32Lanes less = (Uint32Lanes)scale(g, r).reg - (Uint32Lanes)scale(g + 1, r).reg;
              acc[i][r] *= V((FloatLanes)(less + (127u << 23)));
            }
          }
        }
        decltype(read.word(units[0], 0)) words[kBlocks][R];
        FFN_UNROLL
        for (int i = 0; i < kBlocks; ++i) {
          FFN_UNROLL
          for (int r = 0; r < R; ++r) words[i][r] = read.word(units[r], part + (first + i) * kBlockParts);
        }
        FFN_UNROLL
        for (int e = 0; e < kSteps; ++e) {
          FFN_UNROLL
          for (int i = 0; i < kBlocks; ++i) {
            const V x(a[block + i * kSumBlock + part * kSteps + e]);
            FFN_UNROLL
            for (int r = 0; r < R; ++r) acc[i][r] = fma(x, V(read.value(words[i][r], e)), acc[i][r]);
          }
        }
      }
      FFN_UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        const int64_t last = (block + i * kSumBlock) / kGroup + (parts - 1) / kGroupParts;
        FFN_UNROLL
        for (int r = 0; r < R; ++r) {
          const V sum = acc[i][r] * scale(last, r);
          total[r] = block + i == 0 ? sum : total[r] + sum;
        }
      }
    }
  };
  int64_t k = 0;
  for (; k + kUnit <= K; k += kUnit) multiply(k, kUnit, std::integral_constant<int, B>{});
  if (k < K) multiply(k, K - k, std::integral_constant<int, 1>{});
  bool ok = true;
  FFN_UNROLL
  for (int r = 0; r < R; ++r) {
    store(lanes[r].tile, total[r]);
    ok = ok && rows[r].fit();
  }
  return ok;
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

constexpr int kDotVectors = 4;  // vectors of rows that one call of a kernel reads at most
// Tokens of a product on codes that has no packed panel: as many as there are registers for their sums, so that codes
// become floats while multiply-adds run. More than a micro-tile has come as 8 or 16.
constexpr int kCodeRows = kNRVectors == 4 ? 16 : kMR;

// The kernels of H tokens, and how many vectors of rows they read; null: none.
struct DotCodes {
  struct Kernel {
    bool (*run)(const CodeLanes*, int64_t K, const float* a) = nullptr;
    int64_t vectors = 1;
  };
  Kernel powers, any;  // powers comes first
};

template <int H>
FFN_FN DotCodes dot_of_codes(const Codes& c, int64_t K, bool powers) {
  constexpr int R = H == 1 ? 4 : H == 2 || (kNRVectors == 4 && H <= kMR) ? 2 : 1;
  DotCodes kernels;
  if constexpr (H == 1) {
    if (powers) {
      with_powers_layout(c, K, [&](auto layout) {
        constexpr int kVectors = 4 * kSumBlock / decltype(layout)::Read::kUnit;  // four sums, with its blocks
        kernels.powers = {&dot_powers_kernel<decltype(layout), kVectors>, kVectors};
      });
    }
  }
  with_layout(c, K, [&](auto layout) {
    // Half as many rows, each read twice as fast: memory gives fewer streams sooner. Rows of blocks gain nothing.
    using Layout = decltype(layout);
    constexpr int C = H == 1 && !Layout::kInBlocks && Layout::Read::kUnit == 2 * kSumBlock ? 2 : 1, kVectors = R / C;
    kernels.any = {&dot_layout_kernel<Layout, H, kVectors, C>, kVectors};
  });
  return kernels;
}

// All of some vectors of rows, of one format, which are `alike` where one call may read several. `powers`: of a, see
// fits_powers.
template <int H>
void dot_lanes(const CodeLanes* lanes, int64_t count, bool alike, bool powers, int64_t K, const float* a) {
  constexpr int64_t kWidth = kNRVectors * Vec<float>::kLanes;
  alignas(64) float unused[H * kWidth];
  for (int64_t i = 0, n = 0; i < count; i += n) {
    const DotCodes kernels = dot_of_codes<H>(*lanes[i].matrix->codes, K, powers);
    const auto read = [&](const DotCodes::Kernel& kernel) {
      const int64_t left = alike ? count - i : 1;
      n = left < kernel.vectors ? left : kernel.vectors;
      CodeLanes some[kDotVectors];
      for (int64_t j = 0; j < kernel.vectors; ++j) {
        some[j] = lanes[i + (j < n ? j : 0)];
        if (j >= n) some[j].tile = unused;
      }
      return kernel.run && kernel.run(some, K, a);
    };
    if (kernels.powers.run && read(kernels.powers)) continue;
    if (read(kernels.any)) continue;
    for (int64_t j = 0; j < n; ++j) dot_codes_kernel<Vec<float>, H>(lanes + i + j, K, a);
  }
}

// dot_task of quantised weights: several panels at a time, where one has few vectors.
inline void dot_codes_task(const ScheduledGemm& g, int64_t task) {
  using V = Vec<float>;
  constexpr int64_t W = V::kLanes, kWidth = kNRVectors * W, kPanels = kDotVectors / kNRVectors;
  alignas(64) float tiles[kPanels][kCodeRows * kWidth];
  const auto* a = static_cast<const float*>(g.packed_a);
  const int64_t operands = g.gated ? 2 : 1;
  const Codes& c = *g.b[0].matrix.codes;
  const bool alike = !g.gated || (g.b[1].matrix.codes->format == c.format && same_blocks(*g.b[1].matrix.codes, c));
  const bool powers = g.mr == 1 && fits_powers(a, g.K);
  auto dot = &dot_lanes<kCodeRows>;
  if (g.mr <= kMR) dot = choose<kMR>(g.mr, [](auto rows) { return &dot_lanes<decltype(rows)::value>; });
  else if (g.mr <= 8) dot = &dot_lanes<(kCodeRows < 8 ? kCodeRows : 8)>;
  const Schedule::Panels panels = g.guided_panels(task);
  for (int64_t q = panels.begin; q < panels.end; q += kPanels) {
    const int64_t together = panels.end - q < kPanels ? panels.end - q : kPanels;
    CodeLanes lanes[kDotVectors];
    int64_t count = 0;
    for (int64_t p = 0; p < together; ++p) {
      const int64_t col = (q + p) * g.nr, cols = g.N - col < g.nr ? g.N - col : g.nr;
      prefetch_short_product(g, col, cols);
      for (int64_t operand = 0; operand < operands; ++operand) {
        for (int64_t lane = 0; lane < cols; lane += W)
          lanes[count++] = {&g.b[operand].matrix, col + lane, cols - lane < W ? cols - lane : W,
                            tiles[p] + operand * (kWidth / 2) + lane, kPanels * g.nr};
      }
    }
    dot(lanes, count, alike, powers, g.K, a);
    for (int64_t p = 0; p < together; ++p) {
      const int64_t col = (q + p) * g.nr, cols = g.N - col < g.nr ? g.N - col : g.nr;
      for (int64_t t = 0; t < g.M; t += kMR)
        finish_tile<V>(g, 0, tiles[p] + t * kWidth, {t, g.M - t < kMR ? g.M - t : kMR, col, cols}, nullptr);
    }
  }
}
