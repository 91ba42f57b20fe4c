// The kernels for AVX-512 F, BW, DQ, VL and BF16.
// Order (it matters): plain headers, target region, everything of this instruction set in its namespace, end of region.
// No torch or std inline function may be instantiated inside: the linker could keep that copy for an older CPU.
#if defined(__x86_64__)

// GCC 12's own headers start many AVX-512 intrinsics from an undefined register and then warn about it (GCC bug
// 105593).
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>
#include <stdint.h>

#include <utility>

#include "../../common/dtypes.h"
#include "../kernels.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

namespace ffn_ops::avx512_bf16 {
#include "vec_avx512.h"

#include "vec_bfloat16_pairs.h"

#include "../../common/math.h"

#include "../../common/activations.h"

#include "../../common/scores.h"

constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
using BFloat16Operands = BFloat16Pairs;

#include "../kernels/table.h"
}  // namespace ffn_ops::avx512_bf16

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
