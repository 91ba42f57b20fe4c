// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: what moves rows between tokens and experts. Every sum has one order, whatever the
// number of tokens: nothing is scattered, each output row gathers what belongs to it.

constexpr int64_t kPlacesAhead = 8;  // places that are asked for, as they lie anywhere

// A token's row stays in L1 while it is written to all of its places.
template <class V>
void dispatch_rows_as(const MoveRows& m, int64_t token_begin, int64_t token_end) {
  const auto* weight = static_cast<const typename V::Scalar*>(m.weight);
  const int64_t slots = m.routes.slot_offsets[m.routes.tokens];
  dispatch_storage<typename V::Scalar>(m.in.dtype, [&](auto in) {
    dispatch_storage<typename V::Scalar>(m.out_dtype, [&](auto out) {
      using From = typename decltype(in)::Type;
      using To = typename decltype(out)::Type;
      for (int64_t t = token_begin; t < token_end; ++t) {
        const From* from = row_pointer<From>(m.in, t);
        for (int64_t i = m.routes.slot_offsets[t]; i < m.routes.slot_offsets[t + 1]; ++i) {
          const int64_t r = m.routes.row[i];
          if (!m.nontemporal && i + kPlacesAhead < slots) {
            const To* later = static_cast<To*>(m.out) + m.routes.row[i + kPlacesAhead] * m.out_stride;
            for (int64_t c = 0; c < m.cols; c += 64 / static_cast<int64_t>(sizeof(To))) prefetch_to_write(later + c);
          }
          if (r >= m.routes.kept) continue;
          const V w(weight ? weight[r] : 1);
          store_row<V>(static_cast<To*>(m.out) + r * m.out_stride, m.cols, m.nontemporal,
                       [&](int64_t c, int64_t n)
                           __attribute__((always_inline)) { return w * load_columns<V>(from, m.in.col_stride, c, n); });
        }
      }
    });
  });
  if (m.nontemporal) end_nontemporal();
}

constexpr int kRowsAtATime = 4;  // that combine adds

// `count` rows of a token, times their weights, and as many that are added next: they lie anywhere, so the hardware
// does not look ahead for them.
template <class V, class S>
struct RowsToAdd {
  int count = 0;
  const S* row[kRowsAtATime];
  typename V::Scalar weight[kRowsAtATime];
  const S* next[kRowsAtATime];
};

// out[c], or sums[c] where out is null, = the rows added, one after the other, to sums[c], or to zero.
template <class V, class From, class To, int N>
void add_rows(const RowsToAdd<V, From>& a, int64_t col_stride, int64_t cols, bool from_zero, typename V::Scalar* sums,
              To* out) {
  constexpr int64_t W = V::kLanes;
  V w[N];
  const From *row[N], *next[N];
  FFN_UNROLL
  for (int i = 0; i < N; ++i) {
    w[i] = V(a.weight[i]);
    row[i] = a.row[i];
    next[i] = a.next[i];
  }
  const auto add = [&](int64_t c, int64_t n, const auto& value) __attribute__((always_inline)) {
    V sum = from_zero ? V::zero() : load<V>(sums + c);
    FFN_UNROLL
    for (int i = 0; i < N; ++i) sum = fma(w[i], value(row[i]), sum);
    if (out) store_part(out + c, sum, n);
    else store(sums + c, sum);
  };
  // One index for all pointers: the fewer instructions, the more loads are on their way.
  const int64_t whole = col_stride == 1 ? cols / W * W : 0;
  int64_t c = 0;
#pragma GCC unroll 2
  for (; c < whole; c += W) {
    FFN_UNROLL
    for (int i = 0; i < N; ++i) prefetch_l2(next[i] + c);
    add(c, W, [&](const From* from) __attribute__((always_inline)) { return load<V>(from + c); });
  }
  for (; c < cols; c += W) {
    const int64_t n = cols - c < W ? cols - c : W;
    add(c, n, [&](const From* from) __attribute__((always_inline)) { return load_columns<V>(from, col_stride, c, n); });
  }
}

// A few rows at a time pass over the columns, whose sums wait in L1: memory is read along the rows.
template <class V>
void combine_rows_as(const MoveRows& m, int64_t token_begin, int64_t token_end) {
  using T = typename V::Scalar;
  constexpr int64_t kColumns = 8192 / sizeof(T);
  alignas(64) T sums[kColumns];
  const Routes& routes = m.routes;
  const auto* weight = static_cast<const T*>(m.weight);
  dispatch_storage<T>(m.in.dtype, [&](auto in) {
    dispatch_storage<T>(m.out_dtype, [&](auto out) {
      using From = typename decltype(in)::Type;
      using To = typename decltype(out)::Type;
      const int64_t last = routes.slot_offsets[routes.tokens] - 1;
      for (int64_t t = token_begin; t < token_end; ++t) {
        To* to = static_cast<To*>(m.out) + t * m.out_stride;
        const int64_t end = routes.slot_offsets[t + 1];
        for (int64_t begin = 0; begin < m.cols; begin += kColumns) {
          const int64_t cols = m.cols - begin < kColumns ? m.cols - begin : kColumns, first = begin * m.in.col_stride;
          bool from_zero = true;
          int64_t i = routes.slot_offsets[t];
          do {
            RowsToAdd<V, From> a;
            for (; i < end && a.count < kRowsAtATime; ++i) {
              const int64_t r = routes.row[i];
              if (r >= routes.kept) continue;
              a.row[a.count] = row_pointer<From>(m.in, r) + first;
              a.weight[a.count++] = weight ? weight[r] : 1;
            }
            while (i < end && routes.row[i] >= routes.kept) ++i;
            for (int j = 0; j < a.count; ++j)
              a.next[j] = row_pointer<From>(m.in, routes.row[i + j < last ? i + j : last]) + first;
            if (a.count) {
              const auto add =
                  choose<kRowsAtATime>(a.count, [](auto n) { return &add_rows<V, From, To, decltype(n)::value>; });
              add(a, m.in.col_stride, cols, from_zero, sums, i == end ? to + begin : nullptr);
            } else {
              store_row<V>(to + begin, cols, false,
                           [](int64_t, int64_t) __attribute__((always_inline)) { return V::zero(); });
            }
            from_zero = false;
          } while (i < end);
        }
      }
    });
  });
}

template <class V>
void row_dots_as(const RowDots& d, int64_t row_begin, int64_t row_end) {
  using T = typename V::Scalar;
  dispatch_storage<T>(d.a.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    for (int64_t r = row_begin; r < row_end; ++r) {
      T total = 0;
      const T* parts = static_cast<const T*>(d.parts) + r * d.num_parts;
      for (int64_t i = 0; i < d.num_parts; ++i) total += parts[i];
      // Blocks of kRowBlock, so that the error grows with the root of the width, not with it.
      for (int64_t block = 0; block < d.cols; block += kRowBlock) {
        const int64_t end = d.cols - block < kRowBlock ? d.cols : block + kRowBlock;
        V sum = V::zero();
        for (int64_t c = block; c < end; c += V::kLanes) {
          const int64_t n = end - c < V::kLanes ? end - c : V::kLanes;
          sum = fma(load_columns<V>(row_pointer<S>(d.a, r), d.a.col_stride, c, n),
                    load_columns<V>(row_pointer<S>(d.b, r), d.b.col_stride, c, n), sum);
        }
        total += reduce_add(sum);
      }
      static_cast<T*>(d.out)[r] = total;
    }
  });
}
