// The kernels for AVX2 with FMA and F16C.
// Order (it matters): plain headers, target region, everything of this instruction set in its namespace, end of region.
// No torch or std inline function may be instantiated inside: the linker could keep that copy for an older CPU.
#if defined(__x86_64__)

#include <immintrin.h>
#include <stdint.h>

#include <utility>

#include "../../common/dtypes.h"
#include "../kernels.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace ffn_ops::avx2 {
#include "vec_avx2.h"

#include "../../common/math.h"

#include "../../common/activations.h"

#include "../../common/scores.h"

constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
using BFloat16Operands = Vec<float>;

#include "../kernels/table.h"
}  // namespace ffn_ops::avx2

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
