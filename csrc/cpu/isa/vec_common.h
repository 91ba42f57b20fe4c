// SPDX-License-Identifier: BSD-3-Clause
// Register types and the primitives that GCC's vector extensions express well for registers of any width.
// Included inside each instruction set's namespace and target region, after `kVectorBytes` is set, by vec_<isa>.h.

template <class T>
struct RegisterType {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using RegisterOf = typename RegisterType<T>::Type;

template <class T>
struct IntType;
template <>
struct IntType<float> {
  using Type = int32_t;
};
template <>
struct IntType<double> {
  using Type = int64_t;
};
template <class T>
using IntOf = typename IntType<T>::Type;

using FloatLanes = RegisterOf<float>;
using DoubleLanes = RegisterOf<double>;
using Int32Lanes = RegisterOf<int32_t>;
using Uint32Lanes = RegisterOf<uint32_t>;
using Int64Lanes = RegisterOf<int64_t>;
using Int16Lanes = RegisterOf<int16_t>;
using Uint8Lanes = RegisterOf<uint8_t>;

FFN_FN FloatLanes broadcast_lanes(float x) { return x - FloatLanes{}; }
FFN_FN DoubleLanes broadcast_lanes(double x) { return x - DoubleLanes{}; }

// bfloat16 is the upper half of a float: round the lower half to nearest even by an integer add, quiet a NaN instead.
// AVX512-BF16's conversion is not used: it takes denormals as zero.
FFN_FN Uint32Lanes bfloat16_bits(FloatLanes v) {
  const Uint32Lanes bits = (Uint32Lanes)v;
  const Uint32Lanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Uint32Lanes quiet_nan = (bits >> 16) | 0x40u;
  return v == v ? rounded : quiet_nan;
}
