// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: all kernels and the table that the boundary calls them through. The including file
// sets the micro-tile before, kMR x kNRVectors (even: gate and up). Where its products of bfloat16 alone differ from
// those of another instruction set, it sets that as FFN_OPS_BASE, which computes all else, and BFloat16Operands, the
// vectors that hold their operands.

constexpr int64_t kL1Bytes = int64_t{32} << 10;      // of a B panel that stay in L1 while a few A panels pass
constexpr int64_t kRowsAtOnce = 16;                  // where rows are copied
constexpr int64_t kNarrowRows = 8;                   // the same, into narrow panels: fewer than L1 has ways
constexpr int64_t kNarrowPanels = 16;                // the same: at once, as their ends share a few places of L1
constexpr int64_t kRowsAhead = 16;                   // the same: what is asked for
constexpr int64_t kStreamBytes = 512;                // in each row while streaming
constexpr int kAxpyRows = kMR * kNRVectors * 2 / 3;  // accumulators, where the rest is one row and its factor

#include "pack.h"

#include "elementwise.h"

#include "epilogue.h"

#include "gemm.h"

#include "stream.h"

#include "peak.h"

#ifdef FFN_OPS_BASE
constexpr int64_t kBFloat16KR = BFloat16Operands::kKR;
template <auto kEntry, class... Args>
void base_kernel(Args... args) {
  (FFN_OPS_BASE::kTable.*kEntry)(args...);
}
#define FFN_OPS_ENTRY(name) base_kernel<&KernelTable::name>
#else
#define FFN_OPS_ENTRY(name) name
constexpr int64_t kBFloat16KR = 1;

#include "rows.h"

#include "low_rank.h"

#include "top_k.h"
#endif

template <class V>
void gemm_as(const ScheduledGemm& g, int64_t task, void* scratch) {
  switch (g.kernel) {
    case Schedule::Kernel::kPacked:
      return packed_task<V>(g, task, scratch);
    case Schedule::Kernel::kDot:
      return dot_task<V>(g, task, scratch);
    case Schedule::Kernel::kBroadcast:
      return broadcast_task<V>(g, task, scratch);
    case Schedule::Kernel::kAxpy:
      return axpy_task<V>(g, task, scratch);
  }
}

#ifdef FFN_OPS_BASE
void pack_a(const ScheduledGemm& g, int64_t k_block, int64_t panel_begin, int64_t panel_end) {
  if (g.in_bfloat16()) pack_a_as<BFloat16Operands>(g, k_block, panel_begin, panel_end);
  else FFN_OPS_BASE::kTable.pack_a(g, k_block, panel_begin, panel_end);
}

void gemm(const ScheduledGemm& g, int64_t task, void* scratch) {
  if (g.in_bfloat16()) gemm_as<BFloat16Operands>(g, task, scratch);
  else FFN_OPS_BASE::kTable.gemm(g, task, scratch);
}
#else
void pack_a(const ScheduledGemm& g, int64_t k_block, int64_t panel_begin, int64_t panel_end) {
  if (g.float64()) pack_a_as<Vec<double>>(g, k_block, panel_begin, panel_end);
  else pack_a_as<Vec<float>>(g, k_block, panel_begin, panel_end);
}

void gemm(const ScheduledGemm& g, int64_t task, void* scratch) {
  if (g.float64()) gemm_as<Vec<double>>(g, task, scratch);
  else gemm_as<Vec<float>>(g, task, scratch);
}

void short_product(const ShortProduct& p, int64_t r0, int64_t r1) {
  if (p.rows.dtype == DType::kFloat64) short_product_as<Vec<double>>(p, r0, r1);
  else short_product_as<Vec<float>>(p, r0, r1);
}

void short_outer(const ShortOuter& p, const Range& range) {
  if (p.dtype == DType::kFloat64) short_outer_as<Vec<double>>(p, range);
  else short_outer_as<Vec<float>>(p, range);
}

void turn(const Turn& t, const Range& range) {
  if (t.dtype == DType::kFloat64) turn_as<Vec<double>>(t, range);
  else turn_as<Vec<float>>(t, range);
}

