// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: products of a few rows, bound by reading the weights. Rows of weights are read from end
// to end, as streams that the hardware can follow, and multiplied at once: nothing is packed. The sums run in the same
// order as those of the packed product, so results have the same bits.

// Quantised operands are decoded into float32.
template <class V, class S>
constexpr bool kDecodes = __is_same(V, Vec<float>) && __is_same(S, float);

// acc[t] += sum over n steps of k of a[k][t] * block[k].
template <int H, class V>
FFN_FN void multiply_block(const typename V::Scalar* a, const V* block, int64_t n, typename V::Sum (&acc)[H]) {
  if (n == V::kLanes) {
    FFN_UNROLL
    for (int64_t i = 0; i < V::kLanes; ++i) {
      FFN_UNROLL
      for (int t = 0; t < H; ++t) acc[t] = fma(V(a[i * H + t]), block[i], acc[t]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i)
      for (int t = 0; t < H; ++t) acc[t] = fma(V(a[i * H + t]), block[i], acc[t]);
  }
}

// What is read after the rows at hand: asked for in the order of its addresses, into L2, which holds it until its turn.
// Memory gives one run of lines faster than many rows in turns.
template <class S>
struct NextRows {
  const S* row;
  int64_t stride, length, col = 0;

  template <int64_t kCount>
  FFN_FN void ask() {
    FFN_UNROLL
    for (int64_t i = 0; i < kCount; i += 64 / sizeof(S)) prefetch_l2(row + col + i);
    for (col += kCount; col >= length; col -= length) row += stride;
  }
};

// Rows along k, transposed in registers. One vector of columns of the tile: lanes lane0 .. of `m`, the last of which is
// repeated where there are fewer. The rows from `next` on are read after these.
template <class V, class S, int H>
void dot_kernel(const Matrix& m, int64_t lane0, int64_t valid, int64_t K, const typename V::Scalar* a,
                typename V::Scalar* tile, const S* next) {
  using Sum = typename V::Sum;
  constexpr int64_t W = V::kLanes, kBlockK = W * V::kKR;
  const S* row[W];
  for (int64_t i = 0; i < W; ++i) row[i] = row_pointer<S>(m, lane0 + (i < valid ? i : valid - 1));
  // One or two tokens are bound by memory. Asking in each row for what follows there is the faster way then; where a
  // row has several lines of a block of k, for all of them together.
  constexpr bool kByRows = H <= 2;
  constexpr int64_t kLine = 64 / sizeof(S), kLines = kSumBlock / kLine;
  NextRows<S> later = {next, m.row_stride, K};
  const auto ask = [&](int64_t c, int64_t k, int64_t ahead, auto count) __attribute__((always_inline)) {
    constexpr int64_t kCount = decltype(count)::value;  // elements of the rows, multiplied meanwhile
    if constexpr (!kByRows) return later.template ask<kCount>();
    constexpr int64_t kRows = kCount / kSumBlock;  // a block of k of so many rows
    if constexpr (kLines < 4 || kRows == 0) {
      FFN_UNROLL
      for (int64_t i = 0; i < W; ++i) prefetch(row[i] + k + ahead);
    } else {
      const S* const* asked = row + (k - c) * W / kSumBlock;
      FFN_UNROLL
      for (int64_t i = 0; i < kRows; ++i) {
        const S* at = asked[i] + c + ahead;
        FFN_UNROLL
        for (int64_t line = 0; line < kLines; ++line) prefetch(at + line * kLine);
      }
    }
  };
  Sum total[H];
  FFN_UNROLL
  for (int t = 0; t < H; ++t) total[t] = Sum::zero();
  for (int64_t c = 0; c < K; c += kSumBlock) {
    const int64_t end = K - c < kSumBlock ? K : c + kSumBlock;
    Sum acc[H];
    FFN_UNROLL
    for (int t = 0; t < H; ++t) acc[t] = Sum::zero();
    int64_t k = c;
    constexpr int64_t kAhead = kStreamBytes / sizeof(S);
    const int64_t ahead = c + kAhead < K ? kAhead : next - row[0] + kAhead - K;
    if constexpr (__is_same(S, BFloat16) && V::kKR == 1) {
      // Two neighbours move as one lane, so that transposing costs half.
      for (; k + 2 * W <= end; k += 2 * W) {
        V block[W];
        FFN_UNROLL
        for (int64_t i = 0; i < W; ++i) block[i] = load<V>(reinterpret_cast<const float*>(row[i] + k));
        ask(c, k, ahead, std::integral_constant<int64_t, 2 * W * W>{});
        transpose(block);
        FFN_UNROLL
        for (int64_t i = 0; i < W; ++i) {
          const V first = first_bfloat16(block[i]), second = second_bfloat16(block[i]);
          FFN_UNROLL
          for (int t = 0; t < H; ++t)
            acc[t] = fma(V(a[(k + 2 * i + 1) * H + t]), second, fma(V(a[(k + 2 * i) * H + t]), first, acc[t]));
        }
      }
    }
    for (; k < end; k += kBlockK) {
      const int64_t n = end - k < kBlockK ? end - k : kBlockK;
      V block[W];
      if (n == kBlockK) {
        FFN_UNROLL
        for (int64_t i = 0; i < W; ++i) block[i] = load<V>(row[i] + k);
        ask(c, k, ahead, std::integral_constant<int64_t, W * kBlockK>{});
      } else {
        for (int64_t i = 0; i < W; ++i) block[i] = load<V>(row[i] + k, static_cast<int>(n));
      }
      transpose(block);
      multiply_block<H>(a + k / V::kKR * H, block, divide_up(n, V::kKR), acc);
    }
    FFN_UNROLL
    for (int t = 0; t < H; ++t) total[t] = c == 0 ? acc[t] : total[t] + acc[t];
  }
  FFN_UNROLL
  for (int t = 0; t < H; ++t) store(tile + t * kNRVectors * W, total[t]);
}

// Rows along k, tokens in the lanes: dots[R][N vectors] (+)= sum over a block of k of row r's element k * x[k][N
// vectors]. `rows` are a block apart. Meanwhile as much of what is read later is asked for.
template <class V, class S, int R, int N>
void broadcast_kernel(const typename V::Scalar* rows, int64_t steps, const typename V::Scalar* x,
                      typename V::Scalar* dots, bool add, NextRows<S>& later) {
  constexpr int W = V::kLanes;
  constexpr int kAtOnce = N == 1 ? 4 : N == 2 ? 2 : 1;  // of k: as many vectors of x as registers are left
  constexpr int64_t kSumSteps = kSumBlock / V::kKR;
  typename V::Sum acc[R][N];
  FFN_UNROLL
  for (int r = 0; r < R; ++r) {
    FFN_UNROLL
    for (int j = 0; j < N; ++j) acc[r][j] = V::Sum::zero();
  }
  const auto multiply = [&](int64_t k, auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    V xk[kCount][N];
    FFN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      FFN_UNROLL
      for (int j = 0; j < N; ++j) xk[i][j] = load<V>(x + ((k + i) * N + j) * W);
    }
    FFN_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename V::Scalar* row = rows + r * kSumSteps + k;
      FFN_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const V b(row[i]);
        FFN_UNROLL
        for (int j = 0; j < N; ++j) acc[r][j] = fma(b, xk[i][j], acc[r][j]);
      }
    }
  };
  int64_t k = 0;
  constexpr int64_t kLine = 64 / sizeof(S), kLines = R * kSumBlock / kLine;
  for (; k + kAtOnce <= steps; k += kAtOnce) {
    for (int64_t line = k * kLines / kSumSteps; line < (k + kAtOnce) * kLines / kSumSteps; ++line)
      later.template ask<kLine>();
    multiply(k, std::integral_constant<int, kAtOnce>{});
  }
  for (; k < steps; ++k) multiply(k, std::integral_constant<int, 1>{});
  add_partial_sums(acc, dots, N * W, add);
}

