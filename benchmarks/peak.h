// SPDX-License-Identifier: BSD-3-Clause
// What peak.cpp calls of each instruction set. Included before csrc/cpu/isa/*.cpp, whose kernels are peak_kernels.h
// here.
#pragma once

#include <stddef.h>

#include "../csrc/cpu/dispatch.h"

namespace ffn_ops {

// Enough independent chains to cover latency times throughput of every core so far (4 to 8 cycles, 2 per cycle).
constexpr int kChains = 12;

struct Peak {
  int lanes;
  float (*fma)(long passes);  // a pass over kChains chains; returns something that depends on all of them
  float (*read)(const float* data, size_t count);  // count: a multiple of 256
};

#define FFN_OPS_DECLARE(name, ...) \
  namespace name {                 \
  extern const Peak kPeak;         \
  }
FFN_OPS_BUILT_ISAS(FFN_OPS_DECLARE)
#undef FFN_OPS_DECLARE

}  // namespace ffn_ops
