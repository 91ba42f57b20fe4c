// Textual, per instruction set: products of a few rows, bound by reading the weights. Rows of weights are read from end
// to end, as streams that the hardware can follow, and multiplied at once: nothing is packed. The sums run in the same
// order as those of the packed product, so results have the same bits.

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

// Rows along k, transposed in registers. One vector of columns of the tile: lanes lane0 .. of `m`, the last of which is
// repeated where there are fewer. Near their ends the rows from `next` on, which are read after these, are asked for.
template <class V, class S, int H>
void stream_vector(const Matrix& m, int64_t lane0, int64_t valid, int64_t K, const typename V::Scalar* a,
                   typename V::Scalar* tile, const S* next) {
  using Sum = typename V::Sum;
  constexpr int64_t W = V::kLanes, kBlockK = W * V::kTerms;
  const S* row[W];
  for (int64_t i = 0; i < W; ++i) row[i] = row_pointer<S>(m, lane0 + (i < valid ? i : valid - 1));
  Sum total[H];
  FFN_UNROLL
  for (int t = 0; t < H; ++t) total[t] = Sum::zero();
  for (int64_t c = 0; c < K; c += kRunK) {
    const int64_t end = K - c < kRunK ? K : c + kRunK;
    Sum acc[H];
    FFN_UNROLL
    for (int t = 0; t < H; ++t) acc[t] = Sum::zero();
    int64_t k = c;
    constexpr int64_t kAhead = kStreamBytes / sizeof(S);
    const int64_t ahead = c + kAhead < K ? kAhead : next - row[0] + kAhead - K;
    if constexpr (__is_same(S, BFloat16) && V::kTerms == 1) {
      // Two neighbours move as one lane, so that transposing costs half.
      for (; k + 2 * W <= end; k += 2 * W) {
        V block[W];
        FFN_UNROLL
        for (int64_t i = 0; i < W; ++i) {
          block[i] = load<V>(reinterpret_cast<const float*>(row[i] + k));
          prefetch(row[i] + k + ahead);
        }
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
        for (int64_t i = 0; i < W; ++i) {
          block[i] = load<V>(row[i] + k);
          prefetch(row[i] + k + ahead);
        }
      } else {
        for (int64_t i = 0; i < W; ++i) block[i] = load<V>(row[i] + k, static_cast<int>(n));
      }
      transpose(block);
      multiply_block<H>(a + k / V::kTerms * H, block, divide_up(n, V::kTerms), acc);
    }
    FFN_UNROLL
    for (int t = 0; t < H; ++t) total[t] = c == 0 ? acc[t] : total[t] + acc[t];
  }
  FFN_UNROLL
  for (int t = 0; t < H; ++t) store(tile + t * kTileVectors * W, total[t]);
}

template <class V>
void dots_task(const Gemm& g, int64_t task, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  constexpr int64_t kWidth = kTileVectors * W;
  T* tile = static_cast<T*>(scratch);
  T* sums = tile + g.panel_rows * kWidth;
  // One panel: its chunks follow each other, so k runs on through them.
  const T* a = static_cast<const T*>(g.packed_a);
  const int64_t operands = g.gated ? 2 : 1;
  dispatch_operand<V>(g.b[0].matrix.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    const auto kernel =
        choose<kTileRows>(g.panel_rows, [](auto rows) { return &stream_vector<V, S, decltype(rows)::value>; });
    const auto [begin, end] = g.streamed_panels(task);
    for (int64_t q = begin; q < end; ++q) {
      const int64_t col = q * g.panel_columns;
      const int64_t cols = g.N - col < g.panel_columns ? g.N - col : g.panel_columns;
      const int64_t vectors = divide_up(cols, W), count = g.branches() * operands * vectors;
      const auto rows = [&](int64_t i) { return row_pointer<S>(g.b[i / vectors].matrix, col + i % vectors * W); };
      for (int64_t i = 0; i < count; ++i) {
        const int64_t lane = i % vectors * W, operand = i / vectors;
        const S* next = i + 1 < count ? rows(i + 1) : row_pointer<S>(g.b[0].matrix, col + cols);
        kernel(g.b[operand].matrix, col + lane, cols - lane < W ? cols - lane : W, g.K, a,
               tile + operand % operands * (kWidth / 2) + lane, next);
        if ((i + 1) % (operands * vectors) == 0)
          finish_tile<typename V::Sum>(g, operand / operands, tile, {0, g.M, col, cols}, sums);
      }
    }
  });
}

