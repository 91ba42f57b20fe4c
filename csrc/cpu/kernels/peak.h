// SPDX-License-Identifier: BSD-3-Clause
// What the machine can do at best: multiply-adds in registers, and reads of memory. peak.cpp times them.

// The fixed point of z * 0.999 + 0.001 is 1: no overflow, no denormals.
float peak_fma(int64_t passes) {
  using V = Vec<float>;
  V chain[kPeakChains];
  for (int i = 0; i < kPeakChains; ++i) chain[i] = V(static_cast<float>(i));
  const V scale(0.999f), shift(0.001f);
  for (int64_t p = 0; p < passes; ++p) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakChains; ++i) chain[i] = fma(chain[i], scale, shift);
  }
  V sum = V::zero();
  for (int i = 0; i < kPeakChains; ++i) sum += chain[i];
  return reduce_add(sum);
}

float peak_read(const float* data, int64_t count) {
  using V = Vec<float>;
  V sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = V::zero();
  for (int64_t k = 0; k < count; k += 8 * V::kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] += load<V>(data + k + i * V::kLanes);
  }
  for (int i = 1; i < 8; ++i) sum[0] += sum[i];
  return reduce_add(sum[0]);
}
