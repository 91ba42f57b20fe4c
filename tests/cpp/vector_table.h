// SPDX-License-Identifier: BSD-3-Clause
// The functions of each instruction set that vector_test.cpp calls: plain functions over arrays, so that the test
// itself is compiled for the baseline only. No vectors.
#pragma once

#include <stdint.h>

#include "../../csrc/common/dtypes.h"
#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/common/gate.h"

namespace ffn_ops {

// In this order in `Arithmetic::math`.
inline constexpr const char* kMathNames[] = {"exp", "tanh", "erf", "sigmoid", "normal_cdf"};
constexpr int kMathCount = 5;

template <class T>
struct Arithmetic {
  int lanes;
  void (*math[kMathCount])(const T* x, T* out, int64_t count);  // count: a multiple of lanes
  // out: fwd, then value and slope of grad, then value, slope and curvature of grad2.
  void (*activation)(int index, const T* own, const T* z, T* const (&out)[6], int64_t count);
  void (*transpose)(T* square);
  T (*reduce_add)(const T* x);
  // One vector of each result, in the order of `check_basics`.
  void (*basics)(const T* a, const T* b, const T* c, T* out);
};

template <class S>
struct Storage {
  using T = typename Codec<S>::Compute;
  void (*load)(const S* p, int n, T* lanes);  // n < 0: the load of a whole vector
  void (*store)(const T* lanes, S* p, int n);
};

struct VectorTable {
  Isa isa;
  bool has_fma;
  Arithmetic<float> arithmetic_float;
  Arithmetic<double> arithmetic_double;
  Storage<double> storage_double;
  Storage<float> storage_float;
  Storage<Half> storage_half;
  Storage<BFloat16> storage_bfloat16;
};

#define FFN_OPS_DECLARE(name, ...)       \
  namespace name {                       \
  extern const VectorTable kVectorTable; \
  }
FFN_OPS_BUILT_ISAS(FFN_OPS_DECLARE)
#undef FFN_OPS_DECLARE

// Null where this build does not have it.
inline const VectorTable* vector_table(Isa isa) {
  switch (isa) {
#define FFN_OPS_CASE(name, ...) \
  case Isa::name:               \
    return &name::kVectorTable;
    FFN_OPS_BUILT_ISAS(FFN_OPS_CASE)
#undef FFN_OPS_CASE
    default:
      return nullptr;
  }
}

}  // namespace ffn_ops