// The same over all of k; `next` are the rows that are read after these. Rows are copied block by block, whole cache
// lines at a time: rows a power of two apart would evict each other.
template <class V, class S, int R, int N>
void broadcast_rows(const S* rows, int64_t stride, int64_t K, const typename V::Scalar* x, typename V::Scalar* dots,
                    typename V::Scalar* copied, const S* next) {
  constexpr int64_t W = V::kLanes, kAtOnce = W * V::kKR;
  NextRows<S> later = {next, stride, K};
  for (int64_t begin = 0; begin < K; begin += kSumBlock) {
    const int64_t n = K - begin < kSumBlock ? K - begin : kSumBlock;
    for (int r = 0; r < R; ++r) {
      const S* row = rows + r * stride + begin;
      typename V::Scalar* to = copied + r * (kSumBlock / V::kKR);
      if (n == kSumBlock) {
        FFN_UNROLL
        for (int64_t i = 0; i < kSumBlock; i += kAtOnce) store(to + i / V::kKR, load<V>(row + i));
      } else {
        for (int64_t i = 0; i < n; i += kAtOnce)
          store(to + i / V::kKR, load_part<V>(row + i, n - i < kAtOnce ? n - i : kAtOnce));
      }
    }
    broadcast_kernel<V, S, R, N>(copied, divide_up(n, V::kKR), x + begin / V::kKR * N * W, dots, begin > 0, later);
  }
}

