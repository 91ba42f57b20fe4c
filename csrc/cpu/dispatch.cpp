// SPDX-License-Identifier: BSD-3-Clause
// CPU detection behind dispatch.h.
#include "dispatch.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ffn_ops {
namespace {

// Null or empty reads as not set.
const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value && *value ? value : nullptr;
}

#if defined(__x86_64__)
// The state components that the operating system saves; 0 if it saves none.
uint64_t saved_state() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & (1u << 27))) return 0;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (uint64_t(edx) << 32) | eax;
}

bool detect_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  constexpr uint64_t tile_state = 3u << 17;
  return (edx & amx_bf16) && (edx & amx_tile) && (saved_state() & tile_state) == tile_state;
}

// Whether products of bfloat16 in pairs beat those in float32: AMD documents twice the rate for its cores, on an Intel
// core a training step took 1.6 times as long.
bool bfloat16_pairs_pay() {
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
}

// CPUID leaf 1; clang 14 does not know the name "f16c".
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
}
// __builtin_cpu_supports is false for registers that the operating system does not save.
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() {
#ifdef FFN_OPS_EMULATE_BFLOAT16_PAIRS
  return has_avx512();
#else
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
}
#endif

struct Support {
  bool supported, preferred;
};
Support support(Isa isa) {
  switch (isa) {
#define FFN_OPS_CASE(name, supported, preferred) \
  case Isa::name:                                \
    return {supported, preferred};
    FFN_OPS_BUILT_ISAS(FFN_OPS_CASE)
#undef FFN_OPS_CASE
    default:
      return {false, false};
  }
}

}  // namespace

bool isa_supported(Isa isa) { return support(isa).supported; }

bool has_amx() {
  if (const char* forced = environment("FFN_OPS_AMX")) {
    if (!std::strcmp(forced, "1")) return true;
    if (!std::strcmp(forced, "0")) return false;
  }
#if defined(__x86_64__)
  return detect_amx();
#else
  return false;
#endif
}

IsaChoice choose_isa(const char* name) {
  const char* source = "instruction set";
  if (!name) {
    name = environment("FFN_OPS_ISA");
    source = "FFN_OPS_ISA";
  }
  Isa best = Isa::baseline;
  std::string all, supported;
  for (const Isa isa : kIsas) {
    const auto [runs, preferred] = support(isa);
    if (name && !std::strcmp(name, isa_name(isa)) && runs) return {isa, ""};
    all += (all.empty() ? "" : ", ") + std::string(isa_name(isa));
    if (runs) {
      if (preferred) best = isa;
      supported += (supported.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
  }
  if (!name) return {best, ""};
  for (const Isa isa : kIsas) {
    if (!std::strcmp(name, isa_name(isa))) {
      return {best, std::string(source) + ": this CPU does not support '" + name + "'; it supports " + supported};
    }
  }
  return {best, std::string(source) + ": unknown name '" + name + "', expected one of " + all};
}

}  // namespace ffn_ops
