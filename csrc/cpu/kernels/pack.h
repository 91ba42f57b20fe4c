// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: panels for the micro-kernel, out[step of k * stride + lane], read from any strided,
// gathered or 16-bit operand. Storage dtypes and layouts end here; behind it everything is dense: float32, float64, or
// pairs of bfloat16 neighbours along k, of which the last is half zero where their number is odd.

#define FFN_UNROLL _Pragma("GCC unroll 32")

// Calls f with the tag of the storage dtype; only those whose arithmetic is in Scalar are compiled.
template <class Scalar, class F>
FFN_FN void dispatch_storage(DType dtype, const F& f) {
  dispatch_dtype(dtype, [&](auto storage) {
    if constexpr (__is_same(typename Codec<typename decltype(storage)::Type>::Compute, Scalar)) f(storage);
  });
}

// Only those whose products take their operands in V: pairs are of bfloat16 alone.
template <class V, class F>
FFN_FN void dispatch_operand(DType dtype, const F& f) {
  dispatch_storage<typename V::Scalar>(dtype, [&](auto storage) {
    if constexpr (V::kKR == 1 || __is_same(typename decltype(storage)::Type, BFloat16)) f(storage);
  });
}

template <class S>
FFN_FN const S* row_pointer(const Matrix& m, int64_t r) {
  return static_cast<const S*>(m.data) + (m.rows ? m.rows[r] : r) * m.row_stride;
}

// The first n elements of a vector, the rest zero.
template <class V, class S>
FFN_FN V load_part(const S* from, int64_t n) {
  return n == V::kLanes * V::kKR ? load<V>(from) : load<V>(from, static_cast<int>(n));
}

template <class V, class S>
FFN_FN void store_part(S* to, V v, int64_t n) {
  if (n == V::kLanes) store(to, v);
  else store(to, v, static_cast<int>(n));
}

// Stores value(c, n), a vector of n columns from column c on, for every column of a row. Nontemporal: whole cache lines
// go past the caches, what lies before and behind them does not.
template <class V, class S, class F>
FFN_FN void store_row(S* to, int64_t cols, bool nontemporal, const F& value) {
  constexpr int64_t W = V::kLanes, kLine = 64 / static_cast<int64_t>(sizeof(S));
  int64_t c = 0;
  const auto plain = [&](int64_t end) __attribute__((always_inline)) {
    for (; c < end; c += W) store_part(to + c, value(c, end - c < W ? end - c : W), end - c < W ? end - c : W);
    c = end;
  };
  if (nontemporal) {
    const auto before = static_cast<int64_t>((0 - reinterpret_cast<uintptr_t>(to)) % 64 / sizeof(S));
    plain(before < cols ? before : cols);
    for (; cols - c >= kLine; c += kLine) {
      FFN_UNROLL
      for (int64_t i = 0; i < kLine; i += W) store_nontemporal(to + c + i, value(c + i, W));
    }
  }
  plain(cols);
}

#include "codes.h"

#include "lanes_of_codes.h"

// n elements of one row from column c on, the rest of a vector zero.
template <class V, class S>
FFN_FN V load_columns(const S* row, int64_t col_stride, int64_t c, int64_t n) {
  if (col_stride == 1) return load_part<V>(row + c, n);
  S buffer[V::kLanes * V::kKR] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = row[(c + i) * col_stride];
  return load<V>(buffer);
}

// n lanes from column c on of rows along the columns that belong to one step of k: of row[0], and row[1] in pairs with
// it where a lane holds two, or zero where no row is left.
template <class V, class S>
FFN_FN V load_step(const S* const* row, int64_t rows_left, int64_t col_stride, int64_t c, int64_t n) {
  using Sum = typename V::Sum;
  const Sum first = load_columns<Sum>(row[0], col_stride, c, n);
  if constexpr (V::kKR == 1) return first;
  else return V(first, rows_left > 1 ? load_columns<Sum>(row[1], col_stride, c, n) : Sum::zero());
}

// Row r from column c on, n elements, into scratch that holds whole vectors.
template <class V>
void read_row(const Matrix& m, int64_t r, int64_t c, int64_t n, typename V::Scalar* to) {
  dispatch_storage<typename V::Scalar>(m.dtype, [&](auto tag) {
    using S = typename decltype(tag)::Type;
    const S* row = row_pointer<S>(m, r);
    for (int64_t i = 0; i < n; i += V::kLanes)
      store(to + i, load_columns<V>(row, m.col_stride, c + i, n - i < V::kLanes ? n - i : V::kLanes));
  });
}

