// Textual, per instruction set: an activation and its derivatives over whole vectors of float32 or float64 scratch. No
// storage dtype and no tail here: callers load and store, lanes that stand for nothing are computed and not stored.

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
  const GateForm& form;

  FFN_FN V beta() const { return V(static_cast<T>(form.beta)); }
  template <bool kLimited>
  FFN_FN GateLimit<V> limit() const {
    return {kLimited, V(static_cast<T>(form.bound())), V(static_cast<T>(form.up_shift))};
  }
};

// out[0] = act(gate) * up.
template <class V, class Act, bool kLimited>
void act_forward(const ActVectors<V>& a) {
  const V beta = a.beta();
  const auto limit = a.template limit<kLimited>();
  for (int64_t i = 0; i < a.count * a.stride; i += a.stride) {
    const V value = Act::fwd(limit.gate(load<V>(a.gate + i)), beta);
    store(a.out[0] + i, a.up ? value * limit.up(load<V>(a.up + i)) : value);
  }
}

// out[0] = d act'(gate) up, out[1] = d act(gate), out[2] = act(gate) up where asked for.
template <class V, class Act, bool kLimited>
void act_backward(const ActVectors<V>& a) {
  const V beta = a.beta();
  const auto limit = a.template limit<kLimited>();
  for (int64_t i = 0; i < a.count * a.stride; i += a.stride) {
    const V gate = load<V>(a.gate + i), d = load<V>(a.d + i);
    const auto act = Act::grad(limit.gate(gate), beta);
    const V d_gate = d * act.slope;
    const V raw_up = a.up ? load<V>(a.up + i) : V(1);
    const V up = limit.up(raw_up);
    store(a.out[0] + i, limit.gate_grad(gate, a.up ? d_gate * up : d_gate));
    if (a.up) store(a.out[1] + i, limit.up_grad(raw_up, d * act.value));
    if (a.out[2]) store(a.out[2] + i, a.up ? act.value * up : act.value);
  }
}

// Of <dd_gate, d_gate> + <dd_up, d_up> as act_backward gives them: the derivatives by d, gate and up.
template <class V, class Act, bool kLimited>
void act_double_backward(const ActVectors<V>& a) {
  const V beta = a.beta();
  const auto limit = a.template limit<kLimited>();
  for (int64_t i = 0; i < a.count * a.stride; i += a.stride) {
    const V gate = load<V>(a.gate + i), d = load<V>(a.d + i);
    const V raw_up = a.up ? load<V>(a.up + i) : V(1);
    const auto act = Act::grad2(limit.gate(gate), beta);
    const V dd_gate = limit.gate_grad(gate, a.dd_gate ? load<V>(a.dd_gate + i) : V::zero());
    const V dd_up = limit.up_grad(raw_up, a.dd_up ? load<V>(a.dd_up + i) : V::zero());
    const V scaled = a.up ? dd_gate * limit.up(raw_up) : dd_gate;
    store(a.out[0] + i, fma(scaled, act.slope, dd_up * act.value));
    store(a.out[1] + i, limit.gate_grad(gate, d * fma(scaled, act.curvature, dd_up * act.slope)));
    if (a.up) store(a.out[2] + i, limit.up_grad(raw_up, dd_gate * d * act.slope));
  }
}

template <class V>
struct ActKernels {
  void (*forward)(const ActVectors<V>&);
  void (*backward)(const ActVectors<V>&);
  void (*double_backward)(const ActVectors<V>&);
};

template <class V, bool kLimited, class... As>
FFN_FN const ActKernels<V>& act_kernels_of(TypeList<As...>, int index) {
  static constexpr ActKernels<V> kernels[] = {
      {act_forward<V, As, kLimited>, act_backward<V, As, kLimited>, act_double_backward<V, As, kLimited>}...};
  return kernels[index];
}

template <class V>
FFN_FN const ActKernels<V>& act_kernels(const GateForm& form) {
  return form.limited() ? act_kernels_of<V, true>(Activations{}, form.activation)
                        : act_kernels_of<V, false>(Activations{}, form.activation);
}