// `count` rows of weights from `first` on, and then those from `next` on.
template <class V, class S, int N>
void broadcast_panel(const Matrix& m, int64_t first, int64_t count, int64_t K, const typename V::Scalar* x,
                     typename V::Scalar* dots, typename V::Scalar* copied, const S* next) {
  constexpr int kHalfTile = kNRVectors / 2 * V::kLanes;  // rows come in such numbers
  constexpr int kRows = (kHalfTile < 16 ? kHalfTile : 16) / (N == 3 ? 4 : N), R = kRows > 0 ? kRows : 1;
  constexpr int64_t kVectors = N * V::kLanes;
  const auto row = [&](int64_t r) { return r < count ? row_pointer<S>(m, first + r) : next; };
  int64_t r = 0;
  for (; r + R <= count; r += R)
    broadcast_rows<V, S, R, N>(row(r), m.row_stride, K, x, dots + r * kVectors, copied, row(r + R));
  for (; r < count; ++r)
    broadcast_rows<V, S, 1, N>(row(r), m.row_stride, K, x, dots + r * kVectors, copied, row(r + 1));
}

#include "stream_codes.h"

template <class V>
void dot_task(const ScheduledGemm& g, int64_t task, void* scratch) {
  if constexpr (__is_same(V, Vec<float>)) {
    if (g.quantised()) return dot_codes_task(g, task);
  }
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  constexpr int64_t kWidth = kNRVectors * W;
  T* tile = static_cast<T*>(scratch);
  T* sums = tile + g.mr * kWidth;
  // One panel: its blocks of k follow each other, so k runs on through them.
  const T* a = static_cast<const T*>(g.packed_a);
  const int64_t operands = g.gated ? 2 : 1;
  const Operand* const streamed = g.transposed ? &g.a : g.b;
  dispatch_operand<V>(streamed->matrix.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    const auto kernel = choose<kDotRows>(g.mr, [](auto rows) { return &dot_kernel<V, S, decltype(rows)::value>; });
    const Schedule::Panels panels = g.guided_panels(task);
    for (int64_t q = panels.begin; q < panels.end; ++q) {
      const int64_t col = q * g.nr;
      const int64_t cols = g.N - col < g.nr ? g.N - col : g.nr;
      prefetch_short_product(g, col, cols);
      const int64_t vectors = divide_up(cols, W), count = g.branches() * operands * vectors;
      const auto rows = [&](int64_t i) { return row_pointer<S>(streamed[i / vectors].matrix, col + i % vectors * W); };
      for (int64_t i = 0; i < count; ++i) {
        const int64_t lane = i % vectors * W, operand = i / vectors;
        const S* next = i + 1 < count ? rows(i + 1) : row_pointer<S>(streamed->matrix, col + cols);
        kernel(streamed[operand].matrix, col + lane, cols - lane < W ? cols - lane : W, g.K, a,
               tile + operand % operands * (kWidth / 2) + lane, next);
        if ((i + 1) % (operands * vectors) == 0)
          finish_tile<typename V::Sum>(g, operand / operands, tile, {0, g.M, col, cols}, sums);
      }
    }
  });
}

