// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: a gate and its derivatives over whole vectors of float32 or float64 scratch. No storage
// dtype and no tail here: callers load and store, lanes that stand for nothing are computed and not stored.

#include "../../common/gate_math.h"

// Vector i stands at i * stride of each pointer. up null: plain. Outputs may be the inputs.
template <class V>
struct ActVectors {
  using T = typename V::Scalar;
  int64_t count, stride;
  const T* gate;
  const T* up = nullptr;
  const T* d = nullptr;
  const T* dd_gate = nullptr;  // null: zero
  const T* dd_up = nullptr;
  T* out[3] = {};
  const Gate& form;

  FFN_FN V up_at(int64_t i) const { return up ? load<V>(up + i) : V(1); }
};

// out[0] = y.
template <class V, class Act, bool kLimited>
void act_forward(const ActVectors<V>& a) {
  const GateNumbers<V> n(a.form, kLimited);
  for (int64_t i = 0; i < a.count * a.stride; i += a.stride)
    store(a.out[0] + i, gate_value<Act>(n, load<V>(a.gate + i), a.up_at(i), a.up != nullptr));
}

// out[0] = d_gate, out[1] = d_up, out[2] = y where asked for.
template <class V, class Act, bool kLimited>
void act_backward(const ActVectors<V>& a) {
  const GateNumbers<V> n(a.form, kLimited);
  for (int64_t i = 0; i < a.count * a.stride; i += a.stride) {
    const auto g = gate_grad<Act>(n, load<V>(a.gate + i), a.up_at(i), load<V>(a.d + i), a.up != nullptr);
    store(a.out[0] + i, g.d_gate);
    if (a.up) store(a.out[1] + i, g.d_up);
    if (a.out[2]) store(a.out[2] + i, g.y);
  }
}

// The derivatives by d, gate and up.
template <class V, class Act, bool kLimited>
void act_double_backward(const ActVectors<V>& a) {
  const GateNumbers<V> n(a.form, kLimited);
  for (int64_t i = 0; i < a.count * a.stride; i += a.stride) {
    const V dd_gate = a.dd_gate ? load<V>(a.dd_gate + i) : V::zero(),
            dd_up = a.dd_up ? load<V>(a.dd_up + i) : V::zero();
    const auto g =
        gate_grad2<Act>(n, load<V>(a.gate + i), a.up_at(i), load<V>(a.d + i), dd_gate, dd_up, a.up != nullptr);
    store(a.out[0] + i, g.by_d);
    store(a.out[1] + i, g.by_gate);
    if (a.up) store(a.out[2] + i, g.by_up);
  }
}

// out[0][k] = the sum of d (times dd_gate, where given) times the k-th factor. Lanes that stand for nothing have d = 0.
template <class V, class Act>
void act_own_sums(const ActVectors<V>& a) {
  const GateNumbers<V> n(a.form, false);
  V sums[kMostOwnParams], factors[kMostOwnParams];
  for (int k = 0; k < kMostOwnParams; ++k) sums[k] = V::zero();
  for (int64_t i = 0; i < a.count * a.stride; i += a.stride) {
    const V z = load<V>(a.gate + i), d = load<V>(a.d + i);
    own_factors<Act>(n, z, a.dd_gate != nullptr, factors);
    const V weight = a.dd_gate ? d * load<V>(a.dd_gate + i) : d;
    for (int k = 0; k < Act::learned; ++k) sums[k] = fma(weight, factors[k], sums[k]);
  }
  for (int k = 0; k < Act::learned; ++k) a.out[0][k] = reduce_add(sums[k]);
}

template <class V>
struct ActKernels {
  void (*forward)(const ActVectors<V>&);
  void (*backward)(const ActVectors<V>&);
  void (*double_backward)(const ActVectors<V>&);
  void (*own_sums)(const ActVectors<V>&);
};

// Gates with a side of up of their own have no limit.
template <class V, bool kLimited, class... As>
FFN_FN const ActKernels<V>& act_kernels_of(TypeList<As...>, int index) {
  static constexpr ActKernels<V> kernels[] = {{act_forward < V, As, kLimited && !As::has_up >, act_backward < V, As,
                                               kLimited && !As::has_up >, act_double_backward < V, As,
                                               kLimited && !As::has_up >, act_own_sums<V, As>}...};
  return kernels[index];
}

template <class V>
FFN_FN const ActKernels<V>& act_kernels(const Gate& form) {
  return form.limited() ? act_kernels_of<V, true>(Activations{}, form.activation)
                        : act_kernels_of<V, false>(Activations{}, form.activation);
}
