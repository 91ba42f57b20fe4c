// SPDX-License-Identifier: BSD-3-Clause
// Quantised weights as operators take them: tensors and the name of a format, checked so that no kernel reads out of
// range. A weight's tensors are codes, then scales, then zeros or the factor, as common/formats.h counts them.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "experts.h"

namespace ffn_ops {

// A stacked weight [E, N, K].
class QuantizedWeight {
 public:
  // `format`: a name of common/formats.h and the block of a scale, such as fp8:128x128.
  QuantizedWeight(const std::vector<Tensor>& tensors, const std::string& format, const char* name);
  Matrix at(int64_t expert, int64_t row = 0, int64_t col = 0) const;
  StackedWeight stacked() const {
    return [this](int64_t e, int64_t row, int64_t col) { return at(e, row, col); };
  }
  const Codes& codes(int64_t expert) const { return experts_[static_cast<size_t>(expert)]; }

  int64_t E = 0, N = 0, K = 0;

 private:
  std::vector<Codes> experts_;
};

// The names in `formats`, with commas between them.
std::vector<std::string> split_formats(const std::string& formats);

}  // namespace ffn_ops
