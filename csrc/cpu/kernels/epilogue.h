// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: what happens to a finished tile [rows][vectors] of accumulators, hot in L1: bias,
// activation or its gradient, and the one rounding to the storage dtype.

// The kernel for 1 .. kMost rows: of(integral constant) gives its address.
template <class F, int... I>
FFN_FN auto choose_among(int64_t rows, std::integer_sequence<int, I...>, const F& of) {
  const decltype(of(std::integral_constant<int, 1>{})) kernels[] = {of(std::integral_constant<int, I + 1>{})...};
  return kernels[rows - 1];
}

template <int kMost, class F>
FFN_FN auto choose(int64_t rows, const F& of) {
  return choose_among(rows, std::make_integer_sequence<int, kMost>{}, of);
}

// A part of a matrix under the tile: `cols` columns from (row0, col) on, `rows` rows.
struct TilePart {
  int64_t row0, rows, col, cols;
};

// Copies between storage [.., row_stride] and tile rows; the part may be narrower than the tile.
template <class V>
void tile_to_storage(const TilePart& t, DType dtype, const typename V::Scalar* tile, void* base, int64_t row_stride) {
  constexpr int64_t W = V::kLanes;
  dispatch_storage<typename V::Scalar>(dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    S* const first = static_cast<S*>(base) + t.row0 * row_stride + t.col;
    int64_t j = 0;
    for (; t.cols - j >= 2 * W; j += 2 * W) {
      for (int64_t i = 0; i < t.rows; ++i) {
        const typename V::Scalar* from = tile + i * kNRVectors * W + j;
        store_two(first + i * row_stride + j, load<V>(from), load<V>(from + W));
      }
    }
    for (; j < t.cols; j += W) {
      const int64_t n = t.cols - j < W ? t.cols - j : W;
      for (int64_t i = 0; i < t.rows; ++i)
        store_part(first + i * row_stride + j, load<V>(tile + i * kNRVectors * W + j), n);
    }
  });
}

// Stores tiles that lie side by side, `stride` apart, row after row: memory takes rows faster than pieces of many rows.
template <class V>
void row_to_storage(const TilePart& t, const Epilogue& e, const typename V::Scalar* tiles, int64_t stride) {
  constexpr int64_t W = V::kLanes, kWidth = kNRVectors * W;
  dispatch_storage<typename V::Scalar>(e.out_dtype(), [&](auto tag) {
    using S = typename decltype(tag)::Type;
    for (int64_t i = 0; i < t.rows; ++i) {
      S* to = static_cast<S*>(e.out) + (t.row0 + i) * e.out_stride + t.col;
      const typename V::Scalar* tile = tiles + i * kWidth;
      int64_t j = 0;
      for (; t.cols - j >= kWidth; j += kWidth, tile += stride) {
        FFN_UNROLL
        for (int64_t l = 0; l < kWidth; l += 2 * W) store_two(to + j + l, load<V>(tile + l), load<V>(tile + l + W));
      }
      for (; j < t.cols; j += W, tile += W) store_part(to + j, load<V>(tile), t.cols - j < W ? t.cols - j : W);
    }
  });
}

template <class V>
void storage_to_tile(const TilePart& t, DType dtype, const void* base, int64_t row_stride, typename V::Scalar* tile) {
  constexpr int64_t W = V::kLanes;
  dispatch_storage<typename V::Scalar>(dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    for (int64_t j = 0; j < t.cols; j += W) {
      const int64_t n = t.cols - j < W ? t.cols - j : W;
      const S* from = static_cast<const S*>(base) + t.row0 * row_stride + t.col + j;
      for (int64_t i = 0; i < t.rows; ++i) store(tile + i * kNRVectors * W + j, load_part<V>(from + i * row_stride, n));
    }
  });
}

