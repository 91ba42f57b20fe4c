// SPDX-License-Identifier: BSD-3-Clause
// Textual, like activations.h and after it: a gate at one point, with its first and second derivatives, once for every
// device. With f the gate's side and h the side of up, y = f(gate) * h(up); without a gate y = f(gate).

// f and h where the gate has a limit or a shift (`on`): gate = min(g, limit), up = clamp(u, -limit, limit) + shift.
// Gradients pass where g and u lie within, the bounds excluded, as torch.clamp's do from 2.15 on, and are 0 elsewhere
// and for NaN, whatever they are: the caller has multiplied everything. No limit is NaN: all lies within, and min and
// max give their second argument.
template <class V>
struct GateLimit {
  bool on;
  V limit, shift;

  FFN_FN V gate(V g) const { return on ? min(limit, g) : g; }
  FFN_FN V up(V u) const { return on ? max(-limit, min(limit, u)) + shift : u; }
  FFN_FN V gate_grad(V g, V d) const { return on ? select(g < limit, d, outside(d)) : d; }
  FFN_FN V up_grad(V u, V d) const { return on ? select(abs(u) < limit, d, outside(d)) : d; }
  FFN_FN V outside(V d) const { return select(limit <= limit, V(0), d); }
};

// The numbers of a gate in registers.
template <class V>
struct GateNumbers {
  using T = typename V::Scalar;
  GateLimit<V> limit;
  V own[kMostOwnParams];

  FFN_FN GateNumbers(const Gate& g, bool limited)
      : limit{limited, V(static_cast<T>(g.bound())), V(static_cast<T>(g.up_shift))},
        own{V(static_cast<T>(g.own[0])), V(static_cast<T>(g.own[1])), V(static_cast<T>(g.own[2])),
            V(static_cast<T>(g.own[3]))} {
    static_assert(kMostOwnParams == 4);
  }
};

// The factors of the learned parameters in the value, or in the slope: both are linear in them.
template <class Act, class V>
FFN_FN void own_factors(const GateNumbers<V>& n, V z, bool of_slope, V (&out)[kMostOwnParams]) {
  V p[kMostOwnParams];
  for (int k = 0; k < kMostOwnParams; ++k) p[k] = k < Act::learned ? V(0) : n.own[k];
  const auto at = [&] { return of_slope ? Act::grad(z, p).slope : Act::fwd(z, p); };
  const V rest = at();
  for (int k = 0; k < Act::learned; ++k) {
    p[k] = V(1);
    out[k] = at() - rest;
    p[k] = V(0);
  }
}

// h(up).
template <class Act, class V>
FFN_FN V gate_up(const GateNumbers<V>& n, V up) {
  if constexpr (Act::has_up) return Act::up(up, n.own);
  else return n.limit.up(up);
}

template <class Act, class V>
FFN_FN V gate_value(const GateNumbers<V>& n, V gate, V up, bool gated) {
  const V value = Act::fwd(n.limit.gate(gate), n.own);
  return gated ? value * gate_up<Act>(n, up) : value;
}

// d_gate = d f' h, d_up = d f h', and y itself.
template <class V>
struct GateGrad {
  V d_gate, d_up, y;
};

template <class Act, class V>
FFN_FN GateGrad<V> gate_grad(const GateNumbers<V>& n, V gate, V up, V d, bool gated) {
  const auto act = Act::grad(n.limit.gate(gate), n.own);
  const V d_gate = d * act.slope;
  if (!gated) return {n.limit.gate_grad(gate, d_gate), V(0), act.value};
  if constexpr (Act::has_up) {
    const auto h = Act::up_grad(up, n.own);
    return {d_gate * h.value, d * act.value * h.slope, act.value * h.value};
  } else {
    const V h = n.limit.up(up);
    return {n.limit.gate_grad(gate, d_gate * h), n.limit.up_grad(up, d * act.value), act.value * h};
  }
}

// Of dd_gate * d_gate + dd_up * d_up as gate_grad gives them: the derivatives by d, gate and up. Without a gate up is 1
// and dd_up is 0.
template <class V>
struct GateGrad2 {
  V by_d, by_gate, by_up;
};

template <class Act, class V>
FFN_FN GateGrad2<V> gate_grad2(const GateNumbers<V>& n, V gate, V up, V d, V dd_gate, V dd_up, bool gated) {
  const auto act = Act::grad2(n.limit.gate(gate), n.own);
  if constexpr (Act::has_up) {
    Grad2<V> h{V(1), V(0), V(0)};
    if (gated) h = Act::up_grad2(up, n.own);
    const V scaled = dd_gate * h.value, shifted = dd_up * h.slope;
    return {fma(scaled, act.slope, shifted * act.value), d * fma(scaled, act.curvature, shifted * act.slope),
            d * fma(dd_gate * act.slope, h.slope, dd_up * act.value * h.curvature)};
  } else {
    const V passed_gate = n.limit.gate_grad(gate, dd_gate), passed_up = n.limit.up_grad(up, dd_up);
    const V scaled = gated ? passed_gate * n.limit.up(up) : passed_gate;
    return {fma(scaled, act.slope, passed_up * act.value),
            n.limit.gate_grad(gate, d * fma(scaled, act.curvature, passed_up * act.slope)),
            n.limit.up_grad(up, passed_gate * d * act.slope)};
  }
}