// Rows along k, tokens in the lanes: dots[R][N vectors] (+)= sum over a run of k of row r's element k * x[k][N
// vectors]. `rows` are a run apart. Meanwhile the next run of the rows at `ahead`, `stride` apart, is asked for.
template <class V, class S, int R, int N>
void token_run(const typename V::Scalar* rows, int64_t steps, const typename V::Scalar* x, typename V::Scalar* dots,
               bool add, const S* ahead, int64_t stride) {
  constexpr int W = V::kLanes;
  constexpr int kAtOnce = N == 1 ? 4 : N == 2 ? 2 : 1;  // of k: as many vectors of x as registers are left
  constexpr int64_t kRun = kRunK / V::kTerms;
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
      const typename V::Scalar* row = rows + r * kRun + k;
      FFN_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const V b(row[i]);
        FFN_UNROLL
        for (int j = 0; j < N; ++j) acc[r][j] = fma(b, xk[i][j], acc[r][j]);
      }
    }
  };
  int64_t k = 0;
  constexpr int64_t kLine = 64 / sizeof(S), kRowLines = kRunK / kLine, kLines = R * kRowLines;
  for (; k + kAtOnce <= steps; k += kAtOnce) {
    for (int64_t line = k * kLines / kRun; line < (k + kAtOnce) * kLines / kRun; ++line)
      prefetch(ahead + line / kRowLines * stride + line % kRowLines * kLine);
    multiply(k, std::integral_constant<int, kAtOnce>{});
  }
  for (; k < steps; ++k) multiply(k, std::integral_constant<int, 1>{});
  end_run(acc, dots, add);
}

// The same over all of k; `next` are the rows that are read after these. Rows are copied run by run, whole cache lines
// at a time: rows a power of two apart would evict each other.
template <class V, class S, int R, int N>
void token_rows(const S* rows, int64_t stride, int64_t K, const typename V::Scalar* x, typename V::Scalar* dots,
                typename V::Scalar* copied, const S* next) {
  constexpr int64_t W = V::kLanes, kAtOnce = W * V::kTerms;
  for (int64_t run = 0; run < K; run += kRunK) {
    const int64_t n = K - run < kRunK ? K - run : kRunK;
    for (int r = 0; r < R; ++r) {
      const S* row = rows + r * stride + run;
      typename V::Scalar* to = copied + r * (kRunK / V::kTerms);
      if (n == kRunK) {
        FFN_UNROLL
        for (int64_t i = 0; i < kRunK; i += kAtOnce) store(to + i / V::kTerms, load<V>(row + i));
      } else {
        for (int64_t i = 0; i < n; i += kAtOnce)
          store(to + i / V::kTerms, load_part<V>(row + i, n - i < kAtOnce ? n - i : kAtOnce));
      }
    }
    token_run<V, S, R, N>(copied, divide_up(n, V::kTerms), x + run / V::kTerms * N * W, dots, run > 0,
                          run + kRunK < K ? rows + run + kRunK : next, stride);
  }
}

// `count` rows of weights from `first` on, and then those from `next` on.
template <class V, class S, int N>
void token_dots(const Matrix& m, int64_t first, int64_t count, int64_t K, const typename V::Scalar* x,
                typename V::Scalar* dots, typename V::Scalar* copied, const S* next) {
  constexpr int kHalfTile = kTileVectors / 2 * V::kLanes;  // rows come in such numbers
  constexpr int kRows = (kHalfTile < 16 ? kHalfTile : 16) / (N == 3 ? 4 : N), R = kRows > 0 ? kRows : 1;
  constexpr int64_t kVectors = N * V::kLanes;
  const auto row = [&](int64_t r) { return r < count ? row_pointer<S>(m, first + r) : next; };
  int64_t r = 0;
  for (; r + R <= count; r += R)
    token_rows<V, S, R, N>(row(r), m.row_stride, K, x, dots + r * kVectors, copied, row(r + R));
  for (; r < count; ++r) token_rows<V, S, 1, N>(row(r), m.row_stride, K, x, dots + r * kVectors, copied, row(r + 1));
}

template <class V>
void tokens_task(const Gemm& g, int64_t task, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  constexpr int64_t kWidth = kTileVectors * W;
  const int64_t tokens = g.panel_rows;
  T* dots = static_cast<T*>(scratch);  // [kWidth][tokens]
  T* tile = dots + kWidth * tokens;    // [tokens][kWidth]
  T* copied = tile + kWidth * tokens;
  T* sums = copied + kWidth * kRunK / V::kTerms;
  const T* x = static_cast<const T*>(g.packed_a);
  const int64_t operands = g.gated ? 2 : 1, half = kWidth / operands;  // of a tile's row
  const auto [begin, end] = g.streamed_panels(task);
  dispatch_operand<V>(g.b[0].matrix.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    const auto kernel = choose<kTokenVectors>(tokens / W, [](auto n) { return &token_dots<V, S, decltype(n)::value>; });
    for (int64_t q = begin; q < end; ++q) {
      const int64_t col = q * g.panel_columns;
      const int64_t cols = g.N - col < g.panel_columns ? g.N - col : g.panel_columns;
      for (int64_t i = 0; i < g.branches() * operands; ++i) {
        const bool more = i + 1 < g.branches() * operands;
        kernel(g.b[i].matrix, col, cols, g.K, x, dots, copied,
               row_pointer<S>(g.b[more ? i + 1 : 0].matrix, more ? col : col + cols));
        T* place = tile + i % operands * half;
        for (int64_t j = 0; j < cols; j += W) {
          for (int64_t t = 0; t < tokens; t += W) {
            typename V::Sum block[W];
            FFN_UNROLL
            for (int64_t l = 0; l < W; ++l) block[l] = load<typename V::Sum>(dots + (j + l) * tokens + t);
            transpose(block);
            FFN_UNROLL
            for (int64_t l = 0; l < W; ++l) store(place + (t + l) * kWidth + j, block[l]);
          }
        }
        if ((i + 1) % operands != 0) continue;
        for (int64_t t = 0; t < g.M; t += kTileRows)
          finish_tile<typename V::Sum>(g, i / operands, tile + t * kWidth,
                                       {t, g.M - t < kTileRows ? g.M - t : kTileRows, col, cols}, sums + t * half);
      }
    }
  });
}

