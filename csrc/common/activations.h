// The activations: one stateless struct each, and THE list that kernels, names, tests and error messages read.
// Included once per instruction set inside its namespace, after math.h (and by activation_names.h without vector code,
// for the list alone). V is a vector, or a scalar in CUDA: only unqualified calls. No include guard, no #include, no
// std.

template <class V>
struct Grad {
  V value, slope;
};
template <class V>
struct Grad2 {
  V value, slope, curvature;
};

// max(z, 0); the slope at 0 is 0. NaN is neither below nor equal to 0: it passes, with slope 1, as in torch.
struct Relu {
  static constexpr const char* name = "relu";
  static constexpr bool uses_beta = false;

  template <class V>
  static FFN_FN V fwd(V z, V) {
    return select(z < V(0), V(0), z);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, V beta) {
    return {fwd(z, beta), select(z <= V(0), V(0), V(1))};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, V beta) {
    const auto [value, slope] = grad(z, beta);
    return {value, slope, V(0)};
  }
};

// r², with r = relu(z); r² ' = 2r, r² '' = 2 for z > 0.
struct ReluSquared {
  static constexpr const char* name = "relu_squared";
  static constexpr bool uses_beta = false;

  template <class V>
  static FFN_FN V fwd(V z, V beta) {
    return grad(z, beta).value;
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, V) {
    const V r = select(z < V(0), V(0), z);
    return {r * r, r + r};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, V beta) {
    const auto [value, slope] = grad(z, beta);
    return {value, slope, select(z <= V(0), V(0), V(2))};
  }
};

// s = sigmoid(z), c = 1 − s; s' = s·c, s'' = s·c·(c − s).
struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  static constexpr bool uses_beta = false;

  template <class V>
  static FFN_FN V fwd(V z, V) {
    return sigmoid(z);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, V) {
    const auto [s, c] = sigmoid_pair(z);
    return {s, s * c};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, V) {
    const auto [s, c] = sigmoid_pair(z);
    return {s, s * c, s * c * (c - s)};
  }
};

// t = tanh(z); t' = 1 − t², t'' = −2t·t'.
struct Tanh {
  static constexpr const char* name = "tanh";
  static constexpr bool uses_beta = false;

  template <class V>
  static FFN_FN V fwd(V z, V) {
    return tanh(z);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, V) {
    const V t = tanh(z);
    return {t, fma(-t, t, V(1))};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, V beta) {
    const auto [t, slope] = grad(z, beta);
    return {t, slope, V(-2) * t * slope};
  }
};

// z·Φ(z), the erf form; with φ = Φ': (zΦ)' = Φ + zφ, (zΦ)'' = (2 − z²)·φ. From |z| = 40 on φ is 0, and z² is held there
// lest it overflow to inf · 0.
struct Gelu {
  static constexpr const char* name = "gelu";
  static constexpr bool uses_beta = false;

  template <class V>
  static FFN_FN V fwd(V z, V) {
    return z * normal_point(z).cdf;
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, V) {
    const auto [cdf, density] = normal_point(z);
    return {z * cdf, fma(z, density, cdf)};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, V) {
    const auto [cdf, density] = normal_point(z);
    const V held = min(V(40), abs(z));
    return {z * cdf, fma(z, density, cdf), fma(-held, held, V(2)) * density};
  }
};

// 0.5·z·(1 + tanh(u)) = z·s with s = sigmoid(w), w = 2u = 2·√(2/π)·(z + 0.044715·z³), c = 1 − s:
// (zs)' = s + z·w'·s·c, (zs)'' = s·c·(2w' + z·w'' + z·w'²·(c − s)).
// From |z| = 30 on s is 0 or 1, and z is held there within w lest z³ overflow to inf · 0.
struct GeluTanh {
  static constexpr const char* name = "gelu_tanh";
  static constexpr bool uses_beta = false;

  template <class V>
  static FFN_FN V fwd(V z, V) {
    return z * sigmoid(argument(hold(z)).value);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, V) {
    const V held = hold(z);
    const auto [w, dw, ddw] = argument(held);
    const auto [s, c] = sigmoid_pair(w);
    return {z * s, fma(held * dw, s * c, s)};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, V) {
    const V held = hold(z);
    const auto [w, dw, ddw] = argument(held);
    const auto [s, c] = sigmoid_pair(w);
    const V bend = fma(held, fma(dw * dw, c - s, ddw), dw + dw);
    return {z * s, fma(held * dw, s * c, s), s * c * bend};
  }

 private:
  template <class V>
  static FFN_FN V hold(V z) {
    return max(V(-30), min(V(30), z));
  }
  template <class V>
  static FFN_FN Grad2<V> argument(V z) {
    constexpr double scale = 1.5957691216057308, cubic = scale * 0.044715;
    const V square = z * z;
    return {z * fma(V(cubic), square, V(scale)), fma(V(3 * cubic), square, V(scale)), V(6 * cubic) * z};
  }
};

// z·s with s = sigmoid(βz), c = 1 − s, u = βz: (zs)' = s·(1 + u·c), (zs)'' = β·s·c·(2 + u·(c − s)).
struct Swish {
  static constexpr const char* name = "swish";
  static constexpr bool uses_beta = true;

  template <class V>
  static FFN_FN V fwd(V z, V beta) {
    return z * sigmoid(beta * z);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, V beta) {
    const V u = beta * z;
    const auto [s, c] = sigmoid_pair(u);
    return {z * s, fma(s * c, u, s)};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, V beta) {
    const V u = beta * z;
    const auto [s, c] = sigmoid_pair(u);
    return {z * s, fma(s * c, u, s), beta * (s * c) * fma(u, c - s, V(2))};
  }
};

// Swish with β = 1.
struct Silu {
  static constexpr const char* name = "silu";
  static constexpr bool uses_beta = false;

  template <class V>
  static FFN_FN V fwd(V z, V) {
    return Swish::fwd(z, V(1));
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, V) {
    return Swish::grad(z, V(1));
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, V) {
    return Swish::grad2(z, V(1));
  }
};

struct Identity {
  static constexpr const char* name = "identity";
  static constexpr bool uses_beta = false;

  template <class V>
  static FFN_FN V fwd(V z, V) {
    return z;
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, V) {
    return {z, V(1)};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, V) {
    return {z, V(1), V(0)};
  }
};

// The limits of a gate, see gate_form.h, where they are `on`: gate = min(g, limit), up = clamp(u, -limit, limit) +
// shift. Gradients pass where g and u lie within, the bounds excluded, as torch.clamp's do from 2.15 on, and are 0
// elsewhere and for NaN, whatever they are: the caller has multiplied everything. No limit is NaN: all lies within, and
// min and max give their second argument.
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

using Activations = TypeList<Relu, ReluSquared, Sigmoid, Tanh, Gelu, GeluTanh, Silu, Swish, Identity>;

// Calls `f(Tag<Activation>{})` for the activation at `index` of the list; false if there is none.
template <class F>
FFN_FN constexpr bool dispatch_activation(int index, F&& f) {
  return visit_type(Activations{}, index, f);
}