// Columns of two tiles alternate.
template <class V>
void tiles_to_interleaved(const TilePart& t, DType dtype, const typename V::Scalar* first,
                          const typename V::Scalar* second, void* base, int64_t row_stride) {
  constexpr int64_t W = V::kLanes;
  alignas(64) typename V::Scalar pair[2 * W];
  dispatch_storage<typename V::Scalar>(dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    for (int64_t i = 0; i < t.rows; ++i) {
      S* row = static_cast<S*>(base) + (t.row0 + i) * row_stride + 2 * t.col;
      for (int64_t j = 0; j < t.cols; j += W) {
        for (int64_t lane = 0; lane < W; ++lane) {
          pair[2 * lane] = first[i * kNRVectors * W + j + lane];
          pair[2 * lane + 1] = second[i * kNRVectors * W + j + lane];
        }
        const int64_t n = 2 * (t.cols - j < W ? t.cols - j : W);
        store_part(row + 2 * j, load<V>(pair), n < W ? n : W);
        if (n > W) store_part(row + 2 * j + W, load<V>(pair + W), n - W);
      }
    }
  });
}

template <class V>
void add_bias(const TilePart& t, DType dtype, const void* bias, typename V::Scalar* tile) {
  constexpr int64_t W = V::kLanes;
  if (!bias) return;
  dispatch_storage<typename V::Scalar>(dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    for (int64_t j = 0; j < t.cols; j += W) {
      const V b = load_part<V>(static_cast<const S*>(bias) + t.col + j, t.cols - j < W ? t.cols - j : W);
      for (int64_t i = 0; i < t.rows; ++i) {
        typename V::Scalar* at = tile + i * kNRVectors * W + j;
        store(at, load<V>(at) + b);
      }
    }
  });
}

// tile[H][cols] += sum over k of small[H][rank] * b(lane, k), lanes from lane0 on; each block of k is added to the
// tile.
template <class V, class S, int H>
void add_short_product(const Operand& b, int64_t lane0, int64_t cols, const typename V::Scalar* small, int64_t rank,
                       typename V::Scalar* tile) {
  constexpr int64_t W = V::kLanes;
  const Matrix& m = b.matrix;
  for (int64_t j = 0; j < cols; j += W) {
    const int64_t n = cols - j < W ? cols - j : W, lane = lane0 + j;
    for (int64_t begin = 0; begin < rank; begin += kSumBlock) {
      const int64_t end = rank - begin < kSumBlock ? rank : begin + kSumBlock;
      V acc[H];
      FFN_UNROLL
      for (int t = 0; t < H; ++t) acc[t] = V::zero();
      const auto multiply = [&](int64_t k, V bk) __attribute__((always_inline)) {
        FFN_UNROLL
        for (int t = 0; t < H; ++t) acc[t] = fma(V(small[t * rank + k]), bk, acc[t]);
      };
      if (b.k_along_rows) {
        for (int64_t k = begin; k < end; ++k) multiply(k, load_columns<V>(row_pointer<S>(m, k), m.col_stride, lane, n));
      } else {
        for (int64_t k = begin; k < end; k += W) {
          const int64_t count = end - k < W ? end - k : W;
          V block[W];
          for (int64_t i = 0; i < W; ++i)
            block[i] = i < n ? load_columns<V>(row_pointer<S>(m, lane + i), m.col_stride, k, count) : V::zero();
          transpose(block);
          const auto all = [&](auto of) __attribute__((always_inline)) {
            FFN_UNROLL
            for (int64_t i = 0; i < decltype(of)::value; ++i) multiply(k + i, block[i]);
          };
          if (count == W) {
            all(std::integral_constant<int, W>{});
          } else if (2 * count == W) {
            all(std::integral_constant<int, W / 2>{});
          } else {
            for (int64_t i = 0; i < count; ++i) multiply(k + i, block[i]);
          }
        }
      }
      FFN_UNROLL
      for (int t = 0; t < H; ++t) {
        typename V::Scalar* at = tile + t * kNRVectors * W + j;
        store(at, load<V>(at) + acc[t]);
      }
    }
  }
}