// Rows along the columns that are added to H sums at a time. Many sums cost more to fetch than more rows do.
template <class V>
constexpr int64_t rows_added(int64_t H) {
  return H > kRowsAdded ? kRowsAdded * V::kTerms : kRowsAdded;
}

// Rows along the columns: a few of them, `n`, scaled by a[steps of n][H] and added to runs[H][cols], the sums of the
// run at hand, which is added to totals[H][cols] at its end.
template <class V, class S, int H>
void add_rows(const S* const* row, int64_t n, int64_t cols, const typename V::Scalar* a, typename V::Scalar* runs,
              typename V::Scalar* totals, int64_t stride, bool begins, bool ends, bool add) {
  using Sum = typename V::Sum;
  constexpr int64_t W = V::kLanes, kTerms = V::kTerms, kRows = rows_added<V>(H);
  for (int64_t j = 0; j < cols; j += W) {
    const int64_t lanes = cols - j < W ? cols - j : W;
    Sum acc[H];
    FFN_UNROLL
    for (int t = 0; t < H; ++t) acc[t] = begins ? Sum::zero() : load<Sum>(runs + t * stride + j);
    if (n == kRows && lanes == W) {
      FFN_UNROLL
      for (int64_t i = 0; i < kRows; i += kTerms) {
        const V b = load_step<V>(row + i, kTerms, 1, j, W);
        FFN_UNROLL
        for (int t = 0; t < H; ++t) acc[t] = fma(V(a[i / kTerms * H + t]), b, acc[t]);
      }
    } else {
      for (int64_t i = 0; i < n; i += kTerms) {
        const V b = load_step<V>(row + i, n - i, 1, j, lanes);
        for (int t = 0; t < H; ++t) acc[t] = fma(V(a[i / kTerms * H + t]), b, acc[t]);
      }
    }
    FFN_UNROLL
    for (int t = 0; t < H; ++t) {
      typename V::Scalar* at = (ends ? totals : runs) + t * stride + j;
      store(at, ends && add ? load<Sum>(at) + acc[t] : acc[t]);
    }
  }
}

template <class V>
void sums_task(const Gemm& g, int64_t task, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t kWidth = kTileVectors * V::kLanes;
  const int64_t H = g.panel_rows;
  const int64_t rows_at_once = rows_added<V>(H);
  const int64_t stride = g.group_n * kWidth;
  T* runs = static_cast<T*>(scratch);  // [panels_m * H][stride]
  T* totals = runs + g.panels_m * H * stride;
  T* tile = totals + g.panels_m * H * stride;
  const int64_t begin = task * stride;
  const int64_t cols = g.N - begin < stride ? g.N - begin : stride;
  for (int64_t i = 0; i < g.chunks(); ++i) {
    const Chunk c = chunk_at(g, i);
    const Matrix& m = g.b[c.b].matrix;
    const T* a = static_cast<const T*>(g.packed_a) + c.step * g.panels_m * H;
    dispatch_operand<V>(m.dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      const auto add = choose<kSumRows>(H, [](auto rows) { return &add_rows<V, S, decltype(rows)::value>; });
      for (int64_t k = 0, n = 0; k < c.length; k += n) {
        const int64_t run_end = (k / kRunK + 1) * kRunK < c.length ? (k / kRunK + 1) * kRunK : c.length;
        n = run_end - k < rows_at_once ? run_end - k : rows_at_once;
        const S* row[kRowsAdded * V::kTerms];
        for (int64_t r = 0; r < n; ++r) row[r] = row_pointer<S>(m, c.k + k + r) + begin;
        for (int64_t p = 0; p < g.panels_m; ++p)
          add(row, n, cols, a + (p * c.steps + k / V::kTerms) * H, runs + p * H * stride, totals + p * H * stride,
              stride, k % kRunK == 0, k + n == run_end, i > 0 || k >= kRunK);
      }
    });
  }
  for (int64_t p = 0; p < g.panels_m * H; p += kTileRows) {
    const int64_t rows = g.M - p < kTileRows ? g.M - p : kTileRows;
    if (rows <= 0) break;
    for (int64_t j = 0; j < cols; j += kWidth) {
      for (int64_t t = 0; t < rows; ++t)
        for (int64_t l = 0; l < kWidth; l += V::kLanes)
          store(tile + t * kWidth + l, load<typename V::Sum>(totals + (p + t) * stride + j + l));
      finish_tile<typename V::Sum>(g, 0, tile, {p, rows, begin + j, cols - j < kWidth ? cols - j : kWidth}, nullptr);
    }
  }
}
