// SPDX-License-Identifier: BSD-3-Clause
// grid.h and sort_plan.h: what is accessed 16 bytes at a time, that cuts cover everything once, that passes fit
// together, and that nothing overflows beyond 2^31 elements.
#include "../../csrc/cuda/sort_plan.h"

#include <set>
#include <vector>

#include "problems.h"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::check;

alignas(16) char memory[64];

GatedAct dense(int64_t rows, int64_t cols, DType dtype) {
  GatedAct g;
  g.rows = rows;
  g.cols = cols;
  g.dtype = dtype;
  g.gate = g.up = {memory, cols, 1};
  g.out[0] = memory;
  g.out_stride[0] = cols;
  return g;
}

void test_flatten() {
  GatedAct g = dense(7, 9, DType::kBFloat16);
  flatten(g);
  check(g.rows == 1 && g.cols == 63 && gated_act_grid(g).vector == 1, "dense rows are one row");
  const auto stays = [](auto change, const char* what) {
    GatedAct g = dense(7, 9, DType::kBFloat16);
    change(g);
    flatten(g);
    check(g.rows == 7 && g.cols == 9, "%s: rows stay apart", what);
  };
  stays([](GatedAct& g) { g.up.row_stride = 10; }, "a gap between rows");
  stays([](GatedAct& g) { g.gate.col_stride = 2; }, "a gap between columns");
  stays([](GatedAct& g) { g.gate.row_stride = 0; }, "an expanded input");
  stays([](GatedAct& g) { g.out_stride[0] = 18; }, "a wider output");
  stays([](GatedAct& g) { g.row_weight = memory; }, "weights of rows");
  stays([](GatedAct& g) { g.kept = reinterpret_cast<const int64_t*>(memory); }, "kept rows");
}

void test_vector_access() {
  const auto vector = [](auto change) {
    GatedAct g = dense(6, 64, DType::kBFloat16);
    change(g);
    return gated_act_grid(g).vector != 0;
  };
  check(vector([](GatedAct&) {}), "dense");
  check(vector([](GatedAct& g) { g.up.row_stride = 72; }), "rows at multiples of 16 bytes");
  check(vector([](GatedAct& g) { g.up.row_stride = 0; }), "one row for all");
  check(vector([](GatedAct& g) { g.rows = 1, g.up.row_stride = 3; }), "one row, whatever its stride");
  check(!vector([](GatedAct& g) { g.up.row_stride = 68; }), "rows at multiples of 8 bytes");
  check(!vector([](GatedAct& g) { g.up.col_stride = 2; }), "strided columns");
  check(!vector([](GatedAct& g) { g.d_out = {memory, 0, 0}; }), "an expanded gradient");
  check(!vector([](GatedAct& g) { g.gate.data = memory + 2; }), "an address in between");
  check(!vector([](GatedAct& g) { g.out[2] = memory, g.out_stride[2] = 12; }), "an output's rows in between");
  check(!vector([](GatedAct& g) { g.sum = memory + 4; }), "sums in between");
  GatedAct odd = dense(6, 63, DType::kFloat32);
  check(gated_act_grid(odd).vector == 0 && !gated_act_grid(odd).along_cols, "rows of odd width");
}

// Places that a grid of packs can reach: at least one for each pack, and not twice as many as blocks need.
void test_pack_grids() {
  for (const int64_t rows : {int64_t(1), int64_t(5), int64_t(1000), int64_t{1} << 33})
    for (const int64_t cols : {int64_t(1), int64_t(7), int64_t(512), int64_t(4100), int64_t(100000)})
      for (const int64_t pack : {1, 2, 8})
        for (const int most : {4, 8}) {
          const PackGrid g = pack_grid(rows, cols, pack, kVectorSteps, most);
          const int64_t packs = divide_up(cols, pack), width = int64_t{1} << g.shift, height = kPackThreads / width;
          const int64_t block_cols = width * (g.along_cols ? kVectorSteps : 1);
          const int64_t block_rows = height * (g.along_cols ? 1 : kVectorSteps);
          const int64_t row_blocks = g.blocks / g.col_blocks;
          check(row_blocks * g.col_blocks == g.blocks, "whole rows of blocks");
          check(block_cols * g.col_blocks >= packs && block_cols * (g.col_blocks - 1) < packs, "columns are covered");
          check(block_rows * row_blocks >= rows && block_rows * (row_blocks - 1) < rows, "rows are covered");
        }
  check(pack_grid(0, 7, 8, 2).blocks == 0 && pack_grid(7, 0, 8, 2).blocks == 0, "nothing to do");
  GatedAct g = dense(1, int64_t{1} << 40, DType::kBFloat16);
  check(gated_act_grid(g).blocks == (int64_t{1} << 40) / (8 * 256 * kVectorSteps), "2^40 elements");
}

