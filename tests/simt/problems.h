// SPDX-License-Identifier: BSD-3-Clause
// Random numbers and tolerances for the tests of element-wise kernels and routing.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "../../csrc/common/dtypes.h"
#include "simt.h"

namespace {

// About normal, exact in float.
[[maybe_unused]] double normal(simt::Random& random) {
  double sum = 0;
  for (int i = 0; i < 4; ++i) sum += double(random.next() >> 48) * 0x1p-16;
  return float((sum - 2) * 1.7);
}

// The largest relative error of one rounding.
template <class S>
constexpr double epsilon() {
  if constexpr (sizeof(S) == 8) return 0x1p-53;
  else if constexpr (std::is_same_v<S, ffn_ops::BFloat16>) return 0x1p-8;
  else if constexpr (std::is_same_v<S, ffn_ops::Half>) return 0x1p-11;
  else return 0x1p-24;
}

// As simt::Buffer leaves it.
template <class S>
bool is_poison(const S& value) {
  unsigned char bytes[sizeof(S)];
  std::memcpy(bytes, &value, sizeof(S));
  for (const unsigned char byte : bytes)
    if (byte != 0xff) return false;
  return true;
}

}  // namespace
