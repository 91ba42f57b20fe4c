// SPDX-License-Identifier: BSD-3-Clause
// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#define FFN_OPS_ISA avx2
#define FFN_OPS_TARGET "avx2,fma,f16c"
#include "begin.h"

#include "vec_avx2.h"

constexpr int kMR = 6;
constexpr int kNRVectors = 2;

#include "end.h"
#endif  // __x86_64__
