// SPDX-License-Identifier: BSD-3-Clause
// Reports of failures for vector_test.cpp, and two helpers for bits.
#pragma once

#include <cstdio>
#include <cstring>

#include "vector_table.h"

namespace ffn_ops {

inline int failures = 0;

template <class... Args>
void fail(const VectorTable& v, const char* format, Args... args) {
  if (++failures > 30) return;
  std::printf("\nFAIL %s: ", isa_name(v.isa));
  std::printf(format, args...);
  std::printf("\n");
}

template <class T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <class To, class From>
To bits_as(From from) {
  return __builtin_bit_cast(To, from);
}

}  // namespace ffn_ops