template <class V>
void broadcast_task(const ScheduledGemm& g, int64_t task, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  constexpr int64_t kWidth = kNRVectors * W;
  const int64_t tokens = g.mr;
  T* dots = static_cast<T*>(scratch);  // [kWidth][tokens]
  T* tile = dots + kWidth * tokens;    // [tokens][kWidth]
  T* copied = tile + kWidth * tokens;
  T* sums = copied + kWidth * kSumBlock / V::kKR;
  const T* x = static_cast<const T*>(g.packed_a);
  const int64_t operands = g.gated ? 2 : 1, half = kWidth / operands;  // of a tile's row
  const Schedule::Panels panels = g.guided_panels(task);
  dispatch_operand<V>(g.b[0].matrix.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    const auto kernel =
        choose<kBroadcastVectors>(tokens / W, [](auto n) { return &broadcast_panel<V, S, decltype(n)::value>; });
    for (int64_t q = panels.begin; q < panels.end; ++q) {
      const int64_t col = q * g.nr;
      const int64_t cols = g.N - col < g.nr ? g.N - col : g.nr;
      prefetch_short_product(g, col, cols);
      for (int64_t i = 0; i < g.branches() * operands; ++i) {
        const bool more = i + 1 < g.branches() * operands;
        kernel(g.b[i].matrix, col, cols, g.K, x, dots, copied,
               row_pointer<S>(g.b[more ? i + 1 : 0].matrix, more ? col : col + cols));
        T* half_tile = tile + i % operands * half;
        for (int64_t j = 0; j < cols; j += W) {
          for (int64_t t = 0; t < tokens; t += W) {
            typename V::Sum block[W];
            FFN_UNROLL
            for (int64_t l = 0; l < W; ++l) block[l] = load<typename V::Sum>(dots + (j + l) * tokens + t);
            transpose(block);
            FFN_UNROLL
            for (int64_t l = 0; l < W; ++l) store(half_tile + (t + l) * kWidth + j, block[l]);
          }
        }
        if ((i + 1) % operands != 0) continue;
        for (int64_t t = 0; t < g.M; t += kMR)
          finish_tile<typename V::Sum>(g, i / operands, tile + t * kWidth,
                                       {t, g.M - t < kMR ? g.M - t : kMR, col, cols}, sums + t * half);
      }
    }
  });
}

// Rows along the columns that are added to H sums at a time. Many sums cost more to fetch than more rows do.
template <class V>
constexpr int64_t axpy_fuse(int64_t H) {
  return H > kAxpyFuse ? kAxpyFuse * V::kKR : kAxpyFuse;
}

