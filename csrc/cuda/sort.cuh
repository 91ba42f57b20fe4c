// SPDX-License-Identifier: BSD-3-Clause
// The stable sort of routed rows by expert, with capacity, and the rounding of tokens to tiles, as sort_plan.h cuts
// them into passes. Atomics only count; no order ever depends on them.
#pragma once

#include "sort_plan.h"
#include "warp.cuh"

namespace ffn_ops::cuda {

// a / b for a >= 0, b > 0, because 64-bit division is several times slower on a GPU.
FFN_FN int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return uint32_t(a) / uint32_t(b);
  return a / b;
}

// Maps descending values to ascending integers. All NaN come last; 0 and -0 are equal.
template <class T>
FFN_FN uint64_t descending_key(T value) {
  constexpr int kBits = 8 * sizeof(T);
  constexpr uint64_t sign = uint64_t{1} << (kBits - 1), all = sign | (sign - 1);
  if (value != value) return all;
  uint64_t bits;
  if constexpr (sizeof(T) == 4) bits = __builtin_bit_cast(uint32_t, value == 0 ? T(0) : value);
  else bits = __builtin_bit_cast(uint64_t, value == 0 ? T(0) : value);
  return bits & sign ? bits : all ^ sign ^ bits;
}

// An entry x is a number: its position among the entries in the order that the first pass begins with.
struct SortEntries {
  Sort s;
  const int64_t* order;  // entries by token, null: as they come
  const int64_t* start;
  char* kept;  // null: all

  // The entry of position x in the queue of those who want to be kept: all first choices before any second.
  FFN_FN int64_t queued(int64_t x) const {
    if (s.token) return x;
    const int64_t slot = divide(x, s.T);
    return (x - slot * s.T) * s.K + slot;
  }
  FFN_FN int64_t entry(SortKey key, int64_t x) const {
    switch (key) {
      case SortKey::kWeight:
      case SortKey::kExpert:
        return queued(x);
      case SortKey::kKept:
        return order ? order[x] : x;
      default:
        return x;
    }
  }
  FFN_FN int64_t token_of(int64_t i) const { return s.token[i] >= 0 && s.token[i] < s.T ? s.token[i] : s.T; }
  FFN_FN int64_t expert_of(int64_t i) const {
    const int64_t e = s.expert[i];
    return e >= 0 && e < s.E && (!s.token || token_of(i) < s.T) ? e : s.E;
  }
  FFN_FN uint64_t key(SortKey key, int64_t x) const {
    const int64_t i = entry(key, x);
    switch (key) {
      case SortKey::kToken:
        return uint64_t(token_of(i));
      case SortKey::kWeight:
        if (s.weight_dtype == DType::kFloat64) return descending_key(static_cast<const double*>(s.weight)[i]);
        return descending_key(static_cast<const float*>(s.weight)[i]);
      case SortKey::kKept:
        return uint64_t(!kept || kept[i] ? expert_of(i) : s.E);
      default:
        return uint64_t(expert_of(i));
    }
  }
  // Entry x has got its position among all.
  FFN_FN void finish(SortKey key, int64_t x, int64_t position) const {
    const int64_t i = entry(key, x);
    if (key == SortKey::kExpert) {
      const int64_t e = expert_of(i);
      kept[i] = e < s.E && position - start[e] < s.capacity;
      return;
    }
    if (s.weight_dtype == DType::kFloat64)
      static_cast<double*>(s.out_weight)[position] = static_cast<const double*>(s.weight)[i];
    else static_cast<float*>(s.out_weight)[position] = static_cast<const float*>(s.weight)[i];
    s.out_row[x] = position;
    if (s.token) {
      const int64_t t = token_of(i);
      s.out_token[position] = t < s.T ? t : 0;
      s.out_place[i] = position;
    } else {
      s.out_token[position] = divide(i, s.K);
    }
  }
  // Writes the rest after all entries are finished; each thread writes a part.
  FFN_FN void finish_rest(SortKey key, int64_t thread, int64_t threads) const {
    if (key != SortKey::kKept || s.token) return;
    for (int64_t t = thread; t <= s.T; t += threads) s.out_slot_offsets[t] = t * s.K;
  }
};

