// SPDX-License-Identifier: BSD-3-Clause
// Processes a finished tile of accumulators in shared memory: bias, activation or its gradient, and the one rounding
// to the storage dtype. A thread takes four neighbouring columns of a row: global memory is read and written
// in whole lines, and gate and up of a column meet in one thread.
#pragma once

#include "gemm_grid.h"
#include "scalar.cuh"

namespace ffn_ops::cuda {

constexpr int kQuad = 4;

// Rows [row, row + rows) and columns [col, ..) of the output, of one expert; rows of `data` are `stride` apart. Gated:
// gate in the first half of a row, up in the second.
template <class T>
struct FinishedTile {
  const T* data;
  int stride, cols;
  int64_t row, rows, col, expert;
};

// A thread's coordinates, in the tile and in the output: `count` of its columns exist, none if its row does not.
struct QuadCoord {
  int in_row, in_col;
  int64_t row, col;
  int count;
};

template <class S>
struct alignas(kQuad * sizeof(S) < 16 ? kQuad * sizeof(S) : 16) QuadOf {
  S elements[kQuad];
};

template <class S>
FFN_FN bool whole_quad(const S* p, int count) {
  return count == kQuad && reinterpret_cast<uintptr_t>(p) % alignof(QuadOf<S>) == 0;
}

// The columns that do not exist are zero, and their memory is not touched.
template <class S>
FFN_FN QuadOf<S> read_quad(const S* p, int count) {
  if (whole_quad(p, count)) return *reinterpret_cast<const QuadOf<S>*>(p);
  QuadOf<S> quad{};
#pragma unroll
  for (int i = 0; i < kQuad; ++i)
    if (i < count) quad.elements[i] = p[i];
  return quad;
}

template <class S>
FFN_FN void load_quad(const S* p, int count, ComputeOf<S> (&values)[kQuad]) {
  const QuadOf<S> quad = read_quad(p, count);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) values[i] = decode(quad.elements[i]);
}

template <class S>
FFN_FN void store_quad(S* p, int count, const ComputeOf<S> (&values)[kQuad]) {
  if (whole_quad(p, count)) {
    QuadOf<S> quad;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) quad.elements[i] = encode<S>(values[i]);
    *reinterpret_cast<QuadOf<S>*>(p) = quad;
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      if (i < count) p[i] = encode<S>(values[i]);
  }
}

// Where a matrix is given, its quad.
template <class S>
FFN_FN S* quad_at(void* matrix, int64_t row, int64_t stride, int64_t col) {
  return static_cast<S*>(matrix) + row * stride + col;
}
template <class S>
FFN_FN void store_at(void* matrix, const QuadCoord& q, int64_t stride, const ComputeOf<S> (&values)[kQuad]) {
  if (matrix) store_quad(quad_at<S>(matrix, q.row, stride, q.col), q.count, values);
}

// Gate and up of the same columns, or their gradients: alternating columns of one matrix, or two matrices.
template <class S>
FFN_FN void store_hidden(const Epilogue& e, const QuadCoord& q, const ComputeOf<S> (&gate)[kQuad],
                         const ComputeOf<S> (&up)[kQuad]) {
  if (!e.interleaved) {
    store_at<S>(e.out, q, e.out_stride, gate);
    if (e.up) store_at<S>(e.out_up, q, e.out_stride, up);
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    ComputeOf<S> pairs[kQuad];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const int from = half * kQuad / 2 + i / 2;
      pairs[i] = i % 2 ? up[from] : gate[from];
    }
    const int left = 2 * q.count - half * kQuad;
    const QuadCoord coord{q.in_row, q.in_col, q.row, 2 * q.col + half * kQuad, left < kQuad ? left : kQuad};
    if (left > 0) store_at<S>(e.out, coord, e.out_stride, pairs);
  }
}

template <class T>
FFN_FN void add_quad(T (&values)[kQuad], const T (&others)[kQuad]) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) values[i] = values[i] + others[i];
}

// Adds the columns' bias of the expert.
template <class S>
FFN_FN void add_bias(const void* bias, int64_t expert, int64_t stride, const QuadCoord& q,
                     ComputeOf<S> (&values)[kQuad]) {
  if (!bias) return;
  ComputeOf<S> quad[kQuad];
  load_quad(static_cast<const S*>(bias) + expert * stride + q.col, q.count, quad);
  add_quad(values, quad);
}

// Adds what another product gave of the same elements.
template <class T>
FFN_FN void add_given(const void* matrix, int64_t stride, const QuadCoord& q, T (&values)[kQuad]) {
  if (!matrix) return;
  T quad[kQuad];
  load_quad(static_cast<const T*>(matrix) + q.row * stride + q.col, q.count, quad);
  add_quad(values, quad);
}

