// The grouped product's one kernel: a block finds its tile, streams operands through shared memory in stages, and hands
// the finished tile to the epilogue. And the choice among its instances, which launches and tests share.
#pragma once

#include "epilogue.cuh"
#include "gemm_load.cuh"
#include "gemm_mma.cuh"
#include "gemm_tiled.cuh"
#include "gemm_tiles.cuh"

namespace ffn_ops::cuda {

// One instance. kRows: A is stored along k; kOuter: both operands run along lanes, as rows are k there.
template <class S, bool kTall, bool kOuter_, bool kBAlongK, bool kVector>
struct GemmInstance {
  using Storage = S;
  static constexpr bool kOuter = kOuter_;
  static constexpr GemmTile kTile = gemm_tile(Codec<S>::kDType, kTall);
  static constexpr int BLOCK_M = kTile.rows, BLOCK_N = kTile.cols, BLOCK_K = kTile.depth;
  static constexpr bool kShortFloat = sizeof(S) == 4 && !kTall;

  template <bool kMma, class>
  struct CoreOf {
    using Type = MmaCore<S, BLOCK_M, BLOCK_N, BLOCK_K, !kOuter, kBAlongK>;
  };
  template <class Unused>
  struct CoreOf<false, Unused> {
    using Type = TiledCore<S, BLOCK_M, BLOCK_N, BLOCK_K, kShortFloat ? 8 : 16, !kOuter, kBAlongK>;
  };
  using Core = typename CoreOf<sizeof(S) == 2, void>::Type;
  using LoaderA = TileLoader<S, BLOCK_M, BLOCK_K, !kOuter, kVector>;
  using LoaderB = TileLoader<S, BLOCK_N, BLOCK_K, kBAlongK, kVector>;
  static constexpr int kStageBytes = LoaderA::Tile::kBytes + LoaderB::Tile::kBytes;
  static_assert(kGemmStages * kStageBytes <= gemm_shared_bytes(Codec<S>::kDType, kTall));
  static_assert(BLOCK_M * (BLOCK_N + kTilePadding) * int(sizeof(typename Core::Scalar)) <=
                gemm_shared_bytes(Codec<S>::kDType, kTall));
};

// What the block reads of A and of B.
template <class I>
FFN_FN OperandPart part_a(const GroupedGemm& job, const TilePlace& place) {
  const RowTile& rows = place.rows;
  if (I::kOuter) return {job.a, job.a, I::BLOCK_M, rows.expert, place.m, job.M, rows.row, rows.row + rows.rows, true};
  return {job.a, job.a, I::BLOCK_M, 0, rows.row, rows.row + rows.rows, 0, job.K, false};
}
template <class I>
FFN_FN OperandPart part_b(const GroupedGemm& job, const TilePlace& place) {
  const RowTile& rows = place.rows;
  if (I::kOuter) return {job.b, job.b, I::BLOCK_N, rows.expert, place.n, job.N, rows.row, rows.row + rows.rows, true};
  return {job.b, job.b_up, job.gated ? I::BLOCK_N / 2 : I::BLOCK_N, rows.expert, place.n, job.N, 0, job.K, false};
}

// core += the product over all of k. While one stage is multiplied, the next kGemmStages - 1 are on their way.
template <class I>
FFN_FN void run_stages(const GroupedGemm& job, const TilePlace& place, typename I::Core& core) {
  char* const shared = dynamic_shared();
  constexpr int kAhead = kGemmStages - 1;
  typename I::LoaderA loader_a(part_a<I>(job, place));
  typename I::LoaderB loader_b(part_b<I>(job, place));
  const auto a_of = [&](int slot) { return shared + slot * I::kStageBytes; };
  const auto b_of = [&](int slot) { return shared + slot * I::kStageBytes + I::LoaderA::Tile::kBytes; };

  int64_t left = I::kOuter ? place.rows.rows : job.K;  // of k, from the stage that is multiplied next on
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
  for (; left > 0; left -= I::BLOCK_K) {
    cp_async_wait<kAhead - 1>();
    __syncthreads();  // the stage in `slot` is there for all, and the one before it is no longer read
    const bool more = left > kAhead * I::BLOCK_K;
    if (more) {
      loader_a.load(a_of(ahead), left - kAhead * I::BLOCK_K);
      loader_b.load(b_of(ahead), left - kAhead * I::BLOCK_K);
    }
    cp_async_commit();
    core.multiply(a_of(slot), b_of(slot));
    if (more) {
      loader_a.store(a_of(ahead));
      loader_b.store(b_of(ahead));
    }
    slot = slot + 1 == kGemmStages ? 0 : slot + 1;
    ahead = ahead + 1 == kGemmStages ? 0 : ahead + 1;
  }
  cp_async_wait<0>();
}

// Dynamic shared memory: the stages; after them, in the same place, the finished tile.
template <class I>
__global__ void FFN_KERNEL_BOUNDS(kGemmThreads, 2)
    grouped_gemm_kernel(GroupedGemm job, GemmPlan plan, const RowTile* table) {
  using S = typename I::Storage;
  using T = ComputeOf<S>;
  const int cols = job.gated ? I::BLOCK_N / 2 : I::BLOCK_N;
  const TilePlace place = find_tile(job, plan, table, I::BLOCK_M, cols);
  FinishedTile<T> tile{reinterpret_cast<T*>(dynamic_shared()),
                       I::BLOCK_N + kTilePadding,
                       I::BLOCK_N,
                       place.rows.row,
                       place.rows.rows,
                       place.n,
                       place.rows.expert};
  if (I::kOuter) {
    tile.row = place.rows.expert * job.M + place.m;
    tile.rows = job.M - place.m;
  } else {
    if (place.rows.rows == 0) return;
    if (place.rows.expert == job.E) return zero_tile<S>(job, tile, I::BLOCK_M, cols);
  }

  typename I::Core core;
  run_stages<I>(job, place, core);
  __syncthreads();  // the stages are no longer read
  core.hand_over(reinterpret_cast<T*>(dynamic_shared()), tile.stride);
  __syncthreads();
  finish_tile<S>(job, tile, I::BLOCK_M);
}

// Calls f(Tag<GemmInstance>{}) for the instance that does `plan`.
template <class S, class F>
void dispatch_gemm(const GroupedGemm& job, const GemmPlan& plan, const F& f) {
  const auto with = [&]<bool kTall, bool kVector>() {
    if (job.kind == GroupedGemm::Kind::kOuter) f(Tag<GemmInstance<S, kTall, true, false, kVector>>{});
    else if (plan.b_along_k) f(Tag<GemmInstance<S, kTall, false, true, kVector>>{});
    else f(Tag<GemmInstance<S, kTall, false, false, kVector>>{});
  };
  if (plan.tall && plan.vector) with.template operator()<true, true>();
  else if (plan.tall) with.template operator()<true, false>();
  else if (plan.vector) with.template operator()<false, true>();
  else with.template operator()<false, false>();
}

}  // namespace ffn_ops::cuda
