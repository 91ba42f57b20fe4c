// SPDX-License-Identifier: BSD-3-Clause
// The kernels for any CPU, without a target region: they use the compiler's baseline.
#define FFN_OPS_ISA baseline
#include "begin.h"

#include "vec_baseline.h"

constexpr int kMR = 6;
constexpr int kNRVectors = 2;

#include "end.h"
