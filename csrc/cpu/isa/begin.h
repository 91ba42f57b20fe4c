// SPDX-License-Identifier: BSD-3-Clause
// Before the vectors of an instruction set, the first half of its file: plain headers, then its target region and its
// namespace. The file has defined FFN_OPS_ISA, its name in dispatch.h, and FFN_OPS_TARGET where the compiler's own
// baseline is not meant. The order matters: no torch or std inline function may be instantiated inside the region, as
// the linker could keep that copy for an older CPU.

#include <stdint.h>

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../../common/dtypes.h"
#include "../kernels.h"

#ifndef FFN_OPS_NAMESPACE
#define FFN_OPS_NAMESPACE FFN_OPS_ISA
#endif
static_assert(static_cast<int>(ffn_ops::Isa::FFN_OPS_ISA) >= 0, "in the list of dispatch.h");

#ifdef FFN_OPS_TARGET
#define FFN_OPS_PRAGMA_TEXT(...) _Pragma(#__VA_ARGS__)
#define FFN_OPS_PRAGMA(...) FFN_OPS_PRAGMA_TEXT(__VA_ARGS__)
#ifdef __clang__
FFN_OPS_PRAGMA(clang attribute push(__attribute__((target(FFN_OPS_TARGET))), apply_to = function))
#else
// GCC 12's own headers start many AVX-512 intrinsics from an undefined register and then warn about it (GCC bug
// 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
FFN_OPS_PRAGMA(GCC target(FFN_OPS_TARGET))
#endif
#endif

namespace ffn_ops::FFN_OPS_NAMESPACE {
