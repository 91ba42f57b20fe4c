// SPDX-License-Identifier: BSD-3-Clause
// Inputs of element-wise kernels.
#pragma once

#include "../../csrc/cuda/elementwise.cuh"
#include "problems.h"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::Buffer;
using simt::Random;

// A matrix of random values in one of several layouts.
template <class S>
struct Input {
  Buffer<S> buffer;
  Matrix m;
  Input(int layout, int64_t rows, int64_t cols, Random& random) : buffer(memory_of(layout, rows, cols)) {
    for (S& value : buffer) value = Codec<S>::encode(ComputeOf<S>(3 * normal(random)));
    const int64_t strides[][2] = {{cols, 1}, {cols + 16, 1}, {1, rows}, {0, 1}, {cols, 1}, {0, 0}, {2 * cols + 1, 2}};
    m = {buffer.data() + (layout == 4), strides[layout][0], strides[layout][1]};
  }
  static int64_t memory_of(int layout, int64_t rows, int64_t cols) {
    const int64_t sizes[] = {rows * cols, rows * (cols + 16),   rows * cols, cols, rows * cols + 1,
                             1,           rows * (2 * cols + 1)};
    return sizes[layout];
  }
  double at(int64_t r, int64_t c) const { return double(Codec<S>::decode(*element<S>(m, r, c))); }
};
constexpr int kLayouts = 7;

}  // namespace