// Entry x = e * T + t stands for token t and expert e.
struct RoundEntries {
  RoundTokens r;
  const int64_t* start;
  const char* chose;

  template <class T>
  FFN_FN uint64_t score_key(T v) const {
    constexpr T limit = T(1e30);  // as on the CPU, where sums of differences stay finite; NaN is the worst
    return descending_key(v > limit ? limit : v > -limit ? v : -limit);
  }
  FFN_FN uint64_t key(SortKey key, int64_t x) const {
    const int64_t e = divide(x, r.T), t = x - e * r.T;
    if (key == SortKey::kChoice) return uint64_t(2 * e + !chose[x]);
    if (r.dtype == DType::kFloat64) return score_key(static_cast<const double*>(r.scores)[t * r.E + e]);
    return score_key(static_cast<const float*>(r.scores)[t * r.E + e]);
  }
  FFN_FN void finish(SortKey, int64_t x, int64_t position) const {
    const int64_t e = divide(x, r.T), out = start[e] + position - e * r.T;
    if (out >= start[e + 1]) return;
    r.out_expert[out] = e;
    r.out_token[out] = x - e * r.T;
  }
  FFN_FN void finish_rest(SortKey, int64_t thread, int64_t threads) const {
    for (int64_t i = start[r.E] + thread; i < rounded_rows(r); i += threads) {
      r.out_expert[i] = r.E;
      r.out_token[i] = 0;
    }
  }
};

// ---- one pass -------------------------------------------------------------------------------------------------------

FFN_FN void add_total(int64_t* total, uint32_t count) {
  atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(count));
}

// Counts the digits of one chunk and, if asked, all values of the key; one count serves both if the digit is the key.
template <class Entries>
__global__ void sort_count_kernel(Entries entries, SortPass pass) {
  uint32_t* const counts = reinterpret_cast<uint32_t*>(dynamic_shared());
  const uint32_t digits = 1u << pass.bits;
  for (uint32_t d = threadIdx.x; d < digits; d += kSortThreads) counts[d] = 0;
  __syncthreads();
  const int64_t chunk = blockIdx.x, begin = chunk * kChunk;
  const int64_t end = pass.n - begin < kChunk ? pass.n : begin + kChunk;
  const bool whole_key = pass.total_values < digits;
  for (int64_t at = begin + threadIdx.x; at < end; at += kSortThreads) {
    const uint64_t key = entries.key(pass.key, pass.from ? pass.from[at] : at);
    atomicAdd(&counts[key >> pass.shift & (digits - 1)], 1u);
    if (pass.totals && !whole_key && key < uint64_t(pass.total_values)) add_total(&pass.totals[key], 1);
  }
  __syncthreads();
  for (uint32_t d = threadIdx.x; d < digits; d += kSortThreads) {
    pass.counts[d * pass.chunks + chunk] = counts[d];
    if (pass.totals && whole_key && d < pass.total_values && counts[d] > 0) add_total(&pass.totals[d], counts[d]);
  }
}

// One block for each job.
template <int kThreads>
__global__ void FFN_KERNEL_BOUNDS(kThreads, 1) scan_kernel(ScanJobs jobs) {
  constexpr int kItems = 4, kWarps = kThreads / kWarpSize;
  int64_t* const sums = reinterpret_cast<int64_t*>(dynamic_shared());  // [kWarps]
  const ScanJob job = blockIdx.x == 0 ? jobs.job[0] : blockIdx.x == 1 ? jobs.job[1] : jobs.job[2];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int64_t carried = 0;
  for (int64_t tile = 0; tile < job.n; tile += kItems * kThreads) {
    const int64_t first = tile + int64_t(threadIdx.x) * kItems;
    int64_t values[kItems], sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t value = first + i < job.n ? job.in[first + i] : 0;
      values[i] = value < job.most ? value : job.most;
      sum += values[i];
    }
    int64_t upto = sum;  // of the warp's lanes
#pragma unroll
    for (int by = 1; by < kWarpSize; by *= 2) {
      const int64_t below = __shfl_up_sync(0xffffffffu, upto, by);
      if (lane >= by) upto += below;
    }
    if (lane == kWarpSize - 1) sums[warp] = upto;
    __syncthreads();
    int64_t before = carried + upto - sum;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += sums[w];
      carried += sums[w];
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (first + i < job.n) job.out[first + i] = before;
      before += values[i];
    }
    __syncthreads();  // before sums are written again
  }
  if (job.total && threadIdx.x == 0) job.out[job.n] = carried;
}

