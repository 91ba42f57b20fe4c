// The choice of tiles and tasks for a product: a pure function of sizes, testable without torch. It never changes a bit
// of the result.
#pragma once

#include <vector>

#include "kernels.h"

namespace ffn_ops {

// The product as one or, where its packed A operand would grow too large, several products over parts of its rows, each
// with its schedule filled in.
std::vector<Gemm> plan_product(const Gemm& g, const KernelTable& table, int64_t workers);

}  // namespace ffn_ops
