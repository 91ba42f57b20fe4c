// SPDX-License-Identifier: BSD-3-Clause
// Building blocks of kernels: qualifiers, and functions of one instruction each. It contains no logic, and uses neither
// torch nor CUDA's 16-bit types. With FFN_OPS_SIMT, tests/simt gives the same names on the host.
#pragma once

#include "../common/dtypes.h"

#ifdef FFN_OPS_SIMT

#include "../../tests/simt/simt.h"

#else

// From here on FFN_FN is device code: math.h and activations.h. dtypes.h is constexpr, callable on both sides.
#undef FFN_FN
#define FFN_FN __device__ __forceinline__
#define FFN_KERNEL_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// A const parameter of a kernel that is read where it is, by an address: else the compiler would copy it.
#define FFN_IN_PLACE __grid_constant__

namespace ffn_ops::cuda {

// Whether the code path with wgmma, or the one without, matches the architecture being compiled.
constexpr bool runs_here(bool hopper) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  return hopper;
#else
  return !hopper;
#endif
}
__device__ __forceinline__ void refuse() { __trap(); }

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// An address in the form that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies the first `bytes` (0 to 16) and fills the rest of 16 with zeros; both addresses are multiples of 16. Arrives
// when the calling thread has waited for its group.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the last N committed groups of the calling thread.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8×8 matrices of 16-bit elements: lane 8·i + j points to row j of matrix i; lane 4·g + p gets elements 2p and
// 2p + 1 of row g of each (transposed: of column g).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row)));
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row)));
}

// d[16, 8] += a[16, 16] · b[16, 8]: lane 4·g + p holds a's rows g and g + 8 (registers 0, 2 and 1, 3; columns 2p, 2p +
// 1 and, in 2 and 3, 8 more), b's column g (rows 2p, 2p + 1 and 8 more), and columns 2p, 2p + 1 of d's rows g and g
// + 8.
template <class S>
__device__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_16816<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16816<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace ffn_ops::cuda

#endif  // FFN_OPS_SIMT
