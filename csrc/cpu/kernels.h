// SPDX-License-Identifier: BSD-3-Clause
// What the boundary (one file per operator) and the kernels of one instruction set agree on: plain descriptions of a
// product, of the element-wise passes, and the table of entry points that each file in isa/ fills. No torch, no
// vectors, no threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/descriptors.h"
#include "../common/dtypes.h"
#include "../common/formats.h"
#include "../common/gate.h"
#include "dispatch.h"

namespace ffn_ops {

// Blocked summation: every sum over k is cut into blocks of kSumBlock, each added in order from zero, and the partial
// sums are added in order. The cut depends on k alone, so a token's result has the same bits for every number of
// tokens; and the rounding error of a long sum (K = 11008) stays near that of a short one.
constexpr int64_t kSumBlock = 64;
// kc of the packed product: a B panel of that length stays in the caches near the core. A multiple of
// kSumBlock, else without influence on results.
constexpr int64_t kKC = 512;
// A panels that stay in L2 while B panels pass.
constexpr int64_t kL2Panels = 16;
// Below, a product is bound by its stores: tiles go straight from registers to their place, or, where they are rounded
// or get a bias, are stored together along rows, at most kRowBytes of them.
constexpr int64_t kShortK = 64;
constexpr int64_t kRowBytes = int64_t{24} << 10;
constexpr int64_t kPrefetchedLines = 256;  // of a factor of an adapter, at once: a third of L1

// A strided matrix: element (r, c) is data[rows ? rows[r] : r][c]. Lanes of a packed panel run along rows or columns.
struct Matrix : StridedMatrix {
  DType dtype = DType::kFloat32;
  const int64_t* rows = nullptr;  // row gather
  // Quantised, read as float32: element (r, c) is that at (first_row + r * row_stride, first_col + c) of the codes.
  const Codes* codes = nullptr;
  int64_t first_row = 0, first_col = 0;
};

// One operand of a product, read as element (lane, k).
struct Operand {
  Matrix matrix;
  bool k_along_rows = false;  // false: lane = row, k = column (a Linear's weight); true: k = row, lane = column
};

struct Epilogue : Gate {
  using Kind = EpilogueKind;
  Kind kind = Kind::kStore;
  DType dtype = DType::kFloat32;  // storage of everything below
  void* out = nullptr;            // [M, N]
  void* out_up = nullptr;         // kActivateGrad, gated
  int64_t out_stride = 0;
  void* h = nullptr;         // kActivateGrad, where asked for: strides of the pre-activations
  bool h_unrounded = false;  // h is of the arithmetic's dtype
  void* gate = nullptr;      // pre-activations [branches, M, N]; written by kActivate, read by kActivateGrad
  void* up = nullptr;
  int64_t pre_stride = 0;             // between rows
  int64_t pre_branch_stride = 0;      // between branches
  const void* const* bias = nullptr;  // one per B operand, each may be null
  bool out_unrounded = false;         // kStore: out is of the arithmetic's dtype
  // kActivateGrad, where row_weight is given (of the arithmetic's dtype, one for each row): acc = dA' is first
  // multiplied by it, h as well, and row_dots[m][panel] = sum over the panel's columns of dA' * act(gate) * up.
  const void* row_weight = nullptr;
  void* row_dots = nullptr;  // of the arithmetic's dtype
  int64_t row_dots_stride = 0;
  bool interleaved = false;  // kActivateGrad, gated: d_gate and d_up alternate along rows of out, there is no out_up
  // A second product with a short k, which joins the sums before bias, gate and everything else: rows of `small`
  // [M, rank], dense and of the arithmetic's dtype, times `small_b`. Gated (of one branch): gate's, and up's.
  const void* small = nullptr;
  int64_t rank = 0;
  const Operand* small_b = nullptr;

  DType arithmetic() const { return arithmetic_dtype(dtype); }
  DType out_dtype() const { return out_unrounded ? arithmetic() : dtype; }
  DType h_dtype() const { return h_unrounded ? arithmetic() : dtype; }
};

// The problem, what is computed: out[M, N] = epilogue(sum over k of A(m, k) * B(n, k)). Operands and epilogue are of
// one storage dtype, or `mixed`.
struct Gemm {
  int64_t M = 0, N = 0, K = 0;
  Operand a;
  // Gated: b[2g], b[2g + 1] are gate and up weights of branch g; half of a panel's vectors are gate, half up.
  // Else the operands follow each other along k: b[j] holds the j-th K / num_b of it.
  const Operand* b = nullptr;
  int64_t num_b = 1;
  bool gated = false;
  bool mixed = false;  // storage dtypes differ, of one arithmetic: bfloat16 is then not multiplied in pairs
  Epilogue epilogue;

