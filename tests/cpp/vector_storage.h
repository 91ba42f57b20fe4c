// SPDX-License-Identifier: BSD-3-Clause
// Checks of loads and stores: every tail length at the end of a mapped page, every 16-bit pattern, roundings and NaN.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "vector_failures.h"

namespace ffn_ops {

// Memory that ends where the next page is unmapped: touching one byte too many is a crash.
class GuardedPage {
 public:
  GuardedPage() : size_(sysconf(_SC_PAGESIZE)) {
    void* p = mmap(nullptr, 2 * size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(static_cast<char*>(p) + size_, size_, PROT_NONE)) std::abort();
    base_ = static_cast<char*>(p);
  }
  ~GuardedPage() { munmap(base_, 2 * size_); }
  GuardedPage(const GuardedPage&) = delete;
  GuardedPage& operator=(const GuardedPage&) = delete;

  template <class S>
  S* last(int n) {
    return reinterpret_cast<S*>(base_ + size_) - n;
  }

 private:
  size_t size_;
  char* base_;
};

template <class S>
void check_tails(const VectorTable& v, const Storage<S>& storage, int lanes) {
  using T = typename Codec<S>::Compute;
  GuardedPage page;
  const T canary = T(-77);
  std::vector<T> wide(lanes), out(lanes);
  for (int i = 0; i < lanes; ++i) wide[i] = T(i + 1);
  for (int n = -1; n <= lanes; ++n) {
    const int count = n < 0 ? lanes : n;
    S* p = page.last<S>(count);
    for (int i = 1; i <= 4; ++i) p[-i] = Codec<S>::encode(canary);
    storage.store(wide.data(), p, n);
    std::fill(out.begin(), out.end(), canary);
    storage.load(p, n, out.data());
    for (int i = 0; i < lanes; ++i) {
      if (out[i] != (i < count ? wide[i] : T(0))) fail(v, "load or store, n = %d, lane %d: %g", n, i, double(out[i]));
    }
    for (int i = 1; i <= 4; ++i) {
      if (Codec<S>::decode(p[-i]) != canary) fail(v, "store wrote before its start, n = %d", n);
    }
    // Bytes after the end, without the page's help.
    S* early = page.last<S>(lanes + 4);
    std::fill(early, early + lanes + 4, Codec<S>::encode(canary));
    storage.store(wide.data(), early, n);
    for (int i = count; i < lanes + 4; ++i) {
      if (Codec<S>::decode(early[i]) != canary) fail(v, "store wrote past n = %d", n);
    }
  }
}

// The nearest multiple of S's last place, ties to even, by exact arithmetic in double.
inline double rounded_to(float x, int digits, int min_exponent, double largest) {
  if (std::isnan(x) || std::isinf(x) || x == 0) return x;
  int exponent = 0;
  std::frexp(x, &exponent);
  const double place = std::ldexp(1.0, std::max(exponent, min_exponent) - digits);
  const double result = std::nearbyint(x / place) * place;
  return std::fabs(result) > largest ? std::copysign(HUGE_VAL, x) : result;
}
inline double rounded_to(float x, BFloat16) {
  return rounded_to(x, 8, -125, std::ldexp(1.0, 128) * (1 - std::ldexp(1.0, -8)));
}
inline double rounded_to(float x, Half) { return rounded_to(x, 11, -13, 65504); }

inline double exact_value(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline double exact_value(Half x) {
  const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  double m = exponent == 31 ? (fraction ? NAN : HUGE_VAL)
                            : std::ldexp(exponent ? 1024 + fraction : fraction, std::max(exponent, 1) - 25);
  return x.bits & 0x8000 ? -m : m;
}

inline bool is_nan(double x) { return std::isnan(x); }

// All 65536 patterns in; out: their neighbourhood and half-way points, and a sweep over all floats, NaN payloads too.
template <class S>
void check_codec(const VectorTable& v, const Storage<S>& storage, int lanes, const char* name) {
  std::vector<S> in(65536), out(lanes);
  std::vector<float> decoded(65536), floats;
  for (int i = 0; i < 65536; ++i) in[i].bits = uint16_t(i);
  for (int i = 0; i < 65536; i += lanes) storage.load(&in[i], -1, &decoded[i]);
  for (int i = 0; i < 65536; ++i) {
    const float scalar = Codec<S>::decode(in[i]);
    const double exact = exact_value(in[i]);
    if (!same_bits(decoded[i], scalar)) fail(v, "%s decode %#x: %g, scalar %g", name, i, decoded[i], scalar);
    if (!(is_nan(exact) ? is_nan(scalar) : scalar == exact && std::signbit(scalar) == std::signbit(exact)))
      fail(v, "%s scalar decode %#x: %g", name, i, scalar);
    const float next = i % 32768 < 32767 ? Codec<S>::decode(S{uint16_t(i + 1)}) : scalar;
    const uint32_t middle = bits_as<uint32_t>(float((double(scalar) + double(next)) / 2));
    for (const uint32_t bits : {bits_as<uint32_t>(scalar), middle - 1, middle, middle + 1})
      floats.push_back(bits_as<float>(bits));
  }
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += 4099) floats.push_back(bits_as<float>(uint32_t(bits)));
  for (const float x :
       {65504.0f, 65519.99f, 65520.0f, 0x1.fefp127f, 0x1.ffp127f, 0x1.fffffep127f, 0x1p-25f, 0x1.000002p-25f})
    floats.insert(floats.end(), {x, -x});
  floats.resize(floats.size() / lanes * lanes + lanes);
  for (size_t i = 0; i < floats.size(); i += lanes) {
    storage.store(&floats[i], out.data(), -1);
    for (int lane = 0; lane < lanes; ++lane) {
      const float x = floats[i + lane];
      const S scalar = Codec<S>::encode(x);
      if (scalar.bits != out[lane].bits) fail(v, "%s encode %a: %#x, scalar %#x", name, x, out[lane].bits, scalar.bits);
      const double got = exact_value(scalar), want = rounded_to(x, S{});
      if (!(is_nan(want) ? is_nan(got) : got == want && std::signbit(got) == std::signbit(x)))
        fail(v, "%s scalar encode %a: %g, expected %g", name, x, got, want);
    }
  }
}

}  // namespace ffn_ops