// Asks for lanes of an operand that is read from memory where it stands, at most `most` cache lines.
FFN_FN void prefetch_lanes(const Operand& b, int64_t lane0, int64_t lanes, int64_t k, int64_t most) {
  const Matrix& m = b.matrix;
  if (m.codes || m.rows || m.col_stride != 1) return;
  const int64_t size = storage_size(m.dtype), rows = b.k_along_rows ? k : lanes, cols = b.k_along_rows ? lanes : k;
  const char* const first = static_cast<const char*>(m.data) + (b.k_along_rows ? lane0 : lane0 * m.row_stride) * size;
  if (m.row_stride == cols) {
    for (int64_t byte = 0; byte < rows * cols * size && most > 0; byte += 64, --most) prefetch(first + byte);
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t byte = 0; byte < cols * size && most > 0; byte += 64, --most)
      prefetch(first + r * m.row_stride * size + byte);
}

// Before a tile is multiplied: what joins it then comes from memory meanwhile.
FFN_FN void prefetch_short_product(const Gemm& g, int64_t col, int64_t cols) {
  if (!g.epilogue.small) return;
  for (int i = 0; i < (g.gated ? 2 : 1); ++i)
    prefetch_lanes(g.epilogue.small_b[i], col, cols, g.epilogue.rank, kPrefetchedLines);
}

// The second product joins the tile. `half` is where up's columns begin.
template <class V>
void join_short_product(const Gemm& g, const TilePart& t, typename V::Scalar* tile, int64_t half) {
  const Epilogue& e = g.epilogue;
  const auto* small = static_cast<const typename V::Scalar*>(e.small) + t.row0 * e.rank;
  for (int i = 0; i < (g.gated ? 2 : 1); ++i)
    dispatch_storage<typename V::Scalar>(e.small_b[i].matrix.dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      const auto add = choose<kMR>(t.rows, [](auto h) { return &add_short_product<V, S, decltype(h)::value>; });
      add(e.small_b[i], t.col, t.cols, small, e.rank, tile + i * half);
    });
}

// The first half of a tile row's vectors is gate, the second up, of the same columns.
template <class V>
void finish_gated(const Gemm& g, int64_t branch, typename V::Scalar* tile, const TilePart& t,
                  typename V::Scalar* sums) {
  constexpr int64_t W = V::kLanes;
  constexpr int64_t kHalf = kNRVectors / 2 * W;
  const Epilogue& e = g.epilogue;
  if (e.bias) {
    add_bias<V>(t, e.dtype, e.bias[2 * branch], tile);
    add_bias<V>(t, e.dtype, e.bias[2 * branch + 1], tile + kHalf);
  }
  if (e.gate) {
    const int64_t skip = branch * e.pre_branch_stride * storage_size(e.dtype);
    tile_to_storage<V>(t, e.dtype, tile, static_cast<char*>(e.gate) + skip, e.pre_stride);
    tile_to_storage<V>(t, e.dtype, tile + kHalf, static_cast<char*>(e.up) + skip, e.pre_stride);
  }
  if (!e.out) return;
  for (int64_t j = 0; j < t.cols; j += W)
    act_kernels<V>(e).forward(
        {.count = t.rows, .stride = 2 * kHalf, .gate = tile + j, .up = tile + kHalf + j, .out = {tile + j}, .form = e});
  if (g.branches() > 1) {
    for (int64_t i = 0; i < t.rows; ++i) {
      for (int64_t j = 0; j < kHalf; j += W) {
        typename V::Scalar* at = tile + i * 2 * kHalf + j;
        V sum = load<V>(at);
        if (branch > 0) sum = load<V>(sums + i * kHalf + j) + sum;
        store(sums + i * kHalf + j, sum);
        store(at, sum);
      }
    }
    if (branch + 1 < g.branches()) return;
  }
  tile_to_storage<V>(t, e.dtype, tile, e.out, e.out_stride);
}

