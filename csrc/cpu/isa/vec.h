// SPDX-License-Identifier: BSD-3-Clause
// `Vec<T>`: one register of float or double, with the arithmetic that kernels, math.h and activations.h are written in.
// Included inside each instruction set's namespace and target region, after its vec_<isa>.h, which holds the primitives
// on registers (names end in `_lanes`). No include guard, no #include, no std.

template <class T>
struct Vec {
  using Scalar = T;
  using Register = RegisterOf<T>;
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));
  // As an operand of a product: the type of the sum, and how many neighbours along k a lane holds.
  using Sum = Vec;
  static constexpr int kKR = 1;

  struct Mask {
    MaskOf<T> bits;
    FFN_FN friend Mask operator&(Mask a, Mask b) { return {static_cast<MaskOf<T>>(a.bits & b.bits)}; }
    FFN_FN friend Mask operator|(Mask a, Mask b) { return {static_cast<MaskOf<T>>(a.bits | b.bits)}; }
    FFN_FN friend Mask operator!(Mask a) { return {static_cast<MaskOf<T>>(~a.bits)}; }
  };

  Register reg;

  Vec() = default;
  FFN_FN explicit Vec(Register r) : reg(r) {}
  FFN_FN Vec(T x) : reg(broadcast_lanes(x)) {}
  FFN_FN static Vec zero() { return Vec(T(0)); }

  FFN_FN friend Vec operator+(Vec a, Vec b) { return Vec(a.reg + b.reg); }
  FFN_FN friend Vec operator-(Vec a, Vec b) { return Vec(a.reg - b.reg); }
  FFN_FN friend Vec operator*(Vec a, Vec b) { return Vec(a.reg * b.reg); }
  FFN_FN friend Vec operator/(Vec a, Vec b) { return Vec(a.reg / b.reg); }
  FFN_FN friend Vec operator-(Vec a) { return Vec(-a.reg); }
  FFN_FN Vec& operator+=(Vec b) { return *this = *this + b; }
  FFN_FN Vec& operator-=(Vec b) { return *this = *this - b; }
  FFN_FN Vec& operator*=(Vec b) { return *this = *this * b; }

  FFN_FN friend Mask operator<(Vec a, Vec b) { return {less_lanes(a.reg, b.reg)}; }
  FFN_FN friend Mask operator<=(Vec a, Vec b) { return {less_equal_lanes(a.reg, b.reg)}; }
  FFN_FN friend Mask operator==(Vec a, Vec b) { return {equal_lanes(a.reg, b.reg)}; }
  FFN_FN friend Mask operator>(Vec a, Vec b) { return b < a; }
  FFN_FN friend Mask operator>=(Vec a, Vec b) { return b <= a; }
  FFN_FN friend Mask operator!=(Vec a, Vec b) { return !(a == b); }

  // mask ? a : b, lane by lane.
  FFN_FN friend Vec select(Mask mask, Vec a, Vec b) { return Vec(select_lanes(mask.bits, a.reg, b.reg)); }

  // a·b + c: one rounding where `kHasFma`, else two.
  FFN_FN friend Vec fma(Vec a, Vec b, Vec c) { return Vec(fma_lanes(a.reg, b.reg, c.reg)); }

  // If a lane of a or b is NaN, both return b's lane: `max(lo, min(hi, x))` keeps a NaN of x.
  FFN_FN friend Vec min(Vec a, Vec b) { return Vec(min_lanes(a.reg, b.reg)); }
  FFN_FN friend Vec max(Vec a, Vec b) { return Vec(max_lanes(a.reg, b.reg)); }

  FFN_FN friend Vec abs(Vec a) { return Vec((Register)((Bits)a.reg & ~sign_bits())); }
  FFN_FN friend Vec copysign(Vec magnitude, Vec sign) {
    return Vec((Register)(((Bits)magnitude.reg & ~sign_bits()) | ((Bits)sign.reg & sign_bits())));
  }
  FFN_FN friend Vec sqrt(Vec a) {  // lane by lane: only a router's scores use it
    for (int i = 0; i < kLanes; ++i) a.reg[i] = sizeof(T) == 4 ? __builtin_sqrtf(a.reg[i]) : __builtin_sqrt(a.reg[i]);
    return a;
  }
  FFN_FN friend Vec round_even(Vec a) { return Vec(round_even_lanes(a.reg)); }

  // a · 2^k for |a| < 2 and integral k, |k| <= 200 (float) or 1200 (double); a result below the normal range is rounded
  // once. `scale_down` is cheaper, and for k <= 60 only.
  FFN_FN friend Vec scale_by_power_of_two(Vec a, Vec k) { return Vec(scale_lanes(a.reg, k.reg)); }
  FFN_FN friend Vec scale_down(Vec a, Vec k) { return Vec(scale_down_lanes(a.reg, k.reg)); }

  // Lanes that hold the bits of two bfloat16 each: the first of them, the second.
  FFN_FN friend Vec first_bfloat16(Vec pairs) { return Vec((Register)((Bits)pairs.reg << 16)); }
  FFN_FN friend Vec second_bfloat16(Vec pairs) { return Vec((Register)(((Bits)pairs.reg >> 16) << 16)); }

  // Sum in one fixed order: upper half onto lower half, until one lane is left.
  FFN_FN friend T reduce_add(Vec a) { return reduce_add_lanes(a.reg); }

 private:
  using Bits = RegisterOf<IntOf<T>>;
  FFN_FN static Bits sign_bits() { return (Bits)broadcast_lanes(T(-0.0)); }
};

// `S` is the storage dtype; the value in the register is exact. With n, 0 <= n <= kLanes, lanes >= n are zero and their
// memory is not touched.
template <class V, class S>
FFN_FN V load(const S* p) {
  static_assert(__is_same(typename Codec<S>::Compute, typename V::Scalar));
  return V(load_lanes(p));
}
template <class V, class S>
FFN_FN V load(const S* p, int n) {
  static_assert(__is_same(typename Codec<S>::Compute, typename V::Scalar));
  return V(load_lanes(p, n));
}

// Rounds to nearest even as Codec<S>::encode; with n, only n values are written.
template <class S, class V>
FFN_FN void store(S* p, V v) {
  static_assert(__is_same(typename Codec<S>::Compute, typename V::Scalar));
  store_lanes(p, v.reg);
}
template <class S, class V>
FFN_FN void store(S* p, V v, int n) {
  static_assert(__is_same(typename Codec<S>::Compute, typename V::Scalar));
  store_lanes(p, v.reg, n);
}

// Past the caches: a line that is stored whole is not read from memory first. p is a multiple of what is stored, and
// `end_nontemporal` comes before other threads read.
template <class S, class V>
FFN_FN void store_nontemporal(S* p, V v) {
  static_assert(__is_same(typename Codec<S>::Compute, typename V::Scalar));
  store_nontemporal_lanes(p, v.reg);
}

// Two vectors, one behind the other.
template <class S, class V>
FFN_FN void store_two(S* p, V first, V second) {
  store(p, first);
  store(p + V::kLanes, second);
}

// rows[i] lane j <-> rows[j] lane i.
template <class V>
FFN_FN void transpose(V (&rows)[V::kLanes]) {
  typename V::Register regs[V::kLanes];
  for (int i = 0; i < V::kLanes; ++i) regs[i] = rows[i].reg;
  transpose_lanes(regs);
  for (int i = 0; i < V::kLanes; ++i) rows[i].reg = regs[i];
}

FFN_FN void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
FFN_FN void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }
FFN_FN void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
