// SPDX-License-Identifier: BSD-3-Clause
// The kernels for AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#define FFN_OPS_ISA avx512
#define FFN_OPS_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#include "begin.h"

#include "vec_avx512.h"

constexpr int kMR = 6;
constexpr int kNRVectors = 4;

#include "end.h"
#endif  // __x86_64__
