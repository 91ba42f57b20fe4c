// SPDX-License-Identifier: BSD-3-Clause
// One test case of a grouped product: shapes, layouts, epilogue; and matrices of any layout, with NaN where nothing may
// be read.
#pragma once

#include "../../csrc/common/names.h"
#include "../../csrc/cuda/gemm_kernel.cuh"
#include "testing.h"

namespace gemm_test {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using Kind = GroupedGemm::Kind;
using Finish = Epilogue::Kind;

// A shape of tile, and who multiplies.
struct Way {
  GemmShape shape;
  bool hopper;
  const char* name;
};
constexpr Way kWays[] = {{GemmShape::kShort, false, "short tiles"},
                         {GemmShape::kTall, false, "tall tiles"},
                         {GemmShape::kShort, true, "short tiles by wgmma"},
                         {GemmShape::kTall, true, "tall tiles by wgmma"},
                         {GemmShape::kWide, true, "wide tiles by wgmma"}};

enum class Layout {
  kAligned,     // rows begin at multiples of 16 bytes
  kOdd,         // rows directly after each other, the first one element too late
  kTransposed,  // columns begin at multiples of 16 bytes
  kStrided,     // every second element
};

// A matrix in exactly the memory that it spans; what nobody sets is NaN.
template <class S>
struct Stored {
  int64_t rows, cols, row_stride, col_stride, offset;
  simt::Buffer<S> memory;

  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  Stored(int64_t r, int64_t c, Layout layout)
      : rows(r), cols(c), row_stride(c), col_stride(1), offset(0), memory(span(layout)) {}

  S* data() { return memory.data() + offset; }
  S& at(int64_t r, int64_t c) { return memory[offset + r * row_stride + c * col_stride]; }
  double value(int64_t r, int64_t c) { return double(Codec<S>::decode(at(r, c))); }
  void set(int64_t r, int64_t c, double v) { at(r, c) = Codec<S>::encode(ComputeOf<S>(v)); }

 private:
  int64_t span(Layout layout) {
    if (layout == Layout::kAligned) row_stride = padded(cols);
    if (layout == Layout::kOdd) offset = 1;
    if (layout == Layout::kTransposed) row_stride = 1, col_stride = padded(rows);
    if (layout == Layout::kStrided) row_stride = 2 * cols + 1, col_stride = 2;
    return rows && cols ? offset + (rows - 1) * row_stride + (cols - 1) * col_stride + 1 : 1;
  }
};

struct Case {
  const char* reason;
  Kind kind = Kind::kRows;
  std::vector<int64_t> rows = {5};  // of each expert
  int64_t dropped = 0;              // rows behind them
  int64_t M = 0, N = 0, K = 0;
  Layout a = Layout::kAligned, b = Layout::kAligned;
  bool gather_a = false, gather_b = false;
  bool wrong_indices = false;  // some gathered rows lie outside the matrix
  bool dense = false;          // no offsets
  Finish finish = Finish::kStore;
  bool gated = false, bias = false, weighted = false;
  bool odd_out = false;  // outputs whose rows are not aligned
  int activation = kActivations.index("silu");
  bool save = true, act = true, h = true;
  bool limited = false;      // gated
  bool interleaved = false;  // kActivateGrad with save
  bool added = false;        // another product joins this one
  bool unrounded = false;    // kStore: scaled, and of the arithmetic's dtype
  uint64_t seed = 1;
};

}  // namespace gemm_test
