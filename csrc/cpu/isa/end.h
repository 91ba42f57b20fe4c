// SPDX-License-Identifier: BSD-3-Clause
// After the vectors of an instruction set, the second half of its file: what is written in them, once for all. Tests
// and benchmarks put kernels of their own in the place of the engine's.

#include "../../common/math.h"

#include "../../common/activations.h"

#include "../../common/scores.h"

#ifdef FFN_OPS_KERNELS
#include FFN_OPS_KERNELS
#else
#include "../kernels/table.h"
#endif

}  // namespace ffn_ops::FFN_OPS_NAMESPACE

#ifdef FFN_OPS_TARGET
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
