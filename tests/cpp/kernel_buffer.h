// SPDX-License-Identifier: BSD-3-Clause
// Helpers for the kernel tests: storage of any dtype read as double, and the comparison that counts failures.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>

#include "../../csrc/common/dtypes.h"

namespace ffn_ops {

inline int failures = 0;
inline uint64_t state = 1;

inline double uniform() {  // in [-1, 1)
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(static_cast<int64_t>(state) >> 11) / 4503599627370496.0;
}

// A storage of any dtype with guard elements behind it, read and written as double.
struct Buffer {
  DType dtype;
  int64_t size;
  std::unique_ptr<char[]> data;  // exactly as long as needed: the address sanitizer sees every step outside

  Buffer(DType type, int64_t n) : dtype(type), size(n), data(new char[static_cast<size_t>(n * storage_size(type))]) {
    for (int64_t i = 0; i < n; ++i) set(i, uniform());
  }
  explicit Buffer(const Buffer& other) : Buffer(other.dtype, other.size) {
    std::memcpy(data.get(), other.data.get(), bytes());
  }
  Buffer(Buffer&&) = default;
  size_t bytes() const { return static_cast<size_t>(size * storage_size(dtype)); }
  void set(int64_t i, double value) {
    visit_type(StorageTypes{}, static_cast<int>(dtype), [&](auto tag) {
      using S = typename decltype(tag)::Type;
      const S stored = Codec<S>::encode(static_cast<typename Codec<S>::Compute>(value));
      std::memcpy(data.get() + i * static_cast<int64_t>(sizeof(S)), &stored, sizeof(S));
    });
  }
  double get(int64_t i) const {
    double value = 0;
    visit_type(StorageTypes{}, static_cast<int>(dtype), [&](auto tag) {
      using S = typename decltype(tag)::Type;
      S stored;
      std::memcpy(&stored, data.get() + i * static_cast<int64_t>(sizeof(S)), sizeof(S));
      value = static_cast<double>(Codec<S>::decode(stored));
    });
    return value;
  }
};

inline double epsilon(DType dtype) {
  constexpr double values[] = {2.3e-16, 1.2e-7, 9.8e-4, 7.9e-3};
  return values[static_cast<int>(dtype)];
}

inline void expect(const char* what, const char* isa, DType dtype, double actual, double wanted, double magnitude,
                   double terms) {
  const double arithmetic = dtype == DType::kFloat64 ? 2.3e-16 : 1.2e-7;
  const double bound = (epsilon(dtype) + arithmetic * (4 + terms)) * (magnitude + std::fabs(wanted));
  if (std::fabs(actual - wanted) <= bound) return;
  if (++failures <= 20)
    std::printf("%s %s %s: %.17g, expected %.17g within %.3g\n", isa, what, kDTypeNames[static_cast<int>(dtype)],
                actual, wanted, bound);
}

inline void expect_same(const char* what, const char* isa, const Buffer& actual, const Buffer& wanted) {
  if (actual.bytes() == wanted.bytes() && std::memcmp(actual.data.get(), wanted.data.get(), wanted.bytes()) == 0)
    return;
  if (++failures <= 20) std::printf("%s %s %s: other bits\n", isa, what, kDTypeNames[static_cast<int>(wanted.dtype)]);
}

}  // namespace ffn_ops
