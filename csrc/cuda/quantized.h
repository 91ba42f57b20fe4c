// SPDX-License-Identifier: BSD-3-Clause
// Products with quantised weights on a GPU, whose kernels read the codes where they lie.
#pragma once

#include "../common/quantized_shapes.h"
#include "experts.h"

namespace ffn_ops::cuda {

// Refuses groups that the kernels cannot read.
void check_groups(const StackedCodes& w, const char* name);

// As with_weights of experts.h. `second`: its rows follow those of the first.
WithWeights with_codes(Call& call, const StackedCodes& w, bool transposed,
                       const std::optional<StackedCodes>& second = {});

// Gate in the lower rows of the weights and up in the upper ones, or alternating.
WithWeights with_gate_and_up(Call& call, const QuantizedMoeShape& s);

}  // namespace ffn_ops::cuda