// out[n][m], of panels whose tiles lie `apart`: blocks are transposed in registers, so that stores run along m, whole
// cache lines where there are rows for them.
template <class V>
void finish_transposed(const ScheduledGemm& g, const typename V::Scalar* tiles, int64_t apart, const TilePart& t) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  const Epilogue& e = g.epilogue;
  const void* const bias = e.bias ? e.bias[0] : nullptr;
  for (int64_t i = 0; i < t.rows; i += 2 * W) {
    const int64_t n = t.rows - i < 2 * W ? t.rows - i : 2 * W;
    const T* from[2 * W];
    for (int64_t r = 0; r < n; ++r) from[r] = tiles + (i + r) / g.mr * apart + (i + r) % g.mr * kNRVectors * W;
    const int64_t part[2] = {n < W ? n : W, n - W};
    V b[2] = {V::zero(), V::zero()};
    if (bias)
      dispatch_storage<T>(e.dtype, [&](auto tag) {
        const auto* of = static_cast<const typename decltype(tag)::Type*>(bias) + g.first_row + t.row0 + i;
        for (int h = 0; h < 2 && part[h] > 0; ++h) b[h] = load_part<V>(of + h * W, part[h]);
      });
    dispatch_storage<T>(e.out_dtype(), [&](auto tag) {
      using S = typename decltype(tag)::Type;
      for (int64_t j = 0; j < t.cols; j += W) {
        V block[2][W];
        for (int h = 0; h < 2 && part[h] > 0; ++h) {
          for (int64_t r = 0; r < W; ++r) block[h][r] = r < part[h] ? load<V>(from[h * W + r] + j) : V::zero();
          transpose(block[h]);
          if (bias)
            for (int64_t c = 0; c < W; ++c) block[h][c] += b[h];
        }
        S* to = static_cast<S*>(e.out) + (t.col + j) * e.out_stride + t.row0 + i;
        for (int64_t c = 0; c < W && c < t.cols - j; ++c, to += e.out_stride) {
          if (n == 2 * W) {
            store_two(to, block[0][c], block[1][c]);
            continue;
          }
          for (int h = 0; h < 2 && part[h] > 0; ++h) store_part(to + h * W, block[h][c], part[h]);
        }
      }
    });
  }
}

template <class V>
void finish_plain(const Epilogue& e, typename V::Scalar* tile, const TilePart& t) {
  if (e.bias) add_bias<V>(t, e.dtype, e.bias[0], tile);
  if (e.kind == Epilogue::Kind::kActivate) {
    if (e.gate) tile_to_storage<V>(t, e.dtype, tile, e.gate, e.pre_stride);
    if (!e.out) return;
    constexpr int64_t W = V::kLanes;
    for (int64_t j = 0; j < t.cols; j += W)
      act_kernels<V>(e).forward(
          {.count = t.rows, .stride = kNRVectors * W, .gate = tile + j, .out = {tile + j}, .form = e});
  }
  tile_to_storage<V>(t, e.out_dtype(), tile, e.out, e.out_stride);
}

// Rows of the tile, which is dA', times their weights, into `scaled`.
template <class V>
void scale_rows(const Epilogue& e, const TilePart& t, const typename V::Scalar* tile, typename V::Scalar* scaled) {
  constexpr int64_t W = V::kLanes;
  const auto* weight = static_cast<const typename V::Scalar*>(e.row_weight) + t.row0;
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t j = 0; j < t.cols; j += W)
      store(scaled + i * kNRVectors * W + j, V(weight[i]) * load<V>(tile + i * kNRVectors * W + j));
}

// row_dots = <tile, h> for each row; h becomes weight * h.
template <class V>
void dot_rows(const Epilogue& e, const TilePart& t, const typename V::Scalar* tile, typename V::Scalar* h) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  const T* weight = static_cast<const T*>(e.row_weight) + t.row0;
  T* dots = static_cast<T*>(e.row_dots) + t.row0 * e.row_dots_stride + t.col / (kNRVectors * W);
  for (int64_t i = 0; i < t.rows; ++i) {
    V sum = V::zero();
    for (int64_t j = 0; j < t.cols; j += W) {
      const int64_t at = i * kNRVectors * W + j;
      const int64_t n = t.cols - j < W ? t.cols - j : W;
      const V value = load_part<V>(h + at, n);
      sum = fma(load_part<V>(tile + at, n), value, sum);
      store(h + at, V(weight[i]) * value);
    }
    dots[i * e.row_dots_stride] = reduce_add(sum);
  }
}

