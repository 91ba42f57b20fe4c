// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: products with a short side, as low-rank additions to weights have. They read their long
// operands where they stand: packing them would take longer than the product. Factors that are stored with the experts
// side by side are turned.

constexpr int64_t kShortBlock = 8 * kSumBlock;          // of k, that is held at once
constexpr int kShortRows = kVectorBytes == 64 ? 8 : 4;  // whose sums are in registers

// Elements [k, k + n) of a row: where they stand, or decoded into `buffer`.
template <class V>
FFN_FN const typename V::Scalar* scalars(const Matrix& m, int64_t r, int64_t k, int64_t n, typename V::Scalar* buffer) {
  using T = typename V::Scalar;
  if (m.col_stride == 1 && m.dtype == Codec<T>::kDType) return row_pointer<T>(m, r) + k;
  read_row<V>(m, r, k, n, buffer);
  return buffer;
}

// out[h][lanes] (+)= sum over n of rows[h][k] * b[k][lanes].
template <class V, int H>
void short_kernel(const typename V::Scalar* const* rows, const typename V::Scalar* b, int64_t b_stride, int64_t n,
                  int64_t lanes, typename V::Scalar* out, int64_t stride, bool add) {
  V total[H];
  FFN_UNROLL
  for (int h = 0; h < H; ++h) total[h] = add ? load_part<V>(out + h * stride, lanes) : V::zero();
  for (int64_t begin = 0; begin < n || begin == 0; begin += kSumBlock) {
    const int64_t end = n - begin < kSumBlock ? n : begin + kSumBlock;
    V acc[H];
    FFN_UNROLL
    for (int h = 0; h < H; ++h) acc[h] = V::zero();
    for (int64_t k = begin; k < end; ++k) {
      const V bk = load_part<V>(b + k * b_stride, lanes);
      FFN_UNROLL
      for (int h = 0; h < H; ++h) acc[h] = fma(V(rows[h][k]), bk, acc[h]);
    }
    FFN_UNROLL
    for (int h = 0; h < H; ++h) total[h] = total[h] + acc[h];
  }
  FFN_UNROLL
  for (int h = 0; h < H; ++h) store_part(out + h * stride, total[h], lanes);
}

// The sums run as those of every other product, in blocks of kSumBlock: no layout of b changes a bit.
template <class V>
void short_product_as(const ShortProduct& p, int64_t row_begin, int64_t row_end) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  alignas(64) T b_buffer[kShortBlock * W];
  alignas(64) T row_buffer[kShortRows][kShortBlock];
  const Matrix& m = p.b.matrix;
  if (p.next) prefetch_lanes(*p.next, 0, p.N, p.K, kPrefetchedLines);
  const bool in_place = p.b.k_along_rows && m.col_stride == 1 && m.dtype == Codec<T>::kDType;
  for (int64_t k = 0; k < p.K || k == 0; k += kShortBlock) {
    const int64_t n = p.K - k < kShortBlock ? p.K - k : kShortBlock;
    for (int64_t j = 0; j < p.N; j += W) {
      const int64_t lanes = p.N - j < W ? p.N - j : W;
      if (!in_place) pack_panels<V>(p.b, j, p.N, k, n, W, b_buffer, W, 0, 1);
      const T* b = in_place ? row_pointer<T>(m, k) + j : b_buffer;
      for (int64_t r = row_begin; r < row_end; r += kShortRows) {
        const int64_t count = row_end - r < kShortRows ? row_end - r : kShortRows;
        const T* rows[kShortRows];
        for (int64_t i = 0; i < count; ++i) rows[i] = scalars<V>(p.rows, r + i, k, n, row_buffer[i]);
        choose<kShortRows>(count, [](auto h) { return &short_kernel<V, decltype(h)::value>; })(
            rows, b, in_place ? m.row_stride : W, n, lanes, static_cast<T*>(p.out) + r * p.N + j, p.N, k > 0);
      }
    }
  }
  if (p.scale != 1)
    for (T *at = static_cast<T*>(p.out) + row_begin * p.N, *end = at + (row_end - row_begin) * p.N; at < end; ++at)
      *at *= static_cast<T>(p.scale);
}

// I rows and J vectors of columns of out from (i, j) on; `lanes` of them in the last vector.
template <class V, class A, class B, int I, int J>
void short_outer_tile(const ShortOuter& p, int64_t i0, int64_t j0, int64_t lanes) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  alignas(64) T total[I * J * W];
  const bool dense = p.a.col_stride == 1 && p.b.col_stride == 1;
  V acc[I][J];
  for (int64_t begin = 0; begin < p.rows || begin == 0; begin += kSumBlock) {
    const int64_t end = p.rows - begin < kSumBlock ? p.rows : begin + kSumBlock;
    FFN_UNROLL
    for (int i = 0; i < I; ++i) {
      FFN_UNROLL
      for (int j = 0; j < J; ++j) acc[i][j] = V::zero();
    }
    for (int64_t r = begin; r < end; ++r) {
      const A* a = row_pointer<A>(p.a, r) + i0 * p.a.col_stride;
      const B* b = row_pointer<B>(p.b, r);
      V bk[J];
      FFN_UNROLL
      for (int j = 0; j < J; ++j)
        bk[j] = dense ? load_part<V>(b + j0 + j * W, j + 1 < J ? W : lanes)
                      : load_columns<V>(b, p.b.col_stride, j0 + j * W, j + 1 < J ? W : lanes);
      FFN_UNROLL
      for (int i = 0; i < I; ++i) {
        const V ai(Codec<A>::decode(a[dense ? i : i * p.a.col_stride]));
        FFN_UNROLL
        for (int j = 0; j < J; ++j) acc[i][j] = fma(ai, bk[j], acc[i][j]);
      }
    }
    if (p.rows <= kSumBlock) break;
    FFN_UNROLL
    for (int i = 0; i < I; ++i) {
      FFN_UNROLL
      for (int j = 0; j < J; ++j) {
        T* at = total + (i * J + j) * W;
        if (begin > 0) acc[i][j] = load<V>(at) + acc[i][j];
        store(at, acc[i][j]);
      }
    }
  }
  dispatch_storage<T>(p.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    FFN_UNROLL
    for (int i = 0; i < I; ++i) {
      FFN_UNROLL
      for (int j = 0; j < J; ++j)
        store_part(static_cast<S*>(p.out) + (i0 + i) * p.N + j0 + j * W, acc[i][j], j + 1 < J ? W : lanes);
    }
  });
}