// Rows along the columns: a few of them, `n`, scaled by a[steps of n][H] and added to partial[H][cols], the
// partial sums of the block of k at hand, which are added to totals[H][cols] at its end.
template <class V, class S, int H>
void axpy_kernel(const S* const* row, int64_t n, int64_t cols, const typename V::Scalar* a, typename V::Scalar* partial,
                 typename V::Scalar* totals, int64_t stride, bool begins, bool ends, bool add) {
  using Sum = typename V::Sum;
  constexpr int64_t W = V::kLanes, kKR = V::kKR, kRows = axpy_fuse<V>(H);
  for (int64_t j = 0; j < cols; j += W) {
    const int64_t lanes = cols - j < W ? cols - j : W;
    Sum acc[H];
    FFN_UNROLL
    for (int t = 0; t < H; ++t) acc[t] = begins ? Sum::zero() : load<Sum>(partial + t * stride + j);
    if (n == kRows && lanes == W) {
      FFN_UNROLL
      for (int64_t i = 0; i < kRows; i += kKR) {
        const V b = load_step<V>(row + i, kKR, 1, j, W);
        FFN_UNROLL
        for (int t = 0; t < H; ++t) acc[t] = fma(V(a[i / kKR * H + t]), b, acc[t]);
      }
    } else {
      for (int64_t i = 0; i < n; i += kKR) {
        const V b = load_step<V>(row + i, n - i, 1, j, lanes);
        for (int t = 0; t < H; ++t) acc[t] = fma(V(a[i / kKR * H + t]), b, acc[t]);
      }
    }
    FFN_UNROLL
    for (int t = 0; t < H; ++t) {
      typename V::Scalar* at = (ends ? totals : partial) + t * stride + j;
      store(at, ends && add ? load<Sum>(at) + acc[t] : acc[t]);
    }
  }
}

template <class V>
void axpy_task(const ScheduledGemm& g, int64_t task, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t kWidth = kNRVectors * V::kLanes;
  const int64_t H = g.mr;
  const int64_t rows_at_once = axpy_fuse<V>(H);
  const int64_t stride = g.nc_panels * kWidth;
  T* partial = static_cast<T*>(scratch);  // [panels_m * H][stride]
  T* totals = partial + g.panels_m * H * stride;
  T* tile = totals + g.panels_m * H * stride;
  T* decoded = tile + H * kWidth;  // quantised: [kAxpyFuse][stride + kWidth]
  const int64_t begin = task * stride;
  const int64_t cols = g.N - begin < stride ? g.N - begin : stride;
  prefetch_short_product(g, begin, cols);
  for (int64_t i = 0; i < g.k_blocks(); ++i) {
    const KBlock c = k_block_at(g, i);
    const Matrix& m = g.b[c.b].matrix;
    const T* a = static_cast<const T*>(g.packed_a) + c.step * g.panels_m * H;
    dispatch_operand<V>(m.dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      const auto add = choose<kAxpyRows>(H, [](auto rows) { return &axpy_kernel<V, S, decltype(rows)::value>; });
      for (int64_t k = 0, n = 0; k < c.length; k += n) {
        const int64_t block_end =
            (k / kSumBlock + 1) * kSumBlock < c.length ? (k / kSumBlock + 1) * kSumBlock : c.length;
        n = block_end - k < rows_at_once ? block_end - k : rows_at_once;
        const S* row[kAxpyFuse * V::kKR];
        for (int64_t r = 0; r < n; ++r) {
          if constexpr (kDecodes<V, S>) {
            if (m.codes) {
              S* const to = static_cast<S*>(static_cast<void*>(decoded + r * (stride + kWidth)));  // depends on S
              decode_row(m, c.k + k + r, begin, cols, to);
              row[r] = to;
              continue;
            }
          }
          row[r] = row_pointer<S>(m, c.k + k + r) + begin;
        }
        for (int64_t p = 0; p < g.panels_m; ++p)
          add(row, n, cols, a + (p * c.steps + k / V::kKR) * H, partial + p * H * stride, totals + p * H * stride,
              stride, k % kSumBlock == 0, k + n == block_end, i > 0 || k >= kSumBlock);
      }
    });
  }
  for (int64_t p = 0; p < g.panels_m * H; p += kMR) {
    const int64_t rows = g.M - p < kMR ? g.M - p : kMR;
    if (rows <= 0) break;
    for (int64_t j = 0; j < cols; j += kWidth) {
      for (int64_t t = 0; t < rows; ++t)
        for (int64_t l = 0; l < kWidth; l += V::kLanes)
          store(tile + t * kWidth + l, load<typename V::Sum>(totals + (p + t) * stride + j + l));
      finish_tile<typename V::Sum>(g, 0, tile, {p, rows, begin + j, cols - j < kWidth ? cols - j : kWidth}, nullptr);
    }
  }
}
