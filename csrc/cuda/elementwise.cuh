// SPDX-License-Identifier: BSD-3-Clause
// Gated activation with its first and second derivatives, sums for the gradients of its own parameters, and sums over
// rows. Bound by memory: each thread has several 16-byte loads in flight, and parts of a pack go through the same
// arithmetic as whole ones.
#pragma once

#include "grid.h"
#include "scalar.cuh"
#include "warp.cuh"

namespace ffn_ops::cuda {

// The part of a thread in its steps u = 0, 1, ...: rows, first columns, and numbers of columns (0: none).
struct PackCoord {
  int64_t row, col;
  int n;
};

template <int kPack, int kSteps>
FFN_FN void pack_places(const PackGrid& grid, int64_t rows, int64_t cols, PackCoord (&at)[kSteps]) {
  const uint32_t row_block = rows > 1 ? blockIdx.x / grid.col_blocks : 0;
  const uint32_t col_block = blockIdx.x - row_block * grid.col_blocks;
  const int width = 1 << grid.shift, height = kPackThreads >> grid.shift;
  const int row_step = grid.along_cols ? 0 : height, col_step = grid.along_cols ? width * kPack : 0;
  const int64_t row = int64_t(row_block) * (grid.along_cols ? height : height * kSteps) + (threadIdx.x >> grid.shift);
  const int64_t col = int64_t(col_block) * (grid.along_cols ? width * kPack * kSteps : width * kPack) +
                      (threadIdx.x & (width - 1)) * kPack;
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
    at[u] = {row + u * row_step, col + u * col_step, 0};
    const int64_t left = at[u].row < rows ? cols - at[u].col : 0;
    at[u].n = left <= 0 ? 0 : left < kPack ? int(left) : kPack;
  }
}

// The inputs of a pass at one element. What is absent is 0.
template <class V>
struct GatedActPoint {
  V gate, up, d, dd_gate, dd_up;
  bool gated;
};

// Each pass: what it reads, as bits, and out[] at a point.
struct GatedActForward {
  static constexpr uint32_t kReads = 1 << kGate | 1 << kUp;
  static constexpr int kOuts = 1;
  template <class Act, class V>
  FFN_FN static void compute(const GateNumbers<V>& n, const GatedActPoint<V>& p, V (&out)[3]) {
    out[0] = gate_value<Act>(n, p.gate, p.up, p.gated);
  }
};

struct GatedActBackward {
  static constexpr uint32_t kReads = GatedActForward::kReads | 1 << kDOut;
  static constexpr int kOuts = 3;
  template <class Act, class V>
  FFN_FN static void compute(const GateNumbers<V>& n, const GatedActPoint<V>& p, V (&out)[3]) {
    const auto g = gate_grad<Act>(n, p.gate, p.up, p.d, p.gated);
    out[0] = g.d_gate;
    out[1] = g.d_up;
    out[2] = g.y;
  }
};

struct GatedActDoubleBackward {
  static constexpr uint32_t kReads = 1 << kGate | 1 << kUp | 1 << kDOut | 1 << kDdGate | 1 << kDdUp;
  static constexpr int kOuts = 3;
  template <class Act, class V>
  FFN_FN static void compute(const GateNumbers<V>& n, const GatedActPoint<V>& p, V (&out)[3]) {
    const auto g = gate_grad2<Act>(n, p.gate, p.up, p.d, p.dd_gate, p.dd_up, p.gated);
    out[0] = g.by_d;
    out[1] = g.by_gate;
    out[2] = g.by_up;
  }
};

// Own parameters from device memory, where they are there.
template <class S, class Act, class V>
FFN_FN void read_own(const GatedAct& g, GateNumbers<V>& numbers) {
  constexpr int kCount = Act::own.count();
  if constexpr (Act::learned > 0)
    if (g.own_values)
#pragma unroll
      for (int k = 0; k < kCount; ++k) numbers.own[k] = V(static_cast<const ComputeOf<S>*>(g.own_values)[k]);
}