void gated_act(const GatedAct& g, const Range& range) {
  if (g.gate.dtype == DType::kFloat64) gated_act_range<Vec<double>>(g, &ActKernels<Vec<double>>::forward, range);
  else gated_act_range<Vec<float>>(g, &ActKernels<Vec<float>>::forward, range);
}

void gated_act_backward(const GatedAct& g, const Range& range) {
  if (g.gate.dtype == DType::kFloat64) gated_act_range<Vec<double>>(g, &ActKernels<Vec<double>>::backward, range);
  else gated_act_range<Vec<float>>(g, &ActKernels<Vec<float>>::backward, range);
}

void gated_act_double_backward(const GatedAct& g, const Range& range) {
  if (g.gate.dtype == DType::kFloat64)
    gated_act_range<Vec<double>>(g, &ActKernels<Vec<double>>::double_backward, range);
  else gated_act_range<Vec<float>>(g, &ActKernels<Vec<float>>::double_backward, range);
}

void own_sums(const GatedAct& g, const Range& range, double* sums) {
  if (g.gate.dtype == DType::kFloat64) own_sums_range<Vec<double>>(g, range, sums);
  else own_sums_range<Vec<float>>(g, range, sums);
}

void column_sum(const ColumnSum& s, int64_t c0, int64_t c1) {
  if (s.matrix.dtype == DType::kFloat64) column_sum_as<Vec<double>>(s, c0, c1);
  else column_sum_as<Vec<float>>(s, c0, c1);
}

void dispatch_rows(const MoveRows& m, int64_t t0, int64_t t1) {
  if (m.in.dtype == DType::kFloat64) dispatch_rows_as<Vec<double>>(m, t0, t1);
  else dispatch_rows_as<Vec<float>>(m, t0, t1);
}

void combine_rows(const MoveRows& m, int64_t t0, int64_t t1) {
  if (m.in.dtype == DType::kFloat64) combine_rows_as<Vec<double>>(m, t0, t1);
  else combine_rows_as<Vec<float>>(m, t0, t1);
}

void row_dots(const RowDots& d, int64_t r0, int64_t r1) {
  if (d.a.dtype == DType::kFloat64) row_dots_as<Vec<double>>(d, r0, r1);
  else row_dots_as<Vec<float>>(d, r0, r1);
}

void top_k(const TopK& k, int64_t r0, int64_t r1, void* scratch) {
  if (k.logits.dtype == DType::kFloat64) top_k_as<Vec<double>>(k, r0, r1, scratch);
  else top_k_as<Vec<float>>(k, r0, r1, scratch);
}

void top_k_backward(const TopK& k, int64_t r0, int64_t r1, void* scratch) {
  if (k.logits.dtype == DType::kFloat64) top_k_backward_as<Vec<double>>(k, r0, r1, scratch);
  else top_k_backward_as<Vec<float>>(k, r0, r1, scratch);
}
#endif

extern const KernelTable kTable;
const KernelTable kTable = {Vec<float>::kLanes,
                            kMR,
                            kNRVectors,
                            kAxpyRows,
                            kCodeRows,
                            kBFloat16KR,
                            pack_a,
                            gemm,
                            FFN_OPS_ENTRY(short_product),
                            FFN_OPS_ENTRY(short_outer),
                            FFN_OPS_ENTRY(turn),
                            FFN_OPS_ENTRY(gated_act),
                            FFN_OPS_ENTRY(gated_act_backward),
                            FFN_OPS_ENTRY(gated_act_double_backward),
                            FFN_OPS_ENTRY(dequantize),
                            FFN_OPS_ENTRY(own_sums),
                            FFN_OPS_ENTRY(column_sum),
                            FFN_OPS_ENTRY(dispatch_rows),
                            FFN_OPS_ENTRY(combine_rows),
                            FFN_OPS_ENTRY(row_dots),
                            FFN_OPS_ENTRY(top_k),
                            FFN_OPS_ENTRY(top_k_backward),
                            peak_fma,
                            peak_read};
