// SPDX-License-Identifier: BSD-3-Clause
// Dispatch: the one list of instruction sets, what this machine supports, and the choice that FFN_OPS_ISA makes. The
// kernels of each are in isa/<name>.cpp. No torch, no vectors.
#pragma once

#include <string>

namespace ffn_ops {

// From the least to the most capable. X(name, whether this CPU and operating system run it, whether it is chosen where
// nobody asks for one); the conditions are defined in dispatch.cpp.
#define FFN_OPS_X86_ISAS(X)     \
  X(avx2, has_avx2(), true)     \
  X(avx512, has_avx512(), true) \
  X(avx512_bf16, has_avx512_bf16(), bfloat16_pairs_pay())
#define FFN_OPS_ISAS(X)   \
  X(baseline, true, true) \
  FFN_OPS_X86_ISAS(X)
// Those that a build for this architecture has kernels of.
#if defined(__x86_64__)
#define FFN_OPS_BUILT_ISAS FFN_OPS_ISAS
#else
#define FFN_OPS_BUILT_ISAS(X) X(baseline, true, true)
#endif

#define FFN_OPS_NAME(name, ...) name,
enum class Isa : int { FFN_OPS_ISAS(FFN_OPS_NAME) };
#undef FFN_OPS_NAME
#define FFN_OPS_VALUE(name, ...) Isa::name,
inline constexpr Isa kIsas[] = {FFN_OPS_ISAS(FFN_OPS_VALUE)};
#undef FFN_OPS_VALUE
#define FFN_OPS_TEXT(name, ...) #name,
inline constexpr const char* kIsaNames[] = {FFN_OPS_ISAS(FFN_OPS_TEXT)};
#undef FFN_OPS_TEXT

constexpr const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

// Whether this CPU and operating system run code of that set.
bool isa_supported(Isa isa);

// Whether they have AMX tiles with bfloat16 products; FFN_OPS_AMX=1 or 0 answers instead.
bool has_amx();

struct IsaChoice {
  Isa isa = Isa::baseline;
  std::string error;  // empty unless the name is unknown or not supported here
};

// The set called `name`; for null, the one that FFN_OPS_ISA names, or else the fastest that is supported.
IsaChoice choose_isa(const char* name = nullptr);

}  // namespace ffn_ops
