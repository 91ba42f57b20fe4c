// SPDX-License-Identifier: BSD-3-Clause
// Sums and searches over warps and blocks, in one fixed order.
#pragma once

#include "grid.h"
#include "scalar.cuh"

namespace ffn_ops::cuda {

// `value`, clamped.
FFN_FN int64_t held(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

// The sum over a warp's lanes, the same in each lane.
template <class T>
FFN_FN T warp_sum(T value) {
#pragma unroll
  for (int by = kWarpSize / 2; by > 0; by /= 2) value += __shfl_xor_sync(0xffffffffu, value, by);
  return value;
}

}  // namespace ffn_ops::cuda