// N columns of every input, as they are stored.
template <class S, int N>
struct GatedActValues {
  using T = ComputeOf<S>;
  Elements<S, N> in[kGatedActInputs];
  Elements<T, N> sum;
  T weight;
  bool loaded;
};

template <class S, class Pass, bool kPlain, int N>
FFN_FN GatedActValues<S, N> load_gated_act(const GatedAct& g, const PackCoord& at) {
  using T = ComputeOf<S>;
  GatedActValues<S, N> v{};
  v.loaded = true;
  v.weight = 1;
#pragma unroll
  for (int i = 0; i < kGatedActInputs; ++i) {
    if (!(Pass::kReads >> i & 1)) continue;
    const Matrix m = gated_act_input(g, i);
    if (m.data) v.in[i] = load_elements<N>(element<S>(m, at.row, at.col));
  }
  if constexpr (!kPlain && __is_same(Pass, GatedActForward))
    if (g.accumulate) v.sum = load_elements<N>(static_cast<const T*>(g.sum) + at.row * g.cols + at.col);
  if constexpr (!kPlain && __is_same(Pass, GatedActBackward))
    if (g.row_weight) v.weight = static_cast<const T*>(g.row_weight)[at.row];
  return v;
}

// Computes and stores. Results are 0 if nothing was loaded.
template <class S, class Act, class Pass, bool kPlain, int N>
FFN_FN void finish_gated_act(const GatedAct& g, const PackCoord& at, const GatedActValues<S, N>& v) {
  using T = ComputeOf<S>;
  using V = LaneOf<S>;
  constexpr bool kForward = __is_same(Pass, GatedActForward);
  GateNumbers<V> numbers(g, g.limited());
  if constexpr (!kPlain) read_own<S, Act>(g, numbers);
  T results[Pass::kOuts][N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    GatedActPoint<V> point{v.in[kGate][i],   v.in[kUp][i],   v.in[kDOut][i],
                           v.in[kDdGate][i], v.in[kDdUp][i], g.up.data != nullptr};
    V out[3];
    Pass::template compute<Act>(numbers, point, out);
    if constexpr (!kPlain && kForward)
      if (g.accumulate) out[0] = V(v.sum[i]) + out[0];
    if constexpr (!kPlain && __is_same(Pass, GatedActBackward)) out[2] = V(v.weight) * out[2];
#pragma unroll
    for (int j = 0; j < Pass::kOuts; ++j) results[j][i] = kPlain || v.loaded ? out[j].value : T(0);
  }
#pragma unroll
  for (int j = 0; j < Pass::kOuts; ++j)
    if (g.out[j])
      store_elements(static_cast<S*>(g.out[j]) + at.row * g.out_stride[j] + at.col, Elements<S, N>::of(results[j]));
  if constexpr (!kPlain && kForward)
    if (g.sum) store_elements(static_cast<T*>(g.sum) + at.row * g.cols + at.col, Elements<T, N>::of(results[0]));
}

// All steps of a thread: first what they load, then the arithmetic. A part of a pack goes column by column.
template <class S, class Act, class Pass, bool kPlain, int kPack, int kSteps>
FFN_FN void gated_act_steps(const GatedAct& g, const PackGrid& grid) {
  const int64_t rows_kept = !kPlain && g.kept ? *g.kept : g.rows;
  PackCoord at[kSteps];
  pack_places<kPack>(grid, g.rows, g.cols, at);
  GatedActValues<S, kPack> values[kSteps];
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
    values[u] = {};
    if (at[u].n == kPack && at[u].row < rows_kept) values[u] = load_gated_act<S, Pass, kPlain, kPack>(g, at[u]);
  }
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
    if (at[u].n == kPack) {
      finish_gated_act<S, Act, Pass, kPlain>(g, at[u], values[u]);
    } else if constexpr (kPack > 1) {
#pragma unroll 1
      for (PackCoord one = at[u]; one.n > 0; --one.n, ++one.col) {
        GatedActValues<S, 1> single{};
        if (one.row < rows_kept) single = load_gated_act<S, Pass, kPlain, 1>(g, one);
        finish_gated_act<S, Act, Pass, kPlain>(g, one, single);
      }
    }
  }
}

