// SPDX-License-Identifier: BSD-3-Clause
// Launches of the kernels that move rows between tokens and experts; they are compiled in rows.cu alone.
#pragma once

#include "launch.h"

namespace ffn_ops::cuda {

void launch_dispatch_rows(const Call& call, const MoveRows& job);
// `in` of the arithmetic's dtype or of out's.
void launch_combine_rows(const Call& call, const MoveRows& job);
void launch_row_dots(const Call& call, const RowDots& job);

}  // namespace ffn_ops::cuda
