// SPDX-License-Identifier: BSD-3-Clause
// The kernels for AVX-512 F, BW, DQ, VL and BF16.
#if defined(__x86_64__)
#define FFN_OPS_ISA avx512_bf16
#define FFN_OPS_BASE avx512
#define FFN_OPS_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#include "begin.h"

#include "vec_avx512.h"

#include "vec_bfloat16_pairs.h"

constexpr int kMR = 6;
constexpr int kNRVectors = 4;
using BFloat16Operands = BFloat16Pairs;

#include "end.h"
#endif  // __x86_64__
