// SPDX-License-Identifier: BSD-3-Clause
// Which passes a sort takes, and their memory: pure functions of shapes. Sorting is by least significant digits: in
// each pass chunks of entries count their digits, a scan over (digit, chunk) tells where each chunk's entries of a
// digit begin, and entries go there in their order. Nothing depends on which block runs first. No torch, no CUDA.
#pragma once

#include "grid.h"

namespace ffn_ops::cuda {

constexpr int kSortThreads = 256;
constexpr int64_t kChunk = 2048;  // entries of a block; each warp has as many
constexpr int kMaxDigitBits = 10;
constexpr int kScanThreads = 1024;
constexpr int64_t kScanShared = kScanThreads / kWarpSize * 8;

enum class SortKey : int {
  kToken,   // Sort: the entry's token, T where it has none
  kWeight,  // largest first, NaN last
  kExpert,  // E where it has none
  kKept,    // the same, E where the expert has no room
  kScore,   // RoundTokens: largest first
  kChoice,  // expert, those that chose it first
};

// out[i] = sum over j < i of min(in[j], most), i < n; out[n] too with `total`. in and out may be the same.
struct ScanJob {
  const int64_t* in = nullptr;
  int64_t* out = nullptr;
  int64_t n = 0;
  int64_t most = 0;
  bool total = false;
};

constexpr int kMaxScans = 3;
struct ScanJobs {
  ScanJob job[kMaxScans];
  int count = 0;
};

struct SortPass {
  SortKey key = SortKey::kExpert;
  int shift = 0, bits = 0;        // the digit
  int64_t n = 0, chunks = 0;      // entries and blocks
  const int64_t* from = nullptr;  // entries in their order so far, null: 0, 1, 2, ...
  int64_t* to = nullptr;          // their order by this digit too; null in the last pass, which finishes entries
  int64_t* counts = nullptr;      // [2^bits, chunks]
  int64_t* totals = nullptr;      // of entries with each value of the whole key but the last, where asked for
  int64_t total_values = 0;
  ScanJobs scans;  // between counting and going