// One arithmetic in three ways: 16 bytes at a time without options, with them, and column by column.
template <class S, class Act, class Pass>
FFN_KERNEL_BOUNDS(kPackThreads, sizeof(S) == 2 ? 3 : 2)
__global__ void gated_act_kernel(GatedAct g, PackGrid grid) {
  if (!grid.vector) gated_act_steps<S, Act, Pass, false, 1, kScalarSteps>(g, grid);
  else if (grid.plain) gated_act_steps<S, Act, Pass, true, Pack<S>::kSize, kVectorSteps>(g, grid);
  else gated_act_steps<S, Act, Pass, false, Pack<S>::kSize, kVectorSteps>(g, grid);
}

// ---- sums for own parameters ----------------------------------------------------------------------------------------

// One row of partial sums for each block. Which thread adds what depends on the shape alone, and a block adds its warps
// in order.
template <class S, class Act>
__global__ void own_sums_kernel(OwnSums s) {
  using T = ComputeOf<S>;
  using V = Lane<T>;
  constexpr int kCount = Act::own.count(), kWarps = kPackThreads / kWarpSize;
  GateNumbers<V> numbers(s, false);
  read_own<S, Act>(s, numbers);
  V sums[kMostOwnParams], factors[kMostOwnParams];
#pragma unroll
  for (int k = 0; k < kMostOwnParams; ++k) sums[k] = V(0);
  const int64_t size = s.rows * s.cols, step = int64_t(gridDim.x) * kPackThreads;
  for (int64_t i = int64_t(blockIdx.x) * kPackThreads + threadIdx.x; i < size; i += step) {
    const int64_t r = s.rows > 1 ? i / s.cols : 0, c = i - r * s.cols;
    const V z(decode(*element<S>(s.gate, r, c)));
    V weight(decode(*element<S>(s.d_out, r, c)));
    if (s.dd_gate.data) weight *= V(decode(*element<S>(s.dd_gate, r, c)));
    own_factors<Act>(numbers, z, s.dd_gate.data != nullptr, factors);
#pragma unroll
    for (int k = 0; k < Act::learned; ++k) sums[k] = fma(weight, factors[k], sums[k]);
  }
  T* const shared = reinterpret_cast<T*>(dynamic_shared());  // [kWarps, kCount]
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const T sum = warp_sum(sums[k].value);
    if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize * kCount + k] = sum;
  }
  __syncthreads();
  if (int(threadIdx.x) < kCount) {
    T total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared[w * kCount + int(threadIdx.x)];
    static_cast<T*>(s.partial)[int64_t(blockIdx.x) * kCount + threadIdx.x] = total;
  }
}

// ---- sums over rows -------------------------------------------------------------------------------------------------

// Rows of a segment. Offsets may be hand-made, so they are clamped to the rows and made non-decreasing.
struct Segment {
  int64_t begin, end;
};

FFN_FN Segment segment_of(const ColumnSum& s, int64_t e) {
  if (!s.offsets) return {0, s.rows};
  const int64_t begin = held(s.offsets[e], 0, s.rows);
  return {begin, held(s.offsets[e + 1], begin, s.rows)};
}

FFN_FN int64_t first_slot(const Segment& segment, int64_t e) { return segment.begin / kPartRows + e; }

// The segment of `slot`: the last one whose first slot is not after it.
FFN_FN int64_t segment_of_slot(const ColumnSum& s, int64_t slot) {
  int64_t low = 0, high = s.experts - 1;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (first_slot(segment_of(s, middle), middle) <= slot) low = middle;
    else high = middle - 1;
  }
  return low;
}

