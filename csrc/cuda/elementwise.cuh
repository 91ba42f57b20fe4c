// Gated activation with its first and second derivatives, and sums over rows. Bound by memory: each thread has several
// 16-byte loads in flight, and parts of a pack go through the same arithmetic as whole ones.
#pragma once

#include "grid.h"
#include "scalar.cuh"
#include "warp.cuh"

namespace ffn_ops::cuda {

// The pack that a thread works on in step u: its row, first column, and how many columns it has (0: none).
struct PackPlace {
  int64_t row, col;
  int n;
};

template <int kPack>
FFN_FN PackPlace pack_place(const PackGrid& grid, int u, int64_t rows, int64_t cols) {
  const uint32_t row_block = blockIdx.x / grid.col_blocks, col_block = blockIdx.x - row_block * grid.col_blocks;
  const int64_t width = int64_t{1} << grid.shift, height = kPackThreads >> grid.shift;
  int64_t row = row_block * height, col = col_block * width;
  if (grid.along_cols) col = col * kUnroll + u * width;
  else row = row * kUnroll + u * height;
  row += threadIdx.x >> grid.shift;
  col = (col + (threadIdx.x & (width - 1))) * kPack;
  const int64_t left = row < rows ? cols - col : 0;
  return {row, col, left < 0 ? 0 : left < kPack ? int(left) : kPack};
}

// The inputs of one pass at one element; absent ones are 0, an absent `up` is told by `gated`.
template <class V>
struct GatedActPoint {
  V gate, up, d, dd_gate, dd_up, beta;
  bool gated;
};

// Each pass: what it reads, as bits, and out[] at a point. As in cpu/kernels/act.h.
struct GatedActForward {
  static constexpr uint32_t kReads = 1 << kGate | 1 << kUp | 1 << kBiasGate | 1 << kBiasUp;
  template <class Act, class V>
  FFN_FN static void compute(const GatedActPoint<V>& p, V (&out)[3]) {
    const V value = Act::fwd(p.gate, p.beta);
    out[0] = p.gated ? value * p.up : value;
    out[1] = p.gate;
    out[2] = p.up;
  }
};

struct GatedActBackward {
  static constexpr uint32_t kReads = GatedActForward::kReads | 1 << kDOut;
  template <class Act, class V>
  FFN_FN static void compute(const GatedActPoint<V>& p, V (&out)[3]) {
    const auto act = Act::grad(p.gate, p.beta);
    const V d_gate = p.d * act.slope;
    out[0] = p.gated ? d_gate * p.up : d_gate;
    out[1] = p.d * act.value;
    out[2] = p.gated ? act.value * p.up : act.value;
  }
};

struct GatedActDoubleBackward {
  static constexpr uint32_t kReads = 1 << kGate | 1 << kUp | 1 << kDOut | 1 << kDdGate | 1 << kDdUp;
  template <class Act, class V>
  FFN_FN static void compute(const GatedActPoint<V>& p, V (&out)[3]) {
    const auto act = Act::grad2(p.gate, p.beta);
    const V scaled = p.gated ? p.dd_gate * p.up : p.dd_gate;
    out[0] = fma(scaled, act.slope, p.dd_up * act.value);
    out[1] = p.d * fma(scaled, act.curvature, p.dd_up * act.slope);
    out[2] = p.dd_gate * p.d * act.slope;
  }
};

// The columns of one pack: arithmetic on what was loaded, and the stores.
template <class S, class Act, class Pass>
FFN_FN void gated_act_pack(const GatedAct& g, const PackGrid& grid, const PackPlace& at,
                           const Pack<S> (&in)[kGatedActInputs], bool kept) {
  using V = Lane<ComputeOf<S>>;
  using T = ComputeOf<S>;
  constexpr int kPack = Pack<S>::kSize;
  constexpr bool kForward = __is_same(Pass, GatedActForward);
  const int64_t at_sum = at.row * g.cols + at.col;
  Pack<T, kPack> sum{};
  if (kForward && g.accumulate && kept)
    sum = load_pack<kPack>(static_cast<const T*>(g.sum) + at_sum, 1, at.n, grid.vector >> kSumBit & 1);
  const T weight =
      __is_same(Pass, GatedActBackward) && g.row_weight && kept ? static_cast<const T*>(g.row_weight)[at.row] : T(1);
  Pack<S> packs[3]{};
  Pack<T, kPack> sums{};
  if (kept) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      V gate(in[kGate][i]), up(in[kUp][i]);
      if ((Pass::kReads >> kBiasGate & 1) && g.bias_gate) gate = gate + V(in[kBiasGate][i]);
      if ((Pass::kReads >> kBiasUp & 1) && g.bias_up) up = up + V(in[kBiasUp][i]);
      const GatedActPoint<V> point{gate,         up,           in[kDOut][i],        in[kDdGate][i],
                                   in[kDdUp][i], V(T(g.beta)), g.up.data != nullptr};
      V out[3];
      Pass::template compute<Act>(point, out);
      if (kForward && g.accumulate) out[0] = V(sum[i]) + out[0];
      if (__is_same(Pass, GatedActBackward)) out[2] = V(weight) * out[2];
      if (kForward) sums.set(i, out[0].value);
#pragma unroll
      for (int j = 0; j < 3; ++j) packs[j].set(i, out[j].value);
    }
  }
#pragma unroll
  for (int j = 0; j < 3; ++j)
    if (g.out[j])
      store_pack(static_cast<S*>(g.out[j]) + at.row * g.out_stride[j] + at.col, packs[j], at.n,
                 grid.vector >> (kGatedActInputs + j) & 1);
  if (kForward && g.sum) store_pack(static_cast<T*>(g.sum) + at_sum, sums, at.n, grid.vector >> kSumBit & 1);
}

template <class S, class Act, class Pass>
FFN_KERNEL_BOUNDS(kPackThreads, 2)
__global__ void gated_act_kernel(GatedAct g, PackGrid grid) {
  constexpr int kPack = Pack<S>::kSize;
  const int64_t rows_kept = g.kept ? *g.kept : g.rows;
  PackPlace at[kUnroll];
  Pack<S> in[kUnroll][kGatedActInputs]{};
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    at[u] = pack_place<kPack>(grid, u, g.rows, g.cols);
    if (at[u].n == 0 || at[u].row >= rows_kept) continue;
#pragma unroll
    for (int i = 0; i < kGatedActInputs; ++i) {
      const Matrix m = gated_act_input(g, i);
      if ((Pass::kReads >> i & 1) && m.data)
        in[u][i] = load_pack<kPack>(element<S>(m, at[u].row, at[u].col), m.col_stride, at[u].n, grid.vector >> i & 1);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (at[u].n > 0) gated_act_pack<S, Act, Pass>(g, grid, at[u], in[u], at[u].row < rows_kept);
}

// ---- sums over rows -------------------------------------------------------------------------------------------------

// Rows of a segment. Offsets may be anyone's: they are held within the rows, and never fall.
struct Segment {
  int64_t begin, end;
};

FFN_FN Segment segment_of(const ColumnSum& s, int64_t e) {
  if (!s.offsets) return {0, s.rows};
  const int64_t begin = held(s.offsets[e], 0, s.rows);
  return {begin, held(s.offsets[e + 1], begin, s.rows)};
}

FFN_FN int64_t first_slot(const Segment& segment, int64_t e) { return segment.begin / kPartRows + e; }

// The segment whose parts `slot` lies among: the last one whose first slot is not behind it.
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