// Lanes are rows: blocks of kLanes x kLanes are transposed in registers, whole cache lines of every row at a time
// (half lines of rows a power of two apart would be evicted before their second half is used).
template <class V, class S>
void pack_transposed(const Matrix& m, int64_t lane0, int64_t lanes, int64_t valid, int64_t k0, int64_t kc,
                     typename V::Scalar* out, int64_t stride) {
  constexpr int64_t W = V::kLanes, kBlockK = W * V::kKR;
  const S* row[W];
  for (int64_t i = 0; i < W; ++i) row[i] = row_pointer<S>(m, lane0 + (i < valid ? i : 0));
  // A full store may run over the end of its k row where the rows behind are written later, within the panel.
  const int64_t room = lanes == stride ? divide_up(kc, V::kKR) * stride - W : -1;  // last position of a full store
  // Near their end the rows behind them are asked for.
  constexpr int64_t kAhead = kStreamBytes / sizeof(S);
  const int64_t ahead = kc < kAhead ? kc : kAhead;
  const int64_t ahead_of_end = m.rows ? 0 : W * m.row_stride + ahead - kc;
  V block[W];
  for (int64_t k = 0; k < kc; k += kBlockK) {
    const int64_t n = kc - k < kBlockK ? kc - k : kBlockK;
    if (m.col_stride == 1 && n == kBlockK) {
      const int64_t later = k0 + k + (k + ahead < kc ? ahead : ahead_of_end);
      FFN_UNROLL
      for (int64_t i = 0; i < W; ++i) {
        block[i] = i < valid ? load<V>(row[i] + k0 + k) : V::zero();
        prefetch(row[i] + later);
      }
    } else {
      for (int64_t i = 0; i < W; ++i)
        block[i] = i < valid ? load_columns<V>(row[i], m.col_stride, k0 + k, n) : V::zero();
    }
    transpose(block);
    const int64_t step = k / V::kKR, steps = divide_up(n, V::kKR);
    typename V::Scalar* to = out + step * stride;
    if (steps == W && (lanes == W || (step + W - 1) * stride <= room)) {
      FFN_UNROLL
      for (int64_t i = 0; i < W; ++i) store(to + i * stride, block[i]);
    } else {
      for (int64_t i = 0; i < steps; ++i)
        store_part(to + i * stride, block[i], (step + i) * stride <= room ? W : lanes);
    }
  }
}