// Rows [i, end) of out and up to J vectors of columns from j on.
template <class V, class A, class B, int J>
void short_outer_columns(const ShortOuter& p, int64_t i, int64_t end, int64_t j, int64_t lanes) {
  for (; i + 8 <= end; i += 8) short_outer_tile<V, A, B, 8, J>(p, i, j, lanes);
  for (; i + 4 <= end; i += 4) short_outer_tile<V, A, B, 4, J>(p, i, j, lanes);
  for (; i < end; ++i) short_outer_tile<V, A, B, 1, J>(p, i, j, lanes);
}

template <class V, class A, class B>
void short_outer_range(const ShortOuter& p, const Range& range) {
  constexpr int64_t W = V::kLanes;
  int64_t j = range.col_begin;
  for (; range.col_end - j > W; j += 2 * W) {
    const int64_t left = range.col_end - j - W;
    short_outer_columns<V, A, B, 2>(p, range.row_begin, range.row_end, j, left < W ? left : W);
  }
  if (j < range.col_end) short_outer_columns<V, A, B, 1>(p, range.row_begin, range.row_end, j, range.col_end - j);
}

template <class V>
void short_outer_as(const ShortOuter& p, const Range& range) {
  using T = typename V::Scalar;
  constexpr DType kWide = Codec<T>::kDType;
  if (p.a.dtype == kWide)
    dispatch_storage<T>(p.b.dtype, [&](auto tag) { short_outer_range<V, T, typename decltype(tag)::Type>(p, range); });
  else
    dispatch_storage<T>(p.a.dtype, [&](auto tag) { short_outer_range<V, typename decltype(tag)::Type, T>(p, range); });
}

// A block of vectors is transposed in registers: rows [r, r + rows) and columns [c, c + cols).
template <class V, class S, class D>
FFN_FN void turn_block(const Turn& t, int64_t r, int64_t rows, int64_t c, int64_t cols) {
  constexpr int64_t W = V::kLanes;
  V block[W];
  if (rows == W && cols == W && !t.from) {
    FFN_UNROLL
    for (int64_t i = 0; i < W; ++i) block[i] = load<V>(row_pointer<S>(t.in, r + i) + c);
  } else {
    FFN_UNROLL
    for (int64_t i = 0; i < W; ++i) {
      const int64_t row = i < rows ? t.from ? t.from[r + i] : r + i : -1;
      block[i] = row >= 0 ? load_part<V>(row_pointer<S>(t.in, row) + c, cols) : V::zero();
    }
  }
  transpose(block);
  D* const out = static_cast<D*>(t.out) + r;
  if (rows == W && cols == W && !t.to) {
    FFN_UNROLL
    for (int64_t i = 0; i < W; ++i) store(out + (c + i) * t.out_stride, block[i]);
  } else {
    FFN_UNROLL
    for (int64_t i = 0; i < W; ++i) {
      const int64_t place = i < cols ? t.to ? t.to[c + i] : c + i : -1;
      if (place >= 0) store_part(out + place * t.out_stride, block[i], rows);
    }
  }
}

template <class V, class S, class D>
void turn_range(const Turn& t, const Range& range) {
  constexpr int64_t W = V::kLanes;
  for (int64_t r = range.row_begin; r < range.row_end; r += W) {
    for (int64_t c = range.col_begin; c < range.col_end; c += W) {
      const int64_t cols = range.col_end - c < W ? range.col_end - c : W;
      bool wanted = !t.to;
      for (int64_t i = 0; i < cols && !wanted; ++i) wanted = t.to[c + i] >= 0;
      if (wanted) turn_block<V, S, D>(t, r, range.row_end - r < W ? range.row_end - r : W, c, cols);
    }
  }
}

template <class V>
void turn_as(const Turn& t, const Range& range) {
  using T = typename V::Scalar;
  if (t.in.dtype == Codec<T>::kDType)
    dispatch_storage<T>(t.dtype, [&](auto tag) { turn_range<V, T, typename decltype(tag)::Type>(t, range); });
  else dispatch_storage<T>(t.in.dtype, [&](auto tag) { turn_range<V, typename decltype(tag)::Type, T>(t, range); });
}
