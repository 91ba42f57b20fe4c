// The VectorTable of every instruction set, in the same regions as csrc/cpu/isa/<isa>.cpp.
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593, see csrc/cpu/isa/avx512.cpp
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "vector_table.h"

namespace ffn_ops::baseline {
#include "../../csrc/cpu/isa/vec_baseline.h"

#include "../../csrc/common/math.h"

#include "../../csrc/common/activations.h"

#include "vector_kernels.h"
constexpr VectorTable kVectorTable = table(Isa::baseline);
}  // namespace ffn_ops::baseline

#if defined(__x86_64__)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace ffn_ops::avx2 {
#include "../../csrc/cpu/isa/vec_avx2.h"

#include "../../csrc/common/math.h"

#include "../../csrc/common/activations.h"

#include "vector_kernels.h"
constexpr VectorTable kVectorTable = table(Isa::avx2);
}  // namespace ffn_ops::avx2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace ffn_ops::avx512 {
#include "../../csrc/cpu/isa/vec_avx512.h"

#include "../../csrc/common/math.h"

#include "../../csrc/common/activations.h"

#include "vector_kernels.h"
// avx512_bf16 has the same vectors.
constexpr VectorTable kVectorTable = table(Isa::avx512);
}  // namespace ffn_ops::avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

namespace ffn_ops {

const VectorTable* vector_table(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return &baseline::kVectorTable;
#if defined(__x86_64__)
    case Isa::avx2:
      return &avx2::kVectorTable;
    case Isa::avx512:
      return &avx512::kVectorTable;
#endif
    default:
      return nullptr;
  }
}

}  // namespace ffn_ops