// Puts the entries of one chunk to their places. Each warp has a part of the chunk: after the warps' counts have
// been summed up, an entry's position follows from those of its digit before it in the part.
template <class Entries>
__global__ void sort_scatter_kernel(Entries entries, SortPass pass) {
  constexpr int kWarps = kSortThreads / kWarpSize, kRounds = int(kChunk) / kSortThreads;
  uint32_t* const counts = reinterpret_cast<uint32_t*>(dynamic_shared());  // [kWarps, digits]
  const uint32_t digits = 1u << pass.bits;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint32_t* const mine = counts + warp * digits;
  for (uint32_t d = threadIdx.x; d < kWarps * digits; d += kSortThreads) counts[d] = 0;
  __syncthreads();
  const int64_t chunk = blockIdx.x, begin = chunk * kChunk + int64_t(warp) * kRounds * kWarpSize + lane;
  int64_t entry[kRounds];
  uint32_t digit[kRounds], same[kRounds];  // digits where there is no entry
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int64_t at = begin + i * kWarpSize;
    const bool there = at < pass.n;
    entry[i] = there && pass.from ? pass.from[at] : at;
    digit[i] = there ? uint32_t(entries.key(pass.key, entry[i]) >> pass.shift) & (digits - 1) : digits;
    same[i] = __match_any_sync(0xffffffffu, digit[i]);
    if (there && lane == __ffs(int(same[i])) - 1) mine[digit[i]] += __popc(same[i]);
    __syncwarp();
  }
  __syncthreads();
  for (uint32_t d = threadIdx.x; d < digits; d += kSortThreads) {
    uint32_t before = 0;
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t count = counts[w * digits + d];
      counts[w * digits + d] = before;
      before += count;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const bool there = digit[i] < digits;
    const uint32_t below = __popc(same[i] & ((1u << lane) - 1));
    const uint32_t before = there ? mine[digit[i]] + below : 0;
    __syncwarp();
    if (there && below == 0) mine[digit[i]] += __popc(same[i]);
    __syncwarp();
    if (!there) continue;
    const int64_t position = pass.counts[digit[i] * pass.chunks + chunk] + before;
    if (pass.to) pass.to[position] = entry[i];
    else entries.finish(pass.key, entry[i], position);
  }
  if (!pass.to) entries.finish_rest(pass.key, chunk * kSortThreads + threadIdx.x, pass.chunks * kSortThreads);
}

// ---- before the passes of a rounding --------------------------------------------------------------------------------

// Which tokens chose which experts, in flags that are all 0.
template <class Flag>
__global__ void mark_choices_kernel(RoundTokens r, Flag* chose) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= r.T * r.K) return;
  const int64_t e = r.ids[i];
  if (e >= 0 && e < r.E) chose[e * r.T + divide(i, r.K)] = 1;
}

// One block for each expert: computes its rounded number of tokens.
template <class Flag>
__global__ void round_counts_kernel(RoundTokens r, const Flag* chose, int64_t* wanted) {
  unsigned long long* const count = reinterpret_cast<unsigned long long*>(dynamic_shared());
  const int64_t e = blockIdx.x;
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (int64_t t = threadIdx.x; t < r.T; t += blockDim.x) mine += chose[e * r.T + t];
  atomicAdd(count, mine);
  __syncthreads();
  if (threadIdx.x > 0) return;
  const int64_t rounded = (int64_t(*count) + r.tile / 2) / r.tile * r.tile;
  wanted[e] = rounded < r.T ? rounded : r.T;
}

}  // namespace ffn_ops::cuda
