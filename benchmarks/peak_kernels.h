// SPDX-License-Identifier: BSD-3-Clause
// The kernels that csrc/cpu/isa/*.cpp are compiled with for peak.py, after peak.h.

// The fixed point of z * 0.999 + 0.001 is 1: no overflow, no denormals.
float peak_fma(long passes) {
  using V = Vec<float>;
  V chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = V(static_cast<float>(i));
  const V scale(0.999f), shift(0.001f);
  for (long p = 0; p < passes; ++p) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = fma(chain[i], scale, shift);
  }
  V sum = V::zero();
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  return reduce_add(sum);
}

float peak_read(const float* data, size_t count) {
  using V = Vec<float>;
  V sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = V::zero();
  for (size_t k = 0; k < count; k += 8 * V::kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] += load<V>(data + k + i * V::kLanes);
  }
  for (int i = 1; i < 8; ++i) sum[0] += sum[i];
  return reduce_add(sum[0]);
}

extern const Peak kPeak;
const Peak kPeak = {Vec<float>::kLanes, peak_fma, peak_read};