// Calls f(quad) for each of the thread's quads among `rows` rows of `cols` columns, which are below each other. All
// lanes of a warp make the same calls, as `rows` is a multiple of the rows that a warp takes at once.
template <class T>
class Quads {
 public:
  FFN_FN Quads(const FinishedTile<T>& t, int cols, int64_t N)
      : t_(t), step_(kGemmThreads / (cols / kQuad)), in_col_(int(threadIdx.x) % (cols / kQuad) * kQuad) {
    const int64_t left = N - t.col - in_col_;
    count_ = left < 0 ? 0 : left < kQuad ? int(left) : kQuad;
    first_ = int(threadIdx.x) / (cols / kQuad);
  }
  FFN_FN int first() const { return first_; }
  FFN_FN int step() const { return step_; }
  FFN_FN QuadCoord at(int row) const {
    return {row, in_col_, t_.row + row, t_.col + in_col_, row < t_.rows ? count_ : 0};
  }

 private:
  const FinishedTile<T>& t_;
  int step_, in_col_, first_, count_;
};

template <class T, class F>
FFN_FN void for_each_quad(const FinishedTile<T>& t, int rows, int cols, int64_t N, const F& f) {
  const Quads<T> quads(t, cols, N);
  for (int row = quads.first(); row < rows; row += quads.step()) f(quads.at(row));
}

template <class T>
FFN_FN void tile_quad(const FinishedTile<T>& t, const QuadCoord& q, int col, T (&values)[kQuad]) {
  load_quad(t.data + q.in_row * t.stride + col, kQuad, values);
}

template <class S>
FFN_FN void finish_store(const GroupedGemm& g, const FinishedTile<ComputeOf<S>>& t, int rows) {
  using T = ComputeOf<S>;
  const Epilogue& e = g.epilogue;
  for_each_quad(t, rows, t.cols, g.N, [&](const QuadCoord& q) {
    if (q.count == 0) return;
    T values[kQuad];
    tile_quad(t, q, q.in_col, values);
    if (e.scale != 1) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) values[i] = T(e.scale) * values[i];
    }
    add_given(e.added, e.added_stride, q, values);
    add_bias<S>(e.bias, t.expert, e.bias_stride, q, values);
    if (e.unrounded) store_at<T>(e.out, q, e.out_stride, values);
    else store_at<S>(e.out, q, e.out_stride, values);
  });
}

template <class S>
FFN_FN void finish_activate(const GroupedGemm& g, const FinishedTile<ComputeOf<S>>& t, int rows) {
  using T = ComputeOf<S>;
  const Epilogue& e = g.epilogue;
  const int cols = g.gated ? t.cols / 2 : t.cols;
  const GateNumbers<LaneOf<S>> numbers(e, e.limited());
  for_each_quad(t, rows, cols, g.N, [&](const QuadCoord& q) {
    if (q.count == 0) return;
    T gate[kQuad], up[kQuad] = {};
    tile_quad(t, q, q.in_col, gate);
    add_given(e.added, e.added_stride, q, gate);
    add_bias<S>(e.bias, t.expert, e.bias_stride, q, gate);
    store_at<S>(e.gate, q, e.pre_stride, gate);
    if (g.gated) {
      tile_quad(t, q, cols + q.in_col, up);
      add_given(e.added_up, e.added_stride, q, up);
      add_bias<S>(e.bias_up, t.expert, e.bias_stride, q, up);
      store_at<S>(e.up, q, e.pre_stride, up);
    }
    if (!e.out) return;
    dispatch_activation(e.activation, [&](auto tag) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        gate[i] =
            gate_value<typename decltype(tag)::Type>(numbers, LaneOf<S>(gate[i]), LaneOf<S>(up[i]), g.gated).value;
    });
    store_at<S>(e.out, q, e.out_stride, gate);
  });
}

