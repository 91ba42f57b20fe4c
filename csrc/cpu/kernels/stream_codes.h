// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: stream.h's products of a few rows on quantised weights.

// dot_kernel of R times W rows of codes. Each multiply-add into a sum waits for the one before: several vectors of rows
// overlap, one alone waits. False where a code is none that readers know.
template <class Layout, int H, int R>
bool dot_layout_kernel(const CodeLanes* lanes, int64_t K, const float* a) {
  using V = Vec<float>;
  constexpr int64_t W = V::kLanes;
  V total[R][H], acc[R][H];
  FFN_UNROLL
  for (int r = 0; r < R; ++r) {
    FFN_UNROLL
    for (int t = 0; t < H; ++t) total[r][t] = acc[r][t] = V::zero();
  }
  const bool ok = for_each_code<Layout, R>(
      lanes, K, 0, K,
      [&](int64_t k, const V(&b)[R]) __attribute__((always_inline)) {
        FFN_UNROLL
        for (int t = 0; t < H; ++t) {
          const V at(a[k * H + t]);
          FFN_UNROLL
          for (int r = 0; r < R; ++r) acc[r][t] = fma(at, b[r], acc[r][t]);
        }
      },
      [&](int64_t k) __attribute__((always_inline)) {
        if (k % kSumBlock != 0 && k < K) return;
        FFN_UNROLL
        for (int r = 0; r < R; ++r) {
          FFN_UNROLL
          for (int t = 0; t < H; ++t) {
            total[r][t] = k <= kSumBlock ? acc[r][t] : total[r][t] + acc[r][t];
            acc[r][t] = V::zero();
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

// The kernel of H tokens, and how many vectors of rows it reads; null: none.
struct DotCodes {
  bool (*run)(const CodeLanes*, int64_t K, const float* a) = nullptr;
  int vectors = 1;
};

template <int H>
FFN_FN DotCodes dot_of_codes(const Codes& c, int64_t K) {
  constexpr int R = H == 1 ? 4 : H == 2 || (kNRVectors == 4 && H <= kMR) ? 2 : 1;
  DotCodes kernel;
  with_layout(c, K, [&](auto layout) { kernel = {&dot_layout_kernel<decltype(layout), H, R>, R}; });
  return kernel;
}

// All of some vectors of rows, of one format, which are `alike` where one call may read several.
template <int H>
void dot_lanes(const CodeLanes* lanes, int64_t count, bool alike, int64_t K, const float* a) {
  constexpr int64_t kWidth = kNRVectors * Vec<float>::kLanes;
  alignas(64) float unused[H * kWidth];
  for (int64_t i = 0; i < count;) {
    const DotCodes kernel = dot_of_codes<H>(*lanes[i].matrix->codes, K);
    CodeLanes some[kDotVectors];
    const int64_t left = alike ? count - i : 1, n = left < kernel.vectors ? left : kernel.vectors;
    for (int64_t j = 0; j < kernel.vectors; ++j) {
      some[j] = lanes[i + (j < n ? j : 0)];
      if (j >= n) some[j].tile = unused;
    }
    if (!kernel.run || !kernel.run(some, K, a)) {
      for (int64_t j = 0; j < n; ++j) dot_codes_kernel<Vec<float>, H>(lanes + i + j, K, a);
    }
    i += n;
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
    dot(lanes, count, alike, g.K, a);
    for (int64_t p = 0; p < together; ++p) {
      const int64_t col = (q + p) * g.nr, cols = g.N - col < g.nr ? g.N - col : g.nr;
      for (int64_t t = 0; t < g.M; t += kMR)
        finish_tile<V>(g, 0, tiles[p] + t * kWidth, {t, g.M - t < kMR ? g.M - t : kMR, col, cols}, nullptr);
    }
  }
}
