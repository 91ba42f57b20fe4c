// SPDX-License-Identifier: BSD-3-Clause
// Quantised weights as products on the CPU read them, expert by expert.
#pragma once

#include <vector>

#include "../common/quantized_shapes.h"
#include "experts.h"

namespace ffn_ops {

// A stacked weight [E, N, K].
class QuantizedWeight {
 public:
  explicit QuantizedWeight(const StackedCodes& w);
  Matrix at(int64_t expert, int64_t row = 0, int64_t col = 0) const;
  StackedWeight stacked() const {
    return [this](int64_t e, int64_t row, int64_t col) { return at(e, row, col); };
  }
  const Codes& codes(int64_t expert) const { return experts_[static_cast<size_t>(expert)]; }

  int64_t E = 0, N = 0, K = 0;

 private:
  std::vector<Codes> experts_;
};

}  // namespace ffn_ops