  bool float64() const { return epilogue.dtype == DType::kFloat64; }  // float64 arithmetic
  bool quantised() const { return b[0].matrix.codes != nullptr; }
  // Operands may stay bfloat16.
  bool in_bfloat16() const { return epilogue.dtype == DType::kBFloat16 && !mixed && !quantised(); }
  int64_t element() const { return float64() ? 8 : 4; }  // bytes of it
  int64_t branches() const { return gated ? num_b / 2 : 1; }
  int64_t b_length() const { return gated ? K : K / num_b; }          // length of one B operand along k
  int64_t kc() const { return b_length() < kKC ? b_length() : kKC; }  // of the longest block of k
  int64_t k_blocks() const {                                          // of one branch, packed one after the other
    return K == 0 ? 1 : K / b_length() * divide_up(b_length(), kKC);
  }
};

struct ScheduledGemm;

// The schedule, how it is computed; it never changes a bit of the result. In BLIS's words, kr in XNNPACK's:
// - micro-kernel: computes a micro-tile, mr rows by nr columns of sums, in registers.
// - panel: mr rows of A, or nr columns of B, packed as the micro-kernel reads them, kc steps along k at a time.
// - kr: neighbours along k that a lane of a packed operand holds, one step of the micro-kernel.
// - mc, nc: rows and columns that one task computes, here counted in panels.
struct Schedule {
  enum class Kernel {
    kPacked,  // both operands are packed into panels for the micro-kernel
    // For a few rows: the other operand, the weights, is not packed, and its rows are read once. kDot also computes a
    // few columns, as the transposed product.
    kDot,        // rows along k, transposed in registers: at most kDotRows rows of the other operand
    kBroadcast,  // rows along k, each element times a vector of tokens
    kAxpy,       // rows along the columns, scaled and added
  };
  Kernel kernel = Kernel::kPacked;
  // The product is computed as its transpose. M and N are exchanged, b is the shared operand, element (m, n) of a tile
  // goes to out[n][m] and its bias is bias[m].
  bool transposed = false;
  int64_t kr = 1;
  int64_t first_row = 0;     // of the shared operand: this is a part of the product
  int64_t mr = 0;            // 1 .. the table's
  int64_t panels_m = 0;      // A panels
  int64_t nr = 0;            // columns of the output from one B panel: at most the micro-tile's, half where gated
  int64_t panels_n = 0;      // B panels
  int64_t mc_panels = 0;     // A panels of one task
  int64_t nc_panels = 0;     // B panels of one task; of a few tokens see `guided`
  int64_t at_once = 1;       // tasks that run side by side: a thread's next one is about so many later
  bool alone = false;        // one thread packs A and computes all tasks, while A is in its caches
  int64_t guided = 0;        // kDot, kBroadcast: a task takes one of so many parts of the B panels that are left
  void* packed_a = nullptr;  // [k block][panel][step of k][mr]
  const ScheduledGemm* then = nullptr;  // alone: what the thread computes after this product

  int64_t steps(int64_t k) const { return divide_up(k, kr); }  // that k takes when packed
  int64_t tasks_m() const { return divide_up(panels_m, mc_panels); }
  int64_t tasks_n() const {
    int64_t tasks = 0;
    if (guided == 0) return divide_up(panels_n, nc_panels);
    for (int64_t left = panels_n; left > 0; ++tasks) left -= divide_up(left, guided);
    return tasks;
  }
  // The B panels of a task that reads rows from end to end: many for the first, as each begins with a wait for memory,
  // and few for the last, so that all workers end together (OpenMP's guided schedule).
  struct Panels {
    int64_t begin, end;
  };
  Panels guided_panels(int64_t task) const {
    Panels p = {0, 0};
    for (; task >= 0; --task) p = {p.end, p.end + divide_up(panels_n - p.end, guided)};
    return p;
  }
};

struct ScheduledGemm : Gemm, Schedule {
  int64_t packed_length() const { return K == 0 ? 0 : K / b_length() * steps(b_length()); }
  bool few_panels() const { return K >= kShortK && mc_panels <= kL2Panels; }
  // Packing takes a part of the time that is worth asking for its operand while the panels before are multiplied.
  bool asks_ahead() const { return K >= kShortK && mc_panels <= 4 * kL2Panels; }
  // A sum without bias, in the arithmetic's dtype: kPacked adds up whole tiles in their place.
  bool stores_directly() const {
    const Epilogue& e = epilogue;
    return plain_sum() && !(e.bias && e.bias[0]) && e.out_dtype() == e.arithmetic();
  }
  // Tiles of kPacked, of so many bytes each, that are stored together, row by row.
  int64_t tiles_in_row(int64_t bytes) const {
    if (K >= kShortK || !plain_sum() || stores_directly() || bytes > kRowBytes) return 1;
    return kRowBytes / bytes < nc_panels ? kRowBytes / bytes : nc_panels;
  }

