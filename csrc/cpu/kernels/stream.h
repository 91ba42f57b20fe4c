// Textual, per instruction set: products of a few rows, bound by reading the weights. Rows of weights are read from end
// to end, as streams that the hardware can follow, and multiplied at once: nothing is packed. The sums run in the same
// order as those of the packed product, so results have the same bits.

// acc[t] += sum over n of a[k][t] * block[k].
template <int H, class V>
FFN_FN void multiply_block(const typename V::Scalar* a, const V* block, int64_t n, V (&acc)[H]) {
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

// Rows along k, transposed in registers. One vector of columns of the tile: lanes lane0 .. of `m`, the last of which is repeated where there are fewer.
template <class V, class S, int H>
void stream_vector(const Matrix& m, int64_t lane0, int64_t valid, int64_t K, const typename V::Scalar* a,
                   typename V::Scalar* tile) {
  constexpr int64_t W = V::kLanes;
  const S* row[W];
  for (int64_t i = 0; i < W; ++i) row[i] = row_pointer<S>(m, lane0 + (i < valid ? i : valid - 1));
  V total[H];
  FFN_UNROLL
  for (int t = 0; t < H; ++t) total[t] = V::zero();
  for (int64_t c = 0; c < K; c += kRunK) {
    const int64_t end = K - c < kRunK ? K : c + kRunK;
    V acc[H];
    FFN_UNROLL
    for (int t = 0; t < H; ++t) acc[t] = V::zero();
    for (int64_t k = c; k < end; k += W) {
      const int64_t n = end - k < W ? end - k : W;
      V block[W];
      if (n == W) {
        FFN_UNROLL
        for (int64_t i = 0; i < W; ++i) {
          block[i] = load<V>(row[i] + k);
          prefetch(row[i] + k + kStreamBytes / sizeof(S));
        }
      } else {
        for (int64_t i = 0; i < W; ++i) block[i] = load<V>(row[i] + k, static_cast<int>(n));
      }
      transpose(block);
      multiply_block<H>(a + k * H, block, n, acc);
    }
    FFN_UNROLL
    for (int t = 0; t < H; ++t) total[t] = c == 0 ? acc[t] : total[t] + acc[t];
  }
  FFN_UNROLL
  for (int t = 0; t < H; ++t) store(tile + t * kTileVectors * W, total[t]);
}

template <class V, class S>
using StreamKernel = void (*)(const Matrix&, int64_t, int64_t, int64_t, const typename V::Scalar*, typename V::Scalar*);

template <class V, class S, int... H>
StreamKernel<V, S> stream_kernel_of(int64_t rows, std::integer_sequence<int, H...>) {
  static constexpr StreamKernel<V, S> kernels[] = {stream_vector<V, S, H + 1>...};
  return kernels[rows - 1];
}

template <class V>
void dots_task(const Gemm& g, int64_t task, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  constexpr int64_t kWidth = kTileVectors * W;
  const int64_t columns = g.gated ? kWidth / 2 : kWidth;
  T* tile = static_cast<T*>(scratch);
  T* sums = tile + g.panel_rows * kWidth;
  // One panel: its chunks follow each other, so k runs on through them.
  const T* a = static_cast<const T*>(g.packed_a);
  for (int64_t q = task * g.group_n; q < g.panels_n && q < (task + 1) * g.group_n; ++q) {
    const int64_t col = q * columns;
    const int64_t cols = g.N - col < columns ? g.N - col : columns;
    for (int64_t branch = 0; branch < g.branches(); ++branch) {
      for (int64_t j = 0; j < kWidth; j += W) {
        const Matrix& m = g.b[g.gated ? 2 * branch + j / columns : 0].matrix;
        const int64_t lane = j % columns;
        if (lane >= cols) continue;
        dispatch_storage<T>(m.dtype, [&](auto tag) {
          using S = typename decltype(tag)::Type;
          const auto kernel = stream_kernel_of<V, S>(g.panel_rows, std::make_integer_sequence<int, kTileRows>{});
          kernel(m, col + lane, cols - lane < W ? cols - lane : W, g.K, a, tile + j);
        });
      }
      finish_tile<V>(g, branch, tile, {0, g.M, col, cols}, sums);
    }
  }
}

// Rows along the columns: totals[H][columns] = sum over k of a[k][H] * row[k][columns], kept in L1 and L2. `runs` holds
// the sums of the run at hand.
template <class V, class S, int H>
void add_rows(const Matrix& m, int64_t col, int64_t cols, int64_t kc, const typename V::Scalar* a,
              typename V::Scalar* runs, typename V::Scalar* totals, int64_t stride, bool add) {
  constexpr int64_t W = V::kLanes;
  for (int64_t run = 0; run < kc; run += kRunK) {
    const int64_t end = kc - run < kRunK ? kc : run + kRunK;
    for (int64_t k = run; k < end; k += kRowsAdded) {
      const int64_t n = end - k < kRowsAdded ? end - k : kRowsAdded;
      const S* row[kRowsAdded];
      for (int64_t i = 0; i < n; ++i) row[i] = row_pointer<S>(m, k + i) + col;
      const bool last = k + n == end;
      for (int64_t j = 0; j < cols; j += W) {
        const int64_t lanes = cols - j < W ? cols - j : W;
        V acc[H];
        FFN_UNROLL
        for (int t = 0; t < H; ++t) acc[t] = k == run ? V::zero() : load<V>(runs + t * stride + j);
        if (n == kRowsAdded && lanes == W) {
          FFN_UNROLL
          for (int64_t i = 0; i < kRowsAdded; ++i) {
            const V b = load<V>(row[i] + j);
            FFN_UNROLL
            for (int t = 0; t < H; ++t) acc[t] = fma(V(a[(k + i) * H + t]), b, acc[t]);
          }
        } else {
          for (int64_t i = 0; i < n; ++i) {
            const V b = load_part<V>(row[i] + j, lanes);
            for (int t = 0; t < H; ++t) acc[t] = fma(V(a[(k + i) * H + t]), b, acc[t]);
          }
        }
        FFN_UNROLL
        for (int t = 0; t < H; ++t) {
          typename V::Scalar* at = (last ? totals : runs) + t * stride + j;
          store(at, last && (add || run > 0) ? load<V>(at) + acc[t] : acc[t]);
        }
      }
    }
  }
}

template <class V, class S>
using AddRows = void (*)(const Matrix&, int64_t, int64_t, int64_t, const typename V::Scalar*, typename V::Scalar*,
                         typename V::Scalar*, int64_t, bool);

template <class V, class S, int... H>
AddRows<V, S> add_rows_of(int64_t rows, std::integer_sequence<int, H...>) {
  static constexpr AddRows<V, S> kernels[] = {add_rows<V, S, H + 1>...};
  return kernels[rows - 1];
}

template <class V>
void sums_task(const Gemm& g, int64_t task, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t kWidth = kTileVectors * V::kLanes;
  const int64_t stride = g.group_n * kWidth;
  T* runs = static_cast<T*>(scratch);
  T* totals = runs + g.panel_rows * stride;
  T* tile = totals + g.panel_rows * stride;
  const int64_t begin = task * stride;
  const int64_t cols = g.N - begin < stride ? g.N - begin : stride;
  for (int64_t s = 0; s < g.K; s += g.stretch()) {
    const Matrix& m = g.b[s / g.stretch()].matrix;
    dispatch_storage<T>(m.dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      const auto kernel = add_rows_of<V, S>(g.panel_rows, std::make_integer_sequence<int, kTileRows>{});
      kernel(m, begin, cols, g.stretch(), static_cast<const T*>(g.packed_a) + s * g.panel_rows, runs, totals, stride,
             s > 0);
    });
  }
  for (int64_t j = 0; j < cols; j += kWidth) {
    for (int64_t t = 0; t < g.panel_rows; ++t)
      for (int64_t i = 0; i < kWidth; i += V::kLanes)
        store(tile + t * kWidth + i, load<V>(totals + t * stride + j + i));
    finish_tile<V>(g, 0, tile, {0, g.M, begin + j, cols - j < kWidth ? cols - j : kWidth}, nullptr);
  }
}