  constexpr int64_t digits() const { return int64_t{1} << bits; }
  constexpr int64_t count_shared() const { return digits() * 4; }
  constexpr int64_t scatter_shared() const { return kSortThreads / kWarpSize * digits() * 4; }
};

constexpr int kMaxPasses = 4 * 7;

// Launched in this order: `clear` set to zero; then for each pass count, scan (a block for each job) and scatter.
struct SortPlan {
  SortPass pass[kMaxPasses];
  int passes = 0;
  struct {
    void* data = nullptr;
    int64_t bytes = 0;
  } clear[2];
  int64_t scratch_bytes = 0;
  // In the scratch; null where there is no need.
  int64_t* counts = nullptr;
  int64_t* orders[3] = {};
  int64_t* start = nullptr;   // [E + 1] of each expert's queue, or what it is rounded to
  char* flags = nullptr;      // Sort: whether an entry is kept; RoundTokens: whether token t chose expert e, [E, T]
  int64_t* wanted = nullptr;  // RoundTokens: [E]
};

constexpr int bit_width(int64_t value) {
  int bits = 0;
  while (bits < 63 && value >> bits) ++bits;
  return bits < 1 ? 1 : bits;
}
constexpr int passes_for(int bits) { return static_cast<int>(divide_up(bits, kMaxDigitBits)); }
constexpr int digit_bits(int bits) { return static_cast<int>(divide_up(bits, passes_for(bits))); }
constexpr int64_t chunks_of(int64_t n) { return n > 0 ? divide_up(n, kChunk) : 1; }

// Hands out the scratch, or where it is null only counts.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    char* const at = memory_ ? memory_ + used_ : nullptr;
    used_ += divide_up(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return static_cast<T*>(static_cast<void*>(at));
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Adds the passes by one key of n entries: from `from` (null: in their own order), by way of `spare`, to `to` (null:
// the last pass finishes entries).
inline void add_passes(SortPlan& plan, SortKey key, int bits, int64_t n, const int64_t* from, int64_t* to,
                       int64_t* const (&spare)[2]) {
  const int count = passes_for(bits), each = digit_bits(bits);
  for (int i = 0; i < count; ++i) {
    SortPass& pass = plan.pass[plan.passes++];
    pass.key = key;
    pass.shift = i * each;
    pass.bits = bits - pass.shift < each ? bits - pass.shift : each;
    pass.n = n;
    pass.chunks = chunks_of(n);
    pass.from = from;
    pass.to = i + 1 == count ? to : from == spare[0] ? spare[1] : spare[0];
    from = pass.to;
    pass.counts = plan.counts;
    const int64_t cells = pass.digits() * pass.chunks;
    pass.scans.job[pass.scans.count++] = {plan.counts, plan.counts, cells, INT64_MAX, false};
  }
}

inline void add_scan(SortPass& pass, const ScanJob& job) { pass.scans.job[pass.scans.count++] = job; }

constexpr int64_t most_cells(int bits, int64_t n) { return (int64_t{1} << digit_bits(bits)) * chunks_of(n); }

inline SortPlan sort_plan(const Sort& s) {
  SortPlan plan;
  const int expert_bits = bit_width(s.E), token_bits = bit_width(s.T);
  const int weight_bits = static_cast<int>(8 * storage_size(s.weight_dtype));
  const bool limited = s.capacity >= 0, by_weight = limited && s.by_weight;
  int64_t cells = most_cells(expert_bits, s.R);
  if (s.token && most_cells(token_bits, s.R) > cells) cells = most_cells(token_bits, s.R);
  if (by_weight && most_cells(weight_bits, s.R) > cells) cells = most_cells(weight_bits, s.R);
  Carver carver(s.scratch);
  plan.counts = carver.take<int64_t>(cells);
  const bool several = by_weight || passes_for(expert_bits) > 1 || (s.token && passes_for(token_bits) > 1);
  if (several) plan.orders[0] = carver.take<int64_t>(s.R);
  if (several) plan.orders[1] = carver.take<int64_t>(s.R);
  if (s.token) plan.orders[2] = carver.take<int64_t>(s.R);
  if (limited) plan.start = carver.take<int64_t>(s.E + 1);
  if (limited) plan.flags = carver.take<char>(s.R);
  plan.scratch_bytes = carver.used();
  plan.clear[0] = {s.out_counts, s.E * 8};
  int64_t* const spare[2] = {plan.orders[0], plan.orders[1]};

  if (s.token) {
    plan.clear[1] = {s.out_slot_offsets, s.T * 8};
    SortPass& first = plan.pass[plan.passes];
    add_passes(plan, SortKey::kToken, token_bits, s.R, nullptr, plan.orders[2], spare);
    first.totals = s.out_slot_offsets;
    first.total_values = s.T;
    add_scan(first, {s.out_slot_offsets, s.out_slot_offsets, s.T, INT64_MAX, true});
  }
  int64_t* queued = nullptr;  // entries by weight
  if (by_weight) {
    queued = spare[(passes_for(weight_bits) - 1) % 2];
    add_passes(plan, SortKey::kWeight, weight_bits, s.R, nullptr, queued, spare);
  }
  SortPass& counting = plan.pass[plan.passes];
  if (limited) add_passes(plan, SortKey::kExpert, expert_bits, s.R, queued, nullptr, spare);
  else add_passes(plan, SortKey::kKept, expert_bits, s.R, nullptr, nullptr, spare);
  counting.totals = s.out_counts;
  counting.total_values = s.E;
  add_scan(counting, {s.out_counts, s.out_offsets, s.E, limited ? s.capacity : INT64_MAX, true});
  if (limited) {
    add_scan(counting, {s.out_counts, plan.start, s.E, INT64_MAX, true});
    add_passes(plan, SortKey::kKept, expert_bits, s.R, nullptr, nullptr, spare);
  }
  return plan;
}

inline SortPlan round_plan(const RoundTokens& r) {
  SortPlan plan;
  const int choice_bits = bit_width(2 * r.E - 1), score_bits = static_cast<int>(8 * storage_size(r.dtype));
  const int64_t n = r.T * r.E;
  int64_t cells = most_cells(choice_bits, n);
  if (most_cells(score_bits, n) > cells) cells = most_cells(score_bits, n);
  Carver carver(r.scratch);
  plan.counts = carver.take<int64_t>(cells);
  plan.orders[0] = carver.take<int64_t>(n);
  plan.orders[1] = carver.take<int64_t>(n);
  plan.start = carver.take<int64_t>(r.E + 1);
  plan.wanted = carver.take<int64_t>(r.E);
  plan.flags = carver.take<char>(n);
  plan.scratch_bytes = carver.used();
  plan.clear[0] = {plan.flags, n};
  int64_t* const spare[2] = {plan.orders[0], plan.orders[1]};
  int64_t* const scored = spare[(passes_for(score_bits) - 1) % 2];
  add_passes(plan, SortKey::kScore, score_bits, n, nullptr, scored, spare);
  SortPass& choice = plan.pass[plan.passes];
  add_passes(plan, SortKey::kChoice, choice_bits, n, scored, nullptr, spare);
  add_scan(choice, {plan.wanted, plan.start, r.E, INT64_MAX, true});
  return plan;
}

}  // namespace ffn_ops::cuda
