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
  T beta;
};

// out[0] = act(gate) * up.
template <class V, class Act>
void act_forward(const ActVectors<V>& a) {
  for (int64_t i = 0; i < a.count * a.stride; i += a.stride) {
    const V value = Act::fwd(load<V>(a.gate + i), V(a.beta));
    store(a.out[0] + i, a.up ? value * load<V>(a.up + i) : value);
  }
}

// out[0] = d act'(gate) up, out[1] = d act(gate), out[2] = act(gate) up where asked for.
template <class V, class Act>
void act_backward(const ActVectors<V>& a) {
  for (int64_t i = 0; i < a.count * a.stride; i += a.stride) {
    const auto act = Act::grad(load<V>(a.gate + i), V(a.beta));
    const V d = load<V>(a.d + i);
    const V d_gate = d * act.slope;
    const V up = a.up ? load<V>(a.up + i) : V(1);
    store(a.out[0] + i, a.up ? d_gate * up : d_gate);
    if (a.up) store(a.out[1] + i, d * act.value);
    if (a.out[2]) store(a.out[2] + i, a.up ? act.value * up : act.value);
  }
}

// Of <dd_gate, d_gate> + <dd_up, d_up> as act_backward gives them: the derivatives by d, gate and up.
template <class V, class Act>
void act_double_backward(const ActVectors<V>& a) {
  for (int64_t i = 0; i < a.count * a.stride; i += a.stride) {
    const auto act = Act::grad2(load<V>(a.gate + i), V(a.beta));
    const V d = load<V>(a.d + i);
    const V dd_gate = a.dd_gate ? load<V>(a.dd_gate + i) : V::zero();
    const V dd_up = a.dd_up ? load<V>(a.dd_up + i) : V::zero();
    const V scaled = a.up ? dd_gate * load<V>(a.up + i) : dd_gate;
    store(a.out[0] + i, fma(scaled, act.slope, dd_up * act.value));
    store(a.out[1] + i, d * fma(scaled, act.curvature, dd_up * act.slope));
    if (a.up) store(a.out[2] + i, dd_gate * d * act.slope);
  }
}

template <class V>
struct ActKernels {
  void (*forward)(const ActVectors<V>&);
  void (*backward)(const ActVectors<V>&);
  void (*double_backward)(const ActVectors<V>&);
};

template <class V, class... As>
FFN_FN const ActKernels<V>& act_kernels_of(TypeList<As...>, int index) {
  static constexpr ActKernels<V> kernels[] = {{act_forward<V, As>, act_backward<V, As>, act_double_backward<V, As>}...};
  return kernels[index];
}

template <class V>
FFN_FN const ActKernels<V>& act_kernels(int activation) {
  return act_kernels_of<V>(Activations{}, activation);
}
