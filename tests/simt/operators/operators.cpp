// SPDX-License-Identifier: BSD-3-Clause
// What the CUDA operators need of torch and of the CPU library when they run on the host in the CPU operators' place.
#include <cstdio>
#include <cstdlib>
#include <string>

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <torch/csrc/stable/library.h>

#include "../../../csrc/cpu/ops.h"

// A GPU is the CPU, without a guard and with one stream.
extern "C" {
int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

// simt.h tells the address sanitizer of its stacks; Python runs without one.
int __asan_address_is_poisoned(const volatile void*) { return 0; }
void __asan_poison_memory_region(const volatile void*, size_t) {}
void __asan_unpoison_memory_region(const volatile void*, size_t) {}
void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
void __sanitizer_symbolize_pc(void*, const char*, char* text, size_t bytes) { std::snprintf(text, bytes, "a kernel"); }
}

namespace ffn_ops {

// BASE's assignment, which the CPU solves for every device, takes no kernel of a table.
const KernelTable& kernels() { std::abort(); }

namespace {
std::string isa() { return "simt"; }
void use_isa(std::string) {}
bool no_amx() { return false; }
}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&ffn_ops::isa));
  m.impl("_isas", TORCH_BOX(&ffn_ops::isa));
  m.impl("_use_isa", TORCH_BOX(&ffn_ops::use_isa));
  m.impl("_has_amx", TORCH_BOX(&ffn_ops::no_amx));
}
