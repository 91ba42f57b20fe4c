// The kernels for any CPU: no target region, as the compiler's own baseline is meant.
#define FFN_OPS_ISA baseline
#include "begin.h"

#include "vec_baseline.h"

constexpr int kMR = 6;
constexpr int kNRVectors = 2;

#include "end.h"
