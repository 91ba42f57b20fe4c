// SPDX-License-Identifier: BSD-3-Clause
// The instruction set in use, what `info` reports of this build and machine, and the memory that is kept.
#include <algorithm>
#include <atomic>
#include <string>

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace ffn_ops {
namespace {

std::atomic<int> chosen_isa{-1};

Isa current_isa() {
  int isa = chosen_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    const IsaChoice choice = choose_isa();
    STD_TORCH_CHECK(choice.error.empty(), choice.error);
    isa = static_cast<int>(choice.isa);
    chosen_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

}  // namespace

const KernelTable& kernels() { return *kernel_table(current_isa()); }

namespace {

std::string isa() { return isa_name(current_isa()); }

std::string isas() {
  std::string names;
  for (const Isa each : kIsas)
    if (kernel_table(each) && isa_supported(each)) names += (names.empty() ? "" : " ") + std::string(isa_name(each));
  return names;
}

void use_isa(std::string name) {
  const IsaChoice choice = choose_isa(name.c_str());
  STD_TORCH_CHECK(choice.error.empty(), choice.error);
  chosen_isa.store(static_cast<int>(choice.isa), std::memory_order_relaxed);
}

int64_t use_huge_pages(int64_t address, int64_t bytes) {
  return move_to_huge_pages(reinterpret_cast<const void*>(address), static_cast<size_t>(std::max<int64_t>(0, bytes)));
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&ffn_ops::isa));
  m.impl("_isas", TORCH_BOX(&ffn_ops::isas));
  m.impl("_use_isa", TORCH_BOX(&ffn_ops::use_isa));
  m.impl("_has_amx", TORCH_BOX(&ffn_ops::has_amx));
  m.impl("_empty_cache", TORCH_BOX(&ffn_ops::empty_cache));
  m.impl("_cached_bytes", TORCH_BOX(&ffn_ops::cached_bytes));
  m.impl("_cache_limit", TORCH_BOX(&ffn_ops::cache_limit));
  m.impl("_set_cache_limit", TORCH_BOX(&ffn_ops::set_cache_limit));
  m.impl("_use_huge_pages", TORCH_BOX(&ffn_ops::use_huge_pages));
}
