// SPDX-License-Identifier: BSD-3-Clause
// Building blocks of Hopper kernels beyond device.cuh: wgmma, one instruction for each function, and the layout of its
// operands in shared memory. Compiled for compute capability 9.0 with its own features (sm_90a) alone.
#pragma once

#include "../device.cuh"

namespace ffn_ops::cuda {

// Where a tile of 16-bit elements begins and how its pieces follow each other. Pieces are 8 rows of 128 bytes, their
// 16-byte chunks exchanged: chunk c of row r stands at c ^ r. `along_k`: a row is a lane and holds 64 of k, `stride`
// bytes lie between eights of lanes. Else a row is one k and holds 64 lanes, `stride` bytes lie between eights of k and
// `panel` bytes between 64s of lanes.
FFN_FN uint64_t wgmma_operand(const void* shared, int panel, int stride) {
  constexpr uint64_t kChunksExchanged = uint64_t{1} << 62;
  const auto field = [](uint32_t bytes) { return uint64_t{(bytes & 0x3ffff) >> 4}; };
  return kChunksExchanged | field(uint32_t(stride)) << 32 | field(uint32_t(panel)) << 16 |
         field(shared_address(shared));
}

}  // namespace ffn_ops::cuda

#ifdef FFN_OPS_SIMT

#include "../../../tests/simt/wgmma.h"

#else

namespace ffn_ops::cuda {

// Plain writes to shared memory, and copies that have arrived, before this are seen by wgmma behind the next barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product of a group: orders earlier writes to the accumulator registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the last N committed groups: their sums and their operands' memory may be touched again.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define FFN_D8(i)                                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FFN_D32(i) FFN_D8(i), FFN_D8(i + 8), FFN_D8(i + 16), FFN_D8(i + 24)
#define FFN_D64(i) FFN_D32(i), FFN_D32(i + 32)
#define FFN_D128(i) FFN_D64(i), FFN_D64(i + 64)
#define FFN_NAMES_32                                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FFN_NAMES_64                                                                                            \
  FFN_NAMES_32                                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FFN_NAMES_128                                                                                               \
  FFN_NAMES_64                                                                                                      \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, "     \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, " \
  "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "    \
  "%124, %125, %126, %127"
// The operands behind the sums: a, b, whether each runs along lanes.
#define FFN_WGMMA(S, TYPE, N, SUMS, NAMES, A, B, A_LANES, B_LANES)                                                     \
  asm volatile("{.reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
               " {" NAMES "}, " A ", " B ", add, 1, 1, " A_LANES ", " B_LANES ";}"                                     \
               : SUMS(0)                                                                                               \
               : "l"(a), "l"(b), "n"(int(kALanes)), "n"(int(kBLanes)))
#define FFN_WGMMA_OF(S, TYPE)                                                                              \
  if constexpr (N == 64) FFN_WGMMA(S, TYPE, 64, FFN_D32, FFN_NAMES_32, "%32", "%33", "%34", "%35");        \
  else if constexpr (N == 128) FFN_WGMMA(S, TYPE, 128, FFN_D64, FFN_NAMES_64, "%64", "%65", "%66", "%67"); \
  else FFN_WGMMA(S, TYPE, 256, FFN_D128, FFN_NAMES_128, "%128", "%129", "%130", "%131")

// d[64, N] += a[64, 16] · b[16, N] by four warps, operands from shared memory, each along k or (kALanes, kBLanes) along
// lanes. Warp w's lane 4·g + p holds columns 8·j + 2p, 2p + 1 of rows 16·w + g (d[4·j], d[4·j + 1]) and 16·w + g + 8.
template <class S, int N, bool kALanes, bool kBLanes>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (Codec<S>::kDType == DType::kBFloat16) {
    FFN_WGMMA_OF(S, "bf16");
  } else {
    FFN_WGMMA_OF(S, "f16");
  }
#endif
}

#undef FFN_WGMMA_OF
#undef FFN_WGMMA
#undef FFN_NAMES_128
#undef FFN_NAMES_64
#undef FFN_NAMES_32
#undef FFN_D128
#undef FFN_D64
#undef FFN_D32
#undef FFN_D8

}  // namespace ffn_ops::cuda

#endif  // FFN_OPS_SIMT
