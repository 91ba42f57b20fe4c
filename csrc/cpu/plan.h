// SPDX-License-Identifier: BSD-3-Clause
// The choice of tiles and tasks for a product: a pure function of sizes, testable without torch. It never changes a bit
// of the result.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace ffn_ops {

// Bytes of the packed A operand.
inline int64_t packed_bytes(const ScheduledGemm& g) {
  return divide_up(g.panels_m * g.mr * g.packed_length() * g.element(), 64) * 64;
}

// The products, which do not depend on each other, with their schedules filled in, in groups that are computed one
// after the other: the packed A operands of a group fit into memory that stays in the last-level cache. Too large a
// product becomes several over parts of its rows.
std::vector<std::vector<ScheduledGemm>> plan_products(const std::vector<Gemm>& wanted, const KernelTable& table,
                                                      int64_t workers);

// For debugging: what is computed, and how.
std::string to_string(const Gemm& g);
std::string to_string(const Schedule& s);
std::string to_string(const ScheduledGemm& g);

}  // namespace ffn_ops
