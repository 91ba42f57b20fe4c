// The one list of instruction sets, what this machine supports, and dispatch, with FFN_OPS_ISA.
// No torch, no vectors.
#pragma once

#include <string>

namespace ffn_ops {

// From the least to the most capable; names and list in the same order.
enum class Isa : int { baseline, avx2, avx512, avx512_bf16 };
inline constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16};
inline constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

constexpr const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

// Whether this CPU and operating system can run code of that set.
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