// One quad of dH; returns its part of the row's dot.
template <class S>
FFN_FN ComputeOf<S> finish_activate_grad_quad(const GroupedGemm& g, const FinishedTile<ComputeOf<S>>& t,
                                              const QuadCoord& q, const QuadOf<S>& gate_quad,
                                              const QuadOf<S>& up_quad) {
  using T = ComputeOf<S>;
  const Epilogue& e = g.epilogue;
  const GateNumbers<LaneOf<S>> numbers(e, e.limited());
  T d[kQuad], h[kQuad], d_gate[kQuad], d_up[kQuad];
  tile_quad(t, q, q.in_col, d);
  add_given(e.added, e.added_stride, q, d);
  const T weight = e.row_weight ? static_cast<const T*>(e.row_weight)[q.row] : T(1);
  dispatch_activation(e.activation, [&](auto tag) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const LaneOf<S> gate(decode(gate_quad.elements[i])), up(decode(up_quad.elements[i]));
      const LaneOf<S> scaled(e.row_weight ? weight * d[i] : d[i]);
      const auto grad = gate_grad<typename decltype(tag)::Type>(numbers, gate, up, scaled, e.up != nullptr);
      d_gate[i] = grad.d_gate.value;
      d_up[i] = grad.d_up.value;
      h[i] = grad.y.value;
    }
  });
  T dot = 0;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (i < q.count) dot = fma(Lane<T>(d[i]), Lane<T>(h[i]), Lane<T>(dot)).value;
    if (e.row_weight && e.weigh_h) h[i] = weight * h[i];
  }
  store_hidden<S>(e, q, d_gate, d_up);
  store_at<S>(e.h, q, e.pre_stride, h);
  return dot;
}

// The tile is dH, or dA' where rows have weights. row_dots: a thread's columns in order, then the lanes of a part by
// halves; which threads those are depends on the columns alone.
template <class S, int kAtOnce>
FFN_FN void finish_activate_grad(const GroupedGemm& g, const FinishedTile<ComputeOf<S>>& t, int rows) {
  using T = ComputeOf<S>;
  const Epilogue& e = g.epilogue;
  const Quads<T> quads(t, t.cols, g.N);
  const auto saved = [&](void* matrix, const QuadCoord& q) {
    return matrix && q.count > 0 ? read_quad(quad_at<S>(matrix, q.row, e.pre_stride, q.col), q.count) : QuadOf<S>{};
  };
  // Loads gate and up of several rows at a time, so that not every row waits for memory.
  for (int first = quads.first(); first < rows; first += kAtOnce * quads.step()) {
    QuadOf<S> gates[kAtOnce], ups[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const QuadCoord q = quads.at(first + j * quads.step());
      gates[j] = saved(e.gate, q);
      ups[j] = saved(e.up, q);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const QuadCoord q = quads.at(first + j * quads.step());
      T dot = 0;
      if (q.count > 0) dot = finish_activate_grad_quad<S>(g, t, q, gates[j], ups[j]);
      if (!e.row_dots) continue;
      constexpr int kCols = row_dots_cols(Codec<S>::kDType);
      for (int by = kCols / kQuad / 2; by > 0; by /= 2) dot = dot + __shfl_xor_sync(0xffffffffu, dot, by);
      if (q.in_col % kCols == 0 && q.count > 0)
        static_cast<T*>(e.row_dots)[q.row * e.row_dots_stride + q.col / kCols] = dot;
    }
  }
}

// `rows` rows of the tile's memory, of which t.rows exist; kAtOnce of them are read at a time for a gradient.
template <class S, int kAtOnce>
FFN_FN void finish_tile(const GroupedGemm& g, const FinishedTile<ComputeOf<S>>& t, int rows) {
  switch (g.epilogue.kind) {
    case Epilogue::Kind::kStore:
      return finish_store<S>(g, t, rows);
    case Epilogue::Kind::kActivate:
      return finish_activate<S>(g, t, rows);
    case Epilogue::Kind::kActivateGrad:
      return finish_activate_grad<S, kAtOnce>(g, t, rows);
  }
}

// kRows: writes zeros for rows without an expert. `cols`: output columns of the tile.
template <class S>
FFN_FN void zero_tile(const GroupedGemm& g, const FinishedTile<ComputeOf<S>>& t, int rows, int cols) {
  using T = ComputeOf<S>;
  const Epilogue& e = g.epilogue;
  const bool grad = e.kind == Epilogue::Kind::kActivateGrad;
  for_each_quad(t, rows, cols, g.N, [&](const QuadCoord& q) {
    if (q.count == 0) return;
    const T zero[kQuad] = {};
    if (grad) store_hidden<S>(e, q, zero, zero);
    else if (e.unrounded) store_at<T>(e.out, q, e.out_stride, zero);
    else store_at<S>(e.out, q, e.out_stride, zero);
    if (e.kind == Epilogue::Kind::kActivate) {
      store_at<S>(e.gate, q, e.pre_stride, zero);
      if (g.gated) store_at<S>(e.up, q, e.pre_stride, zero);
    }
    if (!grad) return;
    store_at<S>(e.h, q, e.pre_stride, zero);
    constexpr int kCols = row_dots_cols(Codec<S>::kDType);
    if (e.row_dots && q.in_col % kCols == 0) static_cast<T*>(e.row_dots)[q.row * e.row_dots_stride + q.col / kCols] = 0;
  });
}

}  // namespace ffn_ops::cuda