 private:
  bool plain_sum() const {
    const Epilogue& e = epilogue;
    const bool plain = e.kind == Epilogue::Kind::kStore && !e.small;
    return k_blocks() == 1 && plain && !transposed;
  }
};

struct GatedAct : Gate {
  int64_t rows = 0, cols = 0;
  Matrix gate, up, d_out;  // up.data null: plain
  Matrix dd_gate, dd_up;   // double backward: cotangents of d_gate and d_up
  void* out[3] = {};       // forward: out. backward: d_gate, d_up, h. double: d_d_out, d_gate, d_up (null: skip)
  int64_t out_stride = 0;
  const void* row_weight = nullptr;  // of h, of the arithmetic's dtype; null: 1
  bool h_unrounded = false;          // h is of the arithmetic's dtype
  bool nontemporal = false;          // outputs go past the caches
};

struct Range {
  int64_t row_begin, row_end, col_begin, col_end;
};

// out[c] = sum over rows of weight[r] * matrix(r, c).
struct ColumnSum {
  int64_t rows = 0, cols = 0;
  Matrix matrix;
  const void* weight = nullptr;  // of the arithmetic's dtype; null: 1
  void* out = nullptr;
};

// Rows of a quantised matrix, dense and rounded to `dtype`.
struct Dequantize {
  const Codes* codes = nullptr;
  int64_t cols = 0;
  void* out = nullptr;
  DType dtype = DType::kFloat32;
};

// Rows from `kept` on are neither read nor computed.
struct Routes : RowsOfTokens {
  int64_t kept = 0;
};

// dispatch: out[r] = weight[r] * in[t] for the rows r of t. combine: out[t] = sum of weight[r] * in[r] over the rows of
// t, in their order.
struct MoveRows {
  Routes routes;
  int64_t cols = 0;
  Matrix in;
  const void* weight = nullptr;  // of the arithmetic's dtype; null: 1
  void* out = nullptr;
  int64_t out_stride = 0;
  DType out_dtype = DType::kFloat32;
  bool nontemporal = false;  // dispatch: out goes past the caches
};

// out[r] = sum over c of a(r, c) * b(r, c), plus the sum of the `parts` of row r.
struct RowDots {
  int64_t cols = 0;
  Matrix a, b;
  const void* parts = nullptr;  // [rows, num_parts], like out of the arithmetic's dtype
  int64_t num_parts = 0;
  void* out = nullptr;
};

// out[r] [N] = scale * rows(r) b^T of the arithmetic's dtype, where N is small: a row is read once, nothing is packed.
// Storage dtypes of rows and b may differ.
struct ShortProduct {
  int64_t K = 0, N = 0;
  Matrix rows;
  Operand b;
  double scale = 1;
  void* out = nullptr;
  const Operand* next = nullptr;  // asked for meanwhile, as the b of the product that follows on this thread
};

// out[M, N] of `dtype` = sum over rows of a(row)^T b(row), where M or N is small, and the operand of that side is of
// the arithmetic's dtype.
struct ShortOuter {
  int64_t rows = 0, M = 0, N = 0;
  Matrix a, b;
  void* out = nullptr;
  DType dtype = DType::kFloat32;
};

// A transpose: out[to[c]][r] = in(from[r], c), rows of out `out_stride` apart. Negative: `to` leaves the column out,
// `from` is a row of zeros. Null: every place is its own. One of the dtypes is that of the arithmetic.
struct Turn {
  Matrix in;
  const int64_t* from = nullptr;
  const int64_t* to = nullptr;
  void* out = nullptr;
  int64_t out_stride = 0;
  DType dtype = DType::kFloat32;
};

struct TopK : ChoiceOfExperts {
  Matrix logits;
};

constexpr int64_t kAxpyFuse = 8;  // Schedule::Kernel::kAxpy: rows at a time

// Independent chains of multiply-adds: they cover latency times throughput of every core so far (4 to 8 cycles, 2 per
// cycle).
constexpr int kPeakChains = 12;

// Entry points of one instruction set. Each works on a range and is single-threaded.
struct KernelTable {
  int64_t lanes;  // float32 lanes of a vector; float64: half
  int64_t mr;     // the micro-tile: rows, and vectors in each
  int64_t nr_vectors;
  int64_t axpy_rows;    // Schedule::Kernel::kAxpy: rows of an A panel
  int64_t code_rows;    // Schedule::Kernel::kDot of quantised weights: rows of an A panel at most
  int64_t bfloat16_kr;  // Schedule::kr of bfloat16 products
  void (*pack_a)(const ScheduledGemm&, int64_t k_block, int64_t panel_begin, int64_t panel_end);
  void (*gemm)(const ScheduledGemm&, int64_t task, void* scratch);
  void (*short_product)(const ShortProduct&, int64_t row_begin, int64_t row_end);
  void (*short_outer)(const ShortOuter&, const Range&);
  void (*turn)(const Turn&, const Range&);
  void (*gated_act)(const GatedAct&, const Range&);
  void (*gated_act_backward)(const GatedAct&, const Range&);
  void (*gated_act_double_backward)(const GatedAct&, const Range&);
  void (*dequantize)(const Dequantize&, int64_t row_begin, int64_t row_end);
  // Adds the sums over the range of d_out (times dd_gate, where given) times own_factors of value (or slope).
  void (*own_sums)(const GatedAct&, const Range&, double* sums);
  void (*column_sum)(const ColumnSum&, int64_t col_begin, int64_t col_end);
  void (*dispatch_rows)(const MoveRows&, int64_t token_begin, int64_t token_end);
  void (*combine_rows)(const MoveRows&, int64_t token_begin, int64_t token_end);
  void (*row_dots)(const RowDots&, int64_t row_begin, int64_t row_end);
  void (*top_k)(const TopK&, int64_t row_begin, int64_t row_end, void* scratch);
  void (*top_k_backward)(const TopK&, int64_t row_begin, int64_t row_end, void* scratch);
  float (*peak_fma)(int64_t passes);  // over kPeakChains chains; returns something that depends on all of them
  float (*peak_read)(const float* data, int64_t count);  // count: a multiple of 256
};

// Bytes of thread-private memory that `top_k` and its backward need: a whole vector has at most 64.
inline int64_t top_k_scratch_bytes(const TopK& k) {
  return 2 * 64 * (k.E + 16) + 2 * 64 * k.K + (k.K + k.num_groups + 32) * 8 + (k.K + k.num_groups) * 16;
}

// Tiles of sums that a task of kPacked keeps: all where they wait for their next block of k, those of one B panel where
// it has few A panels, else the `in_row` that are stored together.
inline int64_t tiles_of_task(const ScheduledGemm& g, int64_t in_row) {
  if (g.k_blocks() > 1) return g.mc_panels * g.nc_panels;
  return g.few_panels() ? g.mc_panels : in_row;
}

// Bytes of thread-private memory that `gemm` needs: the packed B group and sums of tiles.
inline int64_t gemm_scratch_bytes(const ScheduledGemm& g, const KernelTable& table) {
  const int64_t width = table.nr_vectors * table.lanes * 4 / g.element();
  const int64_t tile = g.mr * width;
  if (g.kernel == Schedule::Kernel::kAxpy) {
    const int64_t decoded = g.quantised() ? kAxpyFuse * (g.nc_panels + 1) * width : 0;
    return ((2 * g.panels_m * g.nc_panels + 1) * tile + decoded) * g.element();
  }
  if (g.kernel == Schedule::Kernel::kBroadcast)
    return (2 * tile + width * kSumBlock / g.kr + (g.branches() > 1 ? tile / 2 : 0)) * g.element();
  const int64_t b = g.kernel == Schedule::Kernel::kDot ? 0 : g.nc_panels * width * g.steps(g.kc());
  const int64_t slots = g.mc_panels * g.nc_panels;
  const int64_t tiles = tiles_of_task(g, g.tiles_in_row(tile * g.element())) * tile;
  const int64_t sums = g.branches() > 1 ? slots * tile / 2 : 0;
  return (b + tiles + sums) * g.element();
}

// Schedule::Kernel::kDot holds at most this many columns of a narrow output, and a micro-tile of tokens.
constexpr int kDotRows = 8;
// Schedule::Kernel::kBroadcast holds at most this many tokens, and at most kBroadcastVectors vectors of them.
constexpr int64_t kSmallM = 32;
constexpr int64_t kBroadcastVectors = 4;

#define FFN_OPS_DECLARE(name, ...) \
  namespace name {                 \
  extern const KernelTable kTable; \
  }
FFN_OPS_BUILT_ISAS(FFN_OPS_DECLARE)
#undef FFN_OPS_DECLARE

// The table of an instruction set, null where this build does not have it.
inline const KernelTable* kernel_table(Isa isa) {
  switch (isa) {
#define FFN_OPS_CASE(name, ...) \
  case Isa::name:               \
    return &name::kTable;
    FFN_OPS_BUILT_ISAS(FFN_OPS_CASE)
#undef FFN_OPS_CASE
    default:
      return nullptr;
  }
}

}  // namespace ffn_ops
