// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: what moves rows between tokens and experts. Every sum has one order, whatever the
// number of tokens: nothing is scattered, each output row gathers what belongs to it.

template <class V>
void dispatch_rows_as(const MoveRows& m, int64_t row_begin, int64_t row_end) {
  const auto* weight = static_cast<const typename V::Scalar*>(m.weight);
  dispatch_storage<typename V::Scalar>(m.in.dtype, [&](auto in) {
    dispatch_storage<typename V::Scalar>(m.out_dtype, [&](auto out) {
      using From = typename decltype(in)::Type;
      using To = typename decltype(out)::Type;
      for (int64_t r = row_begin; r < row_end; ++r) {
        To* to = static_cast<To*>(m.out) + r * m.out_stride;
        const bool kept = r < m.routes.kept;
        const From* from = kept ? row_pointer<From>(m.in, m.routes.token[r]) : nullptr;
        const V w(kept && weight ? weight[r] : 1);
        for (int64_t c = 0; c < m.cols; c += V::kLanes) {
          const int64_t n = m.cols - c < V::kLanes ? m.cols - c : V::kLanes;
          store_part(to + c, kept ? w * load_columns<V>(from, m.in.col_stride, c, n) : V::zero(), n);
        }
      }
    });
  });
}

template <class V>
void combine_rows_as(const MoveRows& m, int64_t token_begin, int64_t token_end) {
  constexpr int64_t W = V::kLanes;
  constexpr int64_t kAtOnce = 4;  // vectors
  const auto* weight = static_cast<const typename V::Scalar*>(m.weight);
  dispatch_storage<typename V::Scalar>(m.in.dtype, [&](auto in) {
    dispatch_storage<typename V::Scalar>(m.out_dtype, [&](auto out) {
      using From = typename decltype(in)::Type;
      using To = typename decltype(out)::Type;
      for (int64_t t = token_begin; t < token_end; ++t) {
        To* to = static_cast<To*>(m.out) + t * m.out_stride;
        const int64_t begin = m.routes.slot_offsets[t], end = m.routes.slot_offsets[t + 1];
        // Rows lie anywhere: those of the next token are asked for while the present ones are added.
        const int64_t next_end = t + 1 < token_end ? m.routes.slot_offsets[t + 2] : end;
        for (int64_t c = 0; c < m.cols; c += kAtOnce * W) {
          V sum[kAtOnce];
          FFN_UNROLL
          for (int64_t j = 0; j < kAtOnce; ++j) sum[j] = V::zero();
          for (int64_t i = begin; i < end; ++i) {
            const int64_t r = m.routes.row[i];
            if (r >= m.routes.kept) continue;
            const From* from = row_pointer<From>(m.in, r);
            const V w(weight ? weight[r] : 1);
            for (int64_t j = 0; j < kAtOnce && c + j * W < m.cols; ++j) {
              const int64_t n = m.cols - c - j * W < W ? m.cols - c - j * W : W;
              sum[j] = fma(w, load_columns<V>(from, m.in.col_stride, c + j * W, n), sum[j]);
            }
          }
          for (int64_t i = end; i < next_end; ++i) {
            const int64_t r = m.routes.row[i];
            if (r >= m.routes.kept) continue;
            const From* next = row_pointer<From>(m.in, r) + c * m.in.col_stride;
            for (int64_t j = 0; j < kAtOnce * W; j += 64 / static_cast<int64_t>(sizeof(From))) prefetch_l2(next + j);
          }
          for (int64_t j = 0; j < kAtOnce && c + j * W < m.cols; ++j)
            store_part(to + c + j * W, sum[j], m.cols - c - j * W < W ? m.cols - c - j * W : W);
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
