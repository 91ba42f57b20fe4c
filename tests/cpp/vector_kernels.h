// SPDX-License-Identifier: BSD-3-Clause
// Fills a VectorTable: the kernels that csrc/cpu/isa/*.cpp are compiled with for vector_test, after vector_table.h.

template <class T, class F>
void for_vectors(const T* x, T* out, int64_t count, F f) {
  for (int64_t i = 0; i < count; i += Vec<T>::kLanes) store(out + i, f(load<Vec<T>>(x + i)));
}

template <class T>
void run_activation(int index, const T* own, const T* z, T* const (&out)[6], int64_t count) {
  using V = Vec<T>;
  const V p[kMostOwnParams] = {V(own[0]), V(own[1]), V(own[2]), V(own[3])};
  dispatch_activation(index, [&](auto tag) {
    using Activation = typename decltype(tag)::Type;
    for (int64_t i = 0; i < count; i += V::kLanes) {
      const V v = load<V>(z + i);
      store(out[0] + i, Activation::fwd(v, p));
      const Grad<V> g = Activation::grad(v, p);
      store(out[1] + i, g.value);
      store(out[2] + i, g.slope);
      const Grad2<V> g2 = Activation::grad2(v, p);
      store(out[3] + i, g2.value);
      store(out[4] + i, g2.slope);
      store(out[5] + i, g2.curvature);
    }
  });
}

template <class T>
void run_transpose(T* square) {
  constexpr int n = Vec<T>::kLanes;
  Vec<T> rows[n];
  for (int i = 0; i < n; ++i) rows[i] = load<Vec<T>>(square + i * n);
  transpose(rows);
  for (int i = 0; i < n; ++i) store(square + i * n, rows[i]);
}

template <class T>
void run_basics(const T* pa, const T* pb, const T* pc, T* out) {
  using V = Vec<T>;
  const V a = load<V>(pa), b = load<V>(pb), c = load<V>(pc), yes(1), no(0);
  V sum = a, difference = a, product = a;
  sum += b;
  difference -= b;
  product *= b;
  const V results[] = {sum,
                       difference,
                       product,
                       a / b,
                       -a,
                       fma(a, b, c),
                       abs(a),
                       min(a, b),
                       max(a, b),
                       round_even(a),
                       copysign(a, b),
                       scale_by_power_of_two(a, round_even(c)),
                       select(a < b, yes, no),
                       select(a <= b, yes, no),
                       select(a > b, yes, no),
                       select(a >= b, yes, no),
                       select(a == b, yes, no),
                       select(a != b, yes, no),
                       select((a < b) & (b < c), yes, no),
                       select((a < b) | (b < c), yes, no),
                       select(!(a < b), yes, no)};
  for (const V& r : results) {
    store(out, r);
    out += V::kLanes;
  }
}

template <class T>
constexpr Arithmetic<T> arithmetic() {
  using V = Vec<T>;
  return {V::kLanes,
          {[](const T* x, T* out, int64_t n) { for_vectors(x, out, n, [](V v) { return exp(v); }); },
           [](const T* x, T* out, int64_t n) { for_vectors(x, out, n, [](V v) { return tanh(v); }); },
           [](const T* x, T* out, int64_t n) { for_vectors(x, out, n, [](V v) { return erf(v); }); },
           [](const T* x, T* out, int64_t n) { for_vectors(x, out, n, [](V v) { return sigmoid(v); }); },
           [](const T* x, T* out, int64_t n) { for_vectors(x, out, n, [](V v) { return normal_point(v).cdf; }); }},
          run_activation<T>,
          run_transpose<T>,
          [](const T* x) { return reduce_add(load<V>(x)); },
          run_basics<T>};
}

template <class S>
constexpr Storage<S> storage() {
  using T = typename Codec<S>::Compute;
  using V = Vec<T>;
  return {[](const S* p, int n, T* lanes) { store(lanes, n < 0 ? load<V>(p) : load<V>(p, n)); },
          [](const T* lanes, S* p, int n) { n < 0 ? store(p, load<V>(lanes)) : store(p, load<V>(lanes), n); }};
}

extern const VectorTable kVectorTable;
const VectorTable kVectorTable = {Isa::FFN_OPS_ISA,  kHasFma,          arithmetic<float>(), arithmetic<double>(),
                                  storage<double>(), storage<float>(), storage<Half>(),     storage<BFloat16>()};