// Lanes are columns: rows are copied, a few of them panel by panel, so that what is written lies close together.
// `stride` is that of one panel, `panel_step` the distance between panels, which hold `panel_lanes` columns each.
template <class V, class S>
void pack_copied(const Matrix& m, int64_t lane0, int64_t valid, int64_t k0, int64_t kc, int64_t panel_lanes,
                 typename V::Scalar* out, int64_t stride, int64_t panel_step, int64_t panels) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  const int64_t wanted = panels * panel_lanes < valid ? panels * panel_lanes : valid;
  const int64_t whole = divide_up(panel_lanes, W) * W;  // lanes that whole vectors of a panel touch
  const bool dense = m.col_stride == 1;
  const int64_t steps = divide_up(kc, V::kKR);
  const int64_t at_once = panel_lanes <= kMR ? kNarrowRows : kRowsAtOnce;
  for (int64_t kb = 0; kb < kc; kb += at_once) {
    const int64_t n = kc - kb < at_once ? kc - kb : at_once;
    const S* from[kRowsAtOnce];
    for (int64_t i = 0; i < n; ++i) {
      from[i] = row_pointer<S>(m, k0 + kb + i) + lane0 * m.col_stride;
      // Rows lie pages apart, where the hardware does not look ahead.
      if (!dense || kb + i + kRowsAhead >= kc) continue;
      const char* later = reinterpret_cast<const char*>(row_pointer<S>(m, k0 + kb + i + kRowsAhead) + lane0);
      for (int64_t byte = 0; byte < wanted * static_cast<int64_t>(sizeof(S)); byte += 64) prefetch_l2(later + byte);
    }
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t lane = p * panel_lanes;
      const bool full = dense && lane + whole <= valid;
      for (int64_t i = 0; i < n; i += V::kKR) {
        const int64_t step = (kb + i) / V::kKR;
        T* to = out + p * panel_step + step * stride;
        if constexpr (sizeof(S) == sizeof(T)) {
          if (dense && panel_lanes == kMR && lane + panel_lanes <= valid) {
            __builtin_memcpy(to, from[i] + lane, kMR * sizeof(T));  // no vectors across cache lines
            continue;
          }
        }
        if constexpr (V::kKR > 1) {
          const bool inside = panel_lanes == stride && step * stride + V::kFew <= steps * stride;
          if (dense && panel_lanes <= V::kFew && n - i > 1 && lane + V::kFew <= valid && inside) {
            V::store_few(to, from[i] + lane, from[i + 1] + lane);
            continue;
          }
        }
        // A whole vector may run over the end of its row where the rows behind are written later, within the panel.
        const bool may_run_over =
            whole == panel_lanes || (panel_lanes == stride && step * stride + whole <= steps * stride);
        if (full && may_run_over) {
          int64_t j = 0;
          if constexpr (V::kKR > 1) {
            for (; n - i > 1 && j + 2 * W <= whole; j += 2 * W) {
              V pairs[2];
              load_two_steps(from[i] + lane + j, from[i + 1] + lane + j, pairs);
              store(to + j, pairs[0]);
              store(to + j + W, pairs[1]);
            }
          }
          for (; j < whole; j += W) store(to + j, load_step<V>(from + i, n - i, 1, lane + j, W));
          continue;
        }
        for (int64_t j = 0; j < panel_lanes; j += W) {
          const int64_t room = panel_lanes - j < W ? panel_lanes - j : W;
          const int64_t left = valid - lane - j;
          const int64_t lanes = left >= room ? room : (left > 0 ? left : 0);
          const V v = lanes > 0 ? load_step<V>(from + i, n - i, m.col_stride, lane + j, lanes) : V::zero();
          store_part(to + j, v, panel_lanes == stride && step * stride + j + W <= steps * stride ? W : room);
        }
      }
    }
  }
}

// Rows [r0, r0 + rows) of a quantised matrix from column c on, n elements each, as a matrix in `buffer`.
FFN_FN Matrix decoded(const Matrix& m, int64_t r0, int64_t rows, int64_t c, int64_t n, float* buffer, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) decode_row(m, r0 + i, c, n, buffer + i * stride);
  Matrix d;
  d.data = buffer;
  d.row_stride = stride;
  return d;
}

// W whole rows of a quantised matrix from `lane0` on, of which `lanes` are stored; false where no reader is for them.
template <class V>
bool pack_code_lanes(const Matrix& m, int64_t lane0, int64_t lanes, int64_t k0, int64_t kc, float* out,
                     int64_t stride) {
  const FormatInfo& info = info_of(m.codes->format);
  const int64_t K = m.codes->row_bytes / info.block_bytes * info.block;
  const CodeLanes rows = {&m, lane0, lanes, nullptr, lanes};
  bool ok = m.first_col == 0;
  return ok &&
         with_layout(*m.codes, K,
                     [&](auto layout) {
                       ok = for_each_code<decltype(layout), 1, 1>(
                           &rows, K, k0, k0 + kc,
                           [&](int, int64_t k, const V(&b)[1])
                               __attribute__((always_inline)) { store_part(out + (k - k0) * stride, b[0], lanes); },
                           [](int64_t, int) {});
                     }) &&
         ok;
}

