// SPDX-License-Identifier: BSD-3-Clause
// The grouped product's one kernel: a block finds its tile, streams operands through shared memory in stages, and hands
// the finished tile to the epilogue. Also the choice among its instances, which launches and tests share.
#pragma once

#include "epilogue.cuh"
#include "gemm_load.cuh"
#include "gemm_mma.cuh"
#include "gemm_tiled.cuh"
#include "gemm_tiles.cuh"
#include "sm90/gemm_wgmma.cuh"

namespace ffn_ops::cuda {

// One instance. kRows: A is stored along k; kOuter: both operands run along lanes, as rows are k there.
template <class S, GemmShape kShape, bool kHopper_, bool kOuter_, bool kBAlongK, bool kVector>
struct GemmInstance {
  using Storage = S;
  using Job = GroupedGemm;
  static constexpr bool kHopper = kHopper_, kOuter = kOuter_;
  static constexpr GemmTile kTile = gemm_tile(Codec<S>::kDType, kShape, kHopper);
  static constexpr int BLOCK_M = kTile.rows, BLOCK_N = kTile.cols, BLOCK_K = kTile.depth;
  static constexpr bool kShortFloat = sizeof(S) == 4 && kShape == GemmShape::kShort;

  template <int kBytes, bool kWgmma>
  struct CoreOf {
    using Type = TiledCore<S, BLOCK_M, BLOCK_N, BLOCK_K, kShortFloat ? 8 : 16, !kOuter, kBAlongK>;
  };
  template <bool kWgmma>
  struct CoreOf<2, kWgmma> {
    using Type = std::conditional_t<kWgmma, WgmmaCore<S, BLOCK_M, BLOCK_N, BLOCK_K, !kOuter, kBAlongK>,
                                    MmaCore<S, BLOCK_M, BLOCK_N, BLOCK_K, !kOuter, kBAlongK>>;
  };
  using Core = typename CoreOf<sizeof(S), kHopper>::Type;
  using LoaderA = TileLoader<typename Core::TileA, S, BLOCK_K, !kOuter, kVector>;
  using LoaderB = TileLoader<typename Core::TileB, S, BLOCK_K, kBAlongK, kVector>;
  static constexpr int kStageBytes = Core::TileA::kBytes + Core::TileB::kBytes;
  static constexpr int64_t kSharedBytes = gemm_shared_bytes(Codec<S>::kDType, kShape, kHopper);
  static_assert(kTile.stages * kStageBytes <= kSharedBytes);
  static_assert(BLOCK_M * (BLOCK_N + kTilePadding) * int(sizeof(typename Core::Scalar)) <= kSharedBytes);
  // Products in flight (Hopper) while the next stage loads. If two blocks share a multiprocessor, one's
  // products fill the other's waiting.
  static constexpr int kRunning = kHopper && kTile.blocks == 1 ? 1 : 0;
  // Rows that the epilogue reads at a time: fewer where the registers would not hold them.
  static constexpr int kEpilogueRows = sizeof(S) == 8 || !kVector ? 2 : 4;
};

// What the block reads of A and of B.
template <class I>
FFN_FN OperandPart part_a(const GroupedGemm& job, const TileCoord& coord) {
  const RowTile& rows = coord.rows;
  if (I::kOuter) return {job.a, job.a, I::BLOCK_M, rows.expert, coord.m, job.M, rows.row, rows.row + rows.rows, true};
  return {job.a, job.a, I::BLOCK_M, 0, rows.row, rows.row + rows.rows, 0, job.K, false};
}
template <class I>
FFN_FN OperandPart part_b(const GroupedGemm& job, const TileCoord& coord) {
  const RowTile& rows = coord.rows;
  if (I::kOuter) return {job.b, job.b, I::BLOCK_N, rows.expert, coord.n, job.N, rows.row, rows.row + rows.rows, true};
  return {job.b, job.b_up, job.gated ? I::BLOCK_N / 2 : I::BLOCK_N, rows.expert, coord.n, job.N, 0, job.K, false};
}

// core += the product over all of k. While one stage is multiplied, the next kAhead are loading, and products may still
// read the last kRunning before it.
template <class I>
FFN_FN void run_stages(const typename I::Job& job, const TileCoord& coord, typename I::Core& core) {
  char* const shared = dynamic_shared();
  constexpr int kStages = I::kTile.stages, kAhead = kStages - 1 - I::kRunning;
  typename I::LoaderA loader_a(part_a<I>(job, coord));
  typename I::LoaderB loader_b(part_b<I>(job, coord));
  const auto a_of = [&](int slot) { return shared + slot * I::kStageBytes; };
  const auto b_of = [&](int slot) { return shared + slot * I::kStageBytes + I::Core::TileA::kBytes; };

  int64_t left = I::kOuter ? coord.rows.rows : job.K;  // of k, from the stage that is multiplied next on
  for (int s = 0; s < kAhead; ++s) {
    if (left > s * I::BLOCK_K) {
      loader_a.load(a_of(s), left - s * I::BLOCK_K);
      loader_b.load(b_of(s), left - s * I::BLOCK_K);
      loader_a.store(a_of(s));
      loader_b.store(b_of(s));
    }
    cp_async_commit();
  }
  int slot = 0, ahead = kAhead;
  const auto step = [&] {
    cp_async_wait<kAhead - 1>();
    if constexpr (I::kHopper) fence_async();
    __syncthreads();  // all threads see the stage in `slot`, and nobody reads the one in `ahead` any more
    if constexpr (I::kHopper) core.start(a_of(slot), b_of(slot));
    const bool more = left > kAhead * I::BLOCK_K;
    if (more) {
      loader_a.load(a_of(ahead), left - kAhead * I::BLOCK_K);
      loader_b.load(b_of(ahead), left - kAhead * I::BLOCK_K);
    }
    cp_async_commit();
    if constexpr (I::kHopper) wgmma_wait<I::kRunning>();
    else core.multiply(a_of(slot), b_of(slot));
    if (more) {
      loader_a.store(a_of(ahead));
      loader_b.store(b_of(ahead));
    }
    slot = slot + 1 == kStages ? 0 : slot + 1;
    ahead = ahead + 1 == kStages ? 0 : ahead + 1;
    left -= I::BLOCK_K;
  };
  // Products that run on from one step into the next: only what other products left may be in their registers then.
  if constexpr (I::kRunning > 0) {
    if (left > 0) step();
  }
  while (left > 0) step();
  cp_async_wait<0>();
  if constexpr (I::kHopper) wgmma_wait<0>();
}

// The block's tile, from its coordinates to its epilogue. Dynamic shared memory: the stages; after them, in the same
// place, the finished tile.
template <class I>
FFN_FN void make_tile(const typename I::Job& job, const GemmPlan& plan, const RowTile* table) {
  using S = typename I::Storage;
  using T = ComputeOf<S>;
  const int cols = job.gated ? I::BLOCK_N / 2 : I::BLOCK_N;
  const TileCoord coord = find_tile(job, plan, table, I::BLOCK_M, cols);
  FinishedTile<T> tile{reinterpret_cast<T*>(dynamic_shared()),
                       I::BLOCK_N + kTilePadding,
                       I::BLOCK_N,
                       coord.rows.row,
                       coord.rows.rows,
                       coord.n,
                       coord.rows.expert};
  if (I::kOuter) {
    tile.row = coord.rows.expert * job.M + coord.m;
    tile.rows = job.M - coord.m;
  } else {
    if (coord.rows.rows == 0) return;
    if (coord.rows.expert == job.E) return zero_tile<S>(job, tile, I::BLOCK_M, cols);
  }

  typename I::Core core;
  run_stages<I>(job, coord, core);
  __syncthreads();  // the stages are no longer read
  core.hand_over(reinterpret_cast<T*>(dynamic_shared()), tile.stride);
  __syncthreads();
  finish_tile<S, I::kEpilogueRows>(job, tile, I::BLOCK_M);
}

// For 16 bits each GPU uses one kind of product; the other is not compiled for it.
template <class I>
__global__ void FFN_KERNEL_BOUNDS(kGemmThreads, I::kTile.blocks)
    grouped_gemm_kernel(GroupedGemm job, GemmPlan plan, const RowTile* table) {
  if constexpr (sizeof(typename I::Storage) != 2 || runs_here(I::kHopper)) make_tile<I>(job, plan, table);
  else refuse();
}

// Calls f(Tag<GemmInstance>{}) for the instance that does `plan`, among those for Hopper if they are compiled.
template <class S, bool kWithHopper, class F>
void dispatch_gemm(const GroupedGemm& job, const GemmPlan& plan, const F& f) {
  using enum GemmShape;
  const auto with = [&]<GemmShape kShape, bool kHopper, bool kVector>() {
    if (job.kind == GroupedGemm::Kind::kOuter) f(Tag<GemmInstance<S, kShape, kHopper, true, false, kVector>>{});
    else if (plan.b_along_k) f(Tag<GemmInstance<S, kShape, kHopper, false, true, kVector>>{});
    else f(Tag<GemmInstance<S, kShape, kHopper, false, false, kVector>>{});
  };
  if constexpr (sizeof(S) == 2 && kWithHopper) {
    if (plan.hopper) {
      if (!plan.vector) with.template operator()<kShort, true, false>();
      else if (plan.shape == kShort) with.template operator()<kShort, true, true>();
      else if (plan.shape == kTall) with.template operator()<kTall, true, true>();
      else with.template operator()<kWide, true, true>();
      return;
    }
  }
  if (plan.shape == kTall && plan.vector) with.template operator()<kTall, false, true>();
  else if (plan.shape == kTall) with.template operator()<kTall, false, false>();
  else if (plan.vector) with.template operator()<kShort, false, true>();
  else with.template operator()<kShort, false, false>();
}

}  // namespace ffn_ops::cuda
