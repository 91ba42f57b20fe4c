// The kernels for any CPU: no target region, as the compiler's own baseline is meant.
#include <stdint.h>

#include <utility>

#ifdef __aarch64__
#include <arm_neon.h>
#endif

#include "../../common/dtypes.h"
#include "../kernels.h"

namespace ffn_ops::baseline {
#include "vec_baseline.h"

#include "../../common/math.h"

#include "../../common/activations.h"

#include "../../common/scores.h"

constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
using BFloat16Operands = Vec<float>;

#include "../kernels/table.h"
}  // namespace ffn_ops::baseline
