// SPDX-License-Identifier: BSD-3-Clause
// Moves rows between tokens and experts, and computes products of rows with their tokens. Nothing is scattered: each
// output row gathers its inputs in one order. Routes may be hand-made: an index out of range counts as dropped.
#pragma once

#include "elementwise.cuh"

namespace ffn_ops::cuda {

FFN_FN int64_t kept_rows(const Routes& routes) { return held(*routes.kept, 0, routes.rows); }

// out[r] = weight[r] * in[token[r]].
template <class S>
FFN_KERNEL_BOUNDS(kPackThreads, 4)
__global__ void dispatch_rows_kernel(MoveRows m, PackGrid grid) {
  using T = ComputeOf<S>;
  constexpr int kPack = Pack<S>::kSize;
  const int64_t kept = kept_rows(m.routes);
  const T* const weight = static_cast<const T*>(m.weight);
  PackCoord at[kVectorSteps];
  pack_places<kPack>(grid, m.routes.rows, m.cols, at);
  Pack<S, kPack> in[kVectorSteps]{};
  T w[kVectorSteps];
#pragma unroll
  for (int u = 0; u < kVectorSteps; ++u) {
    w[u] = 1;
    if (at[u].n == 0 || at[u].row >= kept) continue;
    const int64_t t = m.routes.token[at[u].row];
    if (t < 0 || t >= m.routes.tokens) continue;
    if (weight) w[u] = weight[at[u].row];
    in[u] = load_pack<kPack>(element<S>(m.in, t, at[u].col), m.in.col_stride, at[u].n, grid.vector & 1);
  }
#pragma unroll
  for (int u = 0; u < kVectorSteps; ++u) {
    if (at[u].n == 0) continue;
    T out[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) out[i] = w[u] * in[u][i];
    store_pack(static_cast<S*>(m.out) + at[u].row * m.out_stride + at[u].col, Pack<S>::of(out), at[u].n,
               grid.vector >> 1 & 1);
  }
}

// out[t] = sum of weight[r] * in[r] over the rows of t, with a few loads in flight.
template <class S>
FFN_KERNEL_BOUNDS(kPackThreads, 2)
__global__ void combine_rows_kernel(MoveRows m, PackGrid grid) {
  using T = ComputeOf<S>;
  constexpr int kPack = Pack<S>::kSize, kAtOnce = 4;
  const int64_t kept = kept_rows(m.routes);
  const T* const weight = static_cast<const T*>(m.weight);
  PackCoord packs[kVectorSteps];
  pack_places<kPack>(grid, m.routes.tokens, m.cols, packs);
#pragma unroll
  for (const PackCoord& at : packs) {
    if (at.n == 0) continue;
    const int64_t begin = held(m.routes.slot_offsets[at.row], 0, m.routes.rows);
    const int64_t end = held(m.routes.slot_offsets[at.row + 1], begin, m.routes.rows);
    Lane<T> sum[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum[i] = Lane<T>::zero();
    for (int64_t first = begin; first < end; first += kAtOnce) {
      Pack<S, kPack> in[kAtOnce];
      T w[kAtOnce];
      bool there[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t r = first + j < end ? m.routes.row[first + j] : -1;
        there[j] = r >= 0 && r < kept;
        if (!there[j]) continue;
        w[j] = weight ? weight[r] : T(1);
        in[j] = load_pack<kPack>(element<S>(m.in, r, at.col), m.in.col_stride, at.n, grid.vector & 1);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (there[j])
#pragma unroll
          for (int i = 0; i < kPack; ++i) sum[i] = fma(Lane<T>(w[j]), Lane<T>(in[j][i]), sum[i]);
    }
    T out[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) out[i] = sum[i].value;
    store_pack(static_cast<S*>(m.out) + at.row * m.out_stride + at.col, Pack<S>::of(out), at.n, grid.vector >> 1 & 1);
  }
}

// The expert of row r: the first one that ends after r, or the last of all.
FFN_FN int64_t expert_of_row(const int64_t* offsets, int64_t experts, int64_t r) {
  int64_t low = 0, high = experts - 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (offsets[middle + 1] > r) high = middle;
    else low = middle + 1;
  }
  return low;
}

// One warp for each row: a lane adds packs that lie a warp apart, each pack's products first.
template <class S>
__global__ void row_dots_kernel(RowDots d, uint32_t vector) {
  using T = ComputeOf<S>;
  constexpr int kPack = Pack<S>::kSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t r = int64_t(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  if (r >= d.routes.rows) return;
  T total = 0;
  if (r < kept_rows(d.routes)) {  // the same for all of a warp
    const T* const parts = static_cast<const T*>(d.parts) + r * d.num_parts;
    for (int64_t i = lane; i < d.num_parts; i += kWarpSize) total += parts[i];
    const int64_t t = d.a.data ? d.routes.token[r] : -1;
    if (t >= 0 && t < d.routes.tokens) {
      const int64_t b_row = d.offsets ? expert_of_row(d.offsets, d.experts, r) : r;
      T dot = 0;
#pragma unroll 2
      for (int64_t c = lane * kPack; c < d.cols; c += kWarpSize * kPack) {
        const int n = d.cols - c < kPack ? int(d.cols - c) : kPack;
        const Pack<S> a = load_pack<kPack>(element<S>(d.a, t, c), d.a.col_stride, n, vector & 1);
        const Pack<S> b = load_pack<kPack>(element<S>(d.b, b_row, c), d.b.col_stride, n, vector >> 1 & 1);
        Lane<T> sum = Lane<T>::zero();
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum = fma(Lane<T>(a[i]), Lane<T>(b[i]), sum);
        dot += sum.value;
      }
      total += dot;
    }
    total = warp_sum(total);
  }
  if (lane == 0) static_cast<T*>(d.out)[r] = total;
}

}  // namespace ffn_ops::cuda