// pack_panels of a quantised operand: rows along the lanes are decoded in place, others in lanes or in pieces in L1.
template <class V>
void pack_codes(const Operand& op, int64_t lane0, int64_t lane_end, int64_t k0, int64_t kc, int64_t panel_lanes,
                float* out, int64_t stride, int64_t panel_step, int64_t panels) {
  constexpr int64_t W = V::kLanes, kStride = kDecodeAtOnce + 16;
  alignas(64) float buffer[kRowsAtOnce * kStride];
  if (op.k_along_rows) {
    // Rows lie pages apart, where the hardware does not look ahead.
    const Codes& c = *op.matrix.codes;
    const FormatInfo& info = info_of(c.format);
    const int64_t row_bytes = op.matrix.row_stride * c.row_bytes;
    const auto byte_of = [&](int64_t lane) { return (op.matrix.first_col + lane) / info.block * info.block_bytes; };
    const uint8_t* row = c.data + (op.matrix.first_row + k0 * op.matrix.row_stride) * c.row_bytes;
    const int64_t end = lane0 + panels * panel_lanes < lane_end ? lane0 + panels * panel_lanes : lane_end;
    const int64_t first = byte_of(lane0), last = byte_of(end);
    // A panel is whole vectors.
    const bool in_place = decodes_whole_vectors(c, op.matrix.first_col + lane0, end - lane0);
    for (int64_t k = 0; k < kc; ++k, row += row_bytes) {
      if (k + kRowsAhead < kc) {
        for (int64_t byte = first; byte < last; byte += 64) prefetch_l2(row + kRowsAhead * row_bytes + byte);
      }
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t lane = lane0 + p * panel_lanes, left = lane_end - lane > 0 ? lane_end - lane : 0;
        const int64_t valid = left < panel_lanes ? left : panel_lanes;
        float* to = out + p * panel_step + k * stride;
        if (in_place) {
          decode_row(op.matrix, k0 + k, lane, valid, to);
        } else {
          decode_row(op.matrix, k0 + k, lane, valid, buffer);
          __builtin_memcpy(to, buffer, static_cast<size_t>(valid) * sizeof(float));
        }
        for (int64_t i = valid; i < panel_lanes; ++i) to[i] = 0;
      }
    }
    return;
  }
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t i = 0; i < panel_lanes; i += W) {
      const int64_t lane = lane0 + p * panel_lanes + i, room = panel_lanes - i < W ? panel_lanes - i : W;
      const int64_t left = lane_end - lane > 0 ? lane_end - lane : 0, valid = left < room ? left : room;
      if (valid == room && pack_code_lanes<V>(op.matrix, lane, room, k0, kc, out + p * panel_step + i, stride))
        continue;
      for (int64_t k = 0; k < kc; k += kDecodeAtOnce) {
        const int64_t n = kc - k < kDecodeAtOnce ? kc - k : kDecodeAtOnce;
        const Matrix piece = decoded(op.matrix, lane, valid, k0 + k, n, buffer, kStride);
        pack_transposed<V, float>(piece, 0, room, valid, 0, n, out + p * panel_step + k * stride + i, stride);
      }
    }
  }
}

// Packs `panels` panels of `panel_lanes` lanes each, starting at lane0; lanes from `lane_end` on are zero.
template <class V>
void pack_panels(const Operand& op, int64_t lane0, int64_t lane_end, int64_t k0, int64_t kc, int64_t panel_lanes,
                 typename V::Scalar* out, int64_t stride, int64_t panel_step, int64_t panels) {
  constexpr int64_t W = V::kLanes;
  if constexpr (__is_same(V, Vec<float>)) {
    if (op.matrix.codes)
      return pack_codes<V>(op, lane0, lane_end, k0, kc, panel_lanes, out, stride, panel_step, panels);
  }
  dispatch_operand<V>(op.matrix.dtype, [&](auto storage) {
    using S = typename decltype(storage)::Type;
    if (op.k_along_rows) {
      const int64_t together = panel_lanes <= kMR ? kNarrowPanels : panels;
      for (int64_t p = 0; p < panels; p += together) {
        const int64_t lane = lane0 + p * panel_lanes, count = panels - p < together ? panels - p : together;
        pack_copied<V, S>(op.matrix, lane, lane_end - lane, k0, kc, panel_lanes, out + p * panel_step, stride,
                          panel_step, count);
      }
    } else {
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t i = 0; i < panel_lanes; i += W) {
          const int64_t lane = lane0 + p * panel_lanes + i;
          const int64_t room = panel_lanes - i < W ? panel_lanes - i : W;
          const int64_t left = lane_end - lane;
          typename V::Scalar* to = out + p * panel_step + i;
          if (left > 0) {
            pack_transposed<V, S>(op.matrix, lane, room, left < room ? left : room, k0, kc, to, stride);
          } else {
            for (int64_t k = 0; k < divide_up(kc, V::kKR); ++k) store_part(to + k * stride, V::zero(), room);
          }
        }
      }
    }
  });
}