// The tile is dH, or dA' where rows have weights.
template <class V>
void finish_activate_grad(const Epilogue& e, typename V::Scalar* tile, const TilePart& t) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  alignas(64) T gate[kMR * kNRVectors * W];
  alignas(64) T up[kMR * kNRVectors * W];
  alignas(64) T scaled[kMR * kNRVectors * W];
  storage_to_tile<V>(t, e.dtype, e.gate, e.pre_stride, gate);
  if (e.up) storage_to_tile<V>(t, e.dtype, e.up, e.pre_stride, up);
  if (e.row_weight) scale_rows<V>(e, t, tile, scaled);
  T* const d = e.row_weight ? scaled : tile;  // h takes its place
  for (int64_t j = 0; j < t.cols; j += W) {   // vectors behind the part are not set
    T *at = gate + j, *at_up = up + j;
    act_kernels<V>(e).backward({.count = t.rows,
                                .stride = kNRVectors * W,
                                .gate = at,
                                .up = e.up ? at_up : nullptr,
                                .d = d + j,
                                .out = {at, at_up, e.h || e.row_weight ? d + j : nullptr},
                                .form = e});
  }
  if (e.row_weight) dot_rows<V>(e, t, tile, d);
  if (e.interleaved) {
    tiles_to_interleaved<V>(t, e.dtype, gate, up, e.out, e.out_stride);
  } else {
    tile_to_storage<V>(t, e.dtype, gate, e.out, e.out_stride);
    if (e.up) tile_to_storage<V>(t, e.dtype, up, e.out_up, e.out_stride);
  }
  if (e.h) tile_to_storage<V>(t, e.h_dtype(), d, e.h, e.pre_stride);
}

// Asks for what finish_tile will read and write: into L2, as rows may share a few places of L1.
FFN_FN void prefetch_tile(const ScheduledGemm& g, const TilePart& t) {
  const Epilogue& e = g.epilogue;
  const auto ask = [&](const void* base, int64_t stride, int64_t size,
                       int64_t times = 1) __attribute__((always_inline)) {
    if (!base) return;
    for (int64_t i = 0; i < t.rows; ++i) {
      const char* row = static_cast<const char*>(base) + ((t.row0 + i) * stride + t.col * times) * size;
      for (int64_t byte = 0; byte < t.cols * times * size; byte += 64) prefetch_l2(row + byte);
    }
  };
  const int64_t size = storage_size(e.dtype);
  prefetch_short_product(g, t.col, t.cols);
  if (g.transposed) return;
  ask(e.gate, e.pre_stride, size);
  ask(e.up, e.pre_stride, size);
  ask(e.out, e.out_stride, storage_size(e.out_dtype()), e.interleaved ? 2 : 1);
  ask(e.out_up, e.out_stride, size);
  ask(e.h, e.pre_stride, storage_size(e.h_dtype()));
}

template <class V>
void finish_tile(const ScheduledGemm& g, int64_t branch, typename V::Scalar* tile, const TilePart& t,
                 typename V::Scalar* sums) {
  if (g.epilogue.small) join_short_product<V>(g, t, tile, kNRVectors / 2 * V::kLanes);
  if (g.epilogue.kind == Epilogue::Kind::kActivateGrad) finish_activate_grad<V>(g.epilogue, tile, t);
  else if (g.gated) finish_gated<V>(g, branch, tile, t, sums);
  else if (g.transposed) finish_transposed<V>(g, tile, 0, t);
  else finish_plain<V>(g.epilogue, tile, t);
}
