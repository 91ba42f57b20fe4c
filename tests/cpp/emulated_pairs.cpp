// SPDX-License-Identifier: BSD-3-Clause
// The kernels of avx512_bf16 in a namespace of their own, with vdpbf16ps emulated: for machines with plain AVX-512.
#define FFN_OPS_EMULATE_BFLOAT16_PAIRS
#define FFN_OPS_NAMESPACE avx512_bf16_emulated
#include "../../csrc/cpu/isa/avx512_bf16.cpp"