template <class T>
FFN_FN T add_weighted(T sum, T value, const T* weight, T w) {
  return weight ? fma(Lane<T>(w), Lane<T>(value), Lane<T>(sum)).value : sum + value;
}

// One part, into `partial`. Warp w adds rows w, w + 8, ... of the part, then the eight sums are added in order: the
// order depends on a row's place in its segment alone.
template <class S>
__global__ void column_sum_kernel(ColumnSum s, ColumnSumGrid grid) {
  using T = ComputeOf<S>;
  constexpr int kPack = Pack<S>::kSize, kWidth = kWarpSize * kPack, kAtOnce = 4;
  T* const shared = reinterpret_cast<T*>(dynamic_shared());
  const uint32_t slot = blockIdx.x / grid.col_blocks;
  const int64_t col0 = int64_t(blockIdx.x - slot * grid.col_blocks) * kWidth;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t e = segment_of_slot(s, slot);
  const Segment segment = segment_of(s, e);
  const int64_t part = int64_t(slot) - first_slot(segment, e), first = segment.begin + part * kPartRows;
  if (part < 0 || first >= segment.end) return;  // nobody's slot
  const int64_t end = segment.end - first < kPartRows ? segment.end : first + kPartRows;
  const int64_t col = col0 + lane * kPack, left = s.cols - col;
  const int n = left < 0 ? 0 : left < kPack ? int(left) : kPack;
  const T* const weight = static_cast<const T*>(s.weight);

  T sum[kPack] = {};
  for (int64_t r0 = first + warp; r0 < end && n > 0; r0 += kAtOnce * kSumHeight) {
    Pack<S> values[kAtOnce];
    T w[kAtOnce];
    bool there[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t r = r0 + i * kSumHeight;
      there[i] = r < end;
      const int64_t from = there[i] && s.gather ? s.gather[r] : r;
      there[i] = there[i] && (!s.gather || (from >= 0 && from < s.gather_limit));
      w[i] = there[i] && weight ? weight[r] : T(1);
      if (there[i]) values[i] = load_pack<kPack>(element<S>(s.matrix, from, col), s.matrix.col_stride, n, grid.vector);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (there[i])
#pragma unroll
        for (int j = 0; j < kPack; ++j) sum[j] = add_weighted(sum[j], values[i][j], weight, w[i]);
  }
#pragma unroll
  for (int j = 0; j < kPack; ++j) shared[warp * kWidth + j * kWarpSize + lane] = sum[j];
  __syncthreads();
  for (int i = threadIdx.x; i < kWidth; i += kPackThreads) {
    const int64_t c = col0 + i % kWarpSize * kPack + i / kWarpSize;
    T total = 0;
    for (int h = 0; h < kSumHeight; ++h) total += shared[h * kWidth + i];
    if (c < s.cols) static_cast<T*>(s.partial)[slot * s.cols + c] = total;
  }
}

// The parts of each segment, in order, in runs of 32 lest the error grow with their number.
template <class S>
__global__ void column_sum_parts_kernel(ColumnSum s) {
  using T = ComputeOf<S>;
  constexpr int64_t kRun = 32;
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= s.experts * s.cols) return;
  const int64_t e = at / s.cols, c = at - e * s.cols;
  const Segment segment = segment_of(s, e);
  const int64_t parts = divide_up(segment.end - segment.begin, kPartRows);
  const T* const partial = static_cast<const T*>(s.partial) + first_slot(segment, e) * s.cols + c;
  T total = 0;
  for (int64_t run = 0; run < parts; run += kRun) {
    T sum = 0;
    for (int64_t p = run; p < parts && p < run + kRun; ++p) sum += partial[p * s.cols];
    total += sum;
  }
  static_cast<S*>(s.out)[at] = encode<S>(total);
}

}  // namespace ffn_ops::cuda