// No two parts of segments share a slot, and slots do not run out.
void test_column_sum_slots() {
  simt::Random random(3);
  for (int trial = 0; trial < 300; ++trial) {
    ColumnSum s;
    s.experts = 1 + int64_t(random.below(9));
    std::vector<int64_t> offsets{int64_t(random.below(300))};
    for (int64_t e = 0; e < s.experts; ++e)
      offsets.push_back(offsets.back() + (random.coin() ? int64_t(random.below(3)) : int64_t(random.below(700))));
    s.rows = offsets.back() + int64_t(random.below(3));
    std::set<int64_t> taken;
    for (int64_t e = 0; e < s.experts; ++e)
      for (int64_t p = 0; p < divide_up(offsets[size_t(e + 1)] - offsets[size_t(e)], kPartRows); ++p) {
        const int64_t slot = offsets[size_t(e)] / kPartRows + e + p;
        check(taken.insert(slot).second && slot < column_sum_slots(s), "slot %lld", (long long)slot);
      }
  }
  ColumnSum s;
  s.rows = int64_t{1} << 36;
  s.cols = 4096;
  s.dtype = DType::kBFloat16;
  check(column_sum_bytes(s) == ((int64_t{1} << 29) + 1) * 4096 * 4, "bytes of 2^36 rows");
}

void test_top_k_grid() {
  TopK k;
  k.T = 1001;
  k.E = 256;
  TopKGrid g = top_k_grid(k);
  check(g.threads == 128 && g.blocks == 251 && g.shared_bytes == 4 * 260 * 4 && g.scratch_bytes == 0, "256 experts");
  k.E = 6000;
  g = top_k_grid(k);
  check(g.threads == 64 && g.blocks == 501 && g.shared_bytes <= kSharedBytes, "6000 experts");
  k.dtype = DType::kFloat64;
  g = top_k_grid(k);
  check(g.threads == 32 && g.shared_bytes == 6004 * 8, "6000 experts, float64");
  k.E = int64_t{1} << 20;
  k.T = int64_t{1} << 20;
  g = top_k_grid(k);
  check(g.shared_bytes == 0 && g.scratch_bytes == ((int64_t{1} << 20) + 4) * 8 << 20, "2^40 scores");
}

// Passes follow each other: each reads what the one before has written, and never writes what it reads; digits make up
// the key; the counts fit into their memory; all of the scratch's pieces are apart.
void check_plan(const SortPlan& plan, const char* base, const char* what) {
  const SortPass* before = nullptr;
  for (int i = 0; i < plan.passes; ++i) {
    const SortPass& pass = plan.pass[i];
    check(pass.from != pass.to || !pass.from || pass.n == 0, "%s: pass %d sorts in place", what, i);
    const bool goes_on = before && before->key == pass.key && before->to;
    if (goes_on) {
      check(pass.from == before->to, "%s: pass %d does not go on from the one before", what, i);
      check(pass.shift == before->shift + before->bits, "%s: pass %d leaves out a digit", what, i);
    } else {
      check(pass.shift == 0 && (!pass.from || (before && pass.from == before->to)), "%s: pass %d begins", what, i);
    }
    check(pass.bits >= 1 && pass.bits <= kMaxDigitBits && pass.scatter_shared() <= kSharedBytes, "%s: digit", what);
    const char* end = reinterpret_cast<const char*>(pass.counts + pass.digits() * pass.chunks);
    for (const void* next : {static_cast<const void*>(plan.orders[0]), static_cast<const void*>(plan.orders[2]),
                             static_cast<const void*>(plan.start), static_cast<const void*>(plan.flags)})
      check(!next || end <= next, "%s: counts run into what follows", what);
    check(end <= base + plan.scratch_bytes, "%s: counts run out of the scratch", what);
    check(pass.chunks * kChunk >= pass.n && pass.chunks >= 1, "%s: chunks", what);
    before = &pass;
  }
  check(before && !before->to, "%s: the last pass finishes entries", what);
}

void test_sort_plans() {
  const auto base = reinterpret_cast<char*>(uintptr_t{1} << 44);  // never touched
  int64_t out[1];
  for (const int64_t R : {int64_t(0), int64_t(1), int64_t(5000), int64_t{1} << 34})
    for (const int64_t E : {int64_t(1), int64_t(8), int64_t(1023), int64_t(1024), int64_t{1} << 33})
      for (int options = 0; options < 24; ++options) {
        Sort s;
        s.R = R;
        s.T = R;
        s.E = E;
        s.K = 1;
        s.token = options & 1 ? out : nullptr;
        s.weight_dtype = options & 2 ? DType::kFloat64 : DType::kFloat32;
        s.capacity = options / 4 % 2 ? 3 : -1;
        s.by_weight = options / 8 == 2;
        s.out_counts = s.out_offsets = s.out_slot_offsets = out;
        const int64_t bytes = sort_plan(s).scratch_bytes;
        s.scratch = base;
        const SortPlan plan = sort_plan(s);
        check(plan.scratch_bytes == bytes && plan.passes <= kMaxPasses, "a plan does not depend on its memory");
        check(bytes >= (s.token ? 8 * R : 0) + (s.capacity >= 0 ? R + 8 * E : 0), "the scratch holds orders and flags");
        check_plan(plan, base, "sort");
      }
  for (const int64_t T : {int64_t(0), int64_t(7), int64_t{1} << 26})
    for (const int64_t E : {int64_t(1), int64_t(128), int64_t(1000)})
      for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
        RoundTokens r;
        r.T = T;
        r.E = E;
        r.dtype = dtype;
        r.scratch = base;
        check_plan(round_plan(r), base, "rounding");
        check(round_plan(r).scratch_bytes >= T * E * 17, "the scratch holds orders and flags");
      }
}

}  // namespace

int main() {
  test_flatten();
  test_vector_access();
  test_pack_grids();
  test_column_sum_slots();
  test_top_k_grid();
  test_sort_plans();
  return simt::report("grid_test");
}
