// SPDX-License-Identifier: BSD-3-Clause
// The activations: one stateless struct each, and THE list that kernels, names, tests, error messages and Python read.
// Included once per instruction set inside its namespace, after math.h (and by names.h without vector code, for the
// list alone). V is a vector, or a scalar in CUDA: only unqualified calls. No include guard, no #include, no std.
//
// A struct has the value, slope and curvature of the gate's side. `own` declares parameters with their defaults, which
// the functions read in that order. With has_up the struct has the side of up as well (up, up_grad, up_grad2), and its
// gates take no limit and no shift. The first `learned` of its own parameters may be tensors with gradients: value and
// slope are linear in them, plus what they are where all of these are 0.

template <class V>
struct Grad {
  V value, slope;
};
template <class V>
struct Grad2 {
  V value, slope, curvature;
};

struct Activation {
  static constexpr OwnParams own = {};
  static constexpr bool has_up = false;
  static constexpr int learned = 0;
};

// max(z, 0); the slope at 0 is 0. NaN is neither below nor equal to 0: it passes, with slope 1, as in torch.
struct Relu : Activation {
  static constexpr const char* name = "relu";

  template <class V>
  static FFN_FN V fwd(V z, const V*) {
    return select(z < V(0), V(0), z);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V* p) {
    return {fwd(z, p), select(z <= V(0), V(0), V(1))};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V* p) {
    const auto [value, slope] = grad(z, p);
    return {value, slope, V(0)};
  }
};

// r², with r = relu(z); r² ' = 2r, r² '' = 2 for z > 0.
struct ReluSquared : Activation {
  static constexpr const char* name = "relu_squared";

  template <class V>
  static FFN_FN V fwd(V z, const V* p) {
    return grad(z, p).value;
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V*) {
    const V r = select(z < V(0), V(0), z);
    return {r * r, r + r};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V* p) {
    const auto [value, slope] = grad(z, p);
    return {value, slope, select(z <= V(0), V(0), V(2))};
  }
};

// a·r² + b, with r = relu(z).
struct StarRelu : Activation {
  static constexpr const char* name = "star_relu";
  static constexpr OwnParams own = {{{"scale", 0.8944}, {"bias", -0.4472}}};
  static constexpr int learned = 2;

  template <class V>
  static FFN_FN V fwd(V z, const V* p) {
    return fma(p[0], ReluSquared::fwd(z, p), p[1]);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V* p) {
    return {fwd(z, p), p[0] * ReluSquared::grad(z, p).slope};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V* p) {
    const auto [value, slope] = grad(z, p);
    return {value, slope, p[0] * ReluSquared::grad2(z, p).curvature};
  }
};

// z above 0, else a·z; the slope at 0 is a, as in torch, that of NaN is 1.
struct LeakyRelu : Activation {
  static constexpr const char* name = "leaky_relu";
  static constexpr OwnParams own = {{{"slope", 0.01}}};
  static constexpr int learned = 1;

  template <class V>
  static FFN_FN V fwd(V z, const V* p) {
    return select(z <= V(0), p[0] * z, z);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V* p) {
    return {fwd(z, p), select(z <= V(0), p[0], V(1))};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V* p) {
    const auto [value, slope] = grad(z, p);
    return {value, slope, V(0)};
  }
};

// s = sigmoid(z), c = 1 − s; s' = s·c, s'' = s·c·(c − s).
struct Sigmoid : Activation {
  static constexpr const char* name = "sigmoid";

  template <class V>
  static FFN_FN V fwd(V z, const V*) {
    return sigmoid(z);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V*) {
    const auto [s, c] = sigmoid_pair(z);
    return {s, s * c};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V*) {
    const auto [s, c] = sigmoid_pair(z);
    return {s, s * c, s * c * (c - s)};
  }
};

// t = tanh(z); t' = 1 − t², t'' = −2t·t'.
struct Tanh : Activation {
  static constexpr const char* name = "tanh";

  template <class V>
  static FFN_FN V fwd(V z, const V*) {
    return tanh(z);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V*) {
    const V t = tanh(z);
    return {t, fma(-t, t, V(1))};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V* p) {
    const auto [t, slope] = grad(z, p);
    return {t, slope, V(-2) * t * slope};
  }
};

// z·Φ(z), the erf form; with φ = Φ': (zΦ)' = Φ + zφ, (zΦ)'' = (2 − z²)·φ. From |z| = 40 on φ is 0, and z² is held there
// lest it overflow to inf · 0.
struct Gelu : Activation {
  static constexpr const char* name = "gelu";

  template <class V>
  static FFN_FN V fwd(V z, const V*) {
    return z * normal_point(z).cdf;
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V*) {
    const auto [cdf, density] = normal_point(z);
    return {z * cdf, fma(z, density, cdf)};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V*) {
    const auto [cdf, density] = normal_point(z);
    const V held = min(V(40), abs(z));
    return {z * cdf, fma(z, density, cdf), fma(-held, held, V(2)) * density};
  }
};

// 0.5·z·(1 + tanh(u)) = z·s with s = sigmoid(w), w = 2u = 2·√(2/π)·(z + 0.044715·z³), c = 1 − s:
// (zs)' = s + z·w'·s·c, (zs)'' = s·c·(2w' + z·w'' + z·w'²·(c − s)).
// From |z| = 30 on s is 0 or 1, and z is held there within w lest z³ overflow to inf · 0.
struct GeluTanh : Activation {
  static constexpr const char* name = "gelu_tanh";

  template <class V>
  static FFN_FN V fwd(V z, const V*) {
    return z * sigmoid(argument(hold(z)).value);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V*) {
    const V held = hold(z);
    const auto [w, dw, ddw] = argument(held);
    const auto [s, c] = sigmoid_pair(w);
    return {z * s, fma(held * dw, s * c, s)};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V*) {
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
struct Swish : Activation {
  static constexpr const char* name = "swish";
  static constexpr OwnParams own = {{{"beta", 1.0}}};

  template <class V>
  static FFN_FN V fwd(V z, const V* p) {
    return z * sigmoid(p[0] * z);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V* p) {
    const V u = p[0] * z;
    const auto [s, c] = sigmoid_pair(u);
    return {z * s, fma(s * c, u, s)};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V* p) {
    const V u = p[0] * z;
    const auto [s, c] = sigmoid_pair(u);
    return {z * s, fma(s * c, u, s), p[0] * (s * c) * fma(u, c - s, V(2))};
  }
};

// Swish with β = 1.
struct Silu : Activation {
  static constexpr const char* name = "silu";

  template <class V>
  static FFN_FN V fwd(V z, const V*) {
    const V beta(1);
    return Swish::fwd(z, &beta);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V*) {
    const V beta(1);
    return Swish::grad(z, &beta);
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V*) {
    const V beta(1);
    return Swish::grad2(z, &beta);
  }
};

// q², with q = silu(z); (q²)' = 2qq', (q²)'' = 2(q'² + qq'').
struct SiluSquared : Activation {
  static constexpr const char* name = "silu_squared";

  template <class V>
  static FFN_FN V fwd(V z, const V* p) {
    const V q = Silu::fwd(z, p);
    return q * q;
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V* p) {
    const auto [q, dq] = Silu::grad(z, p);
    return {q * q, (q + q) * dq};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V* p) {
    const auto [q, dq, ddq] = Silu::grad2(z, p);
    return {q * q, (q + q) * dq, V(2) * fma(dq, dq, q * ddq)};
  }
};

// Above 0 αp·z² + βz, else αn·(exp(m) − 1 − z) + βz with m = min(z, ε) and ε just below 0. At 0 the slope is that of
// the second branch; m is constant from ε on.
struct Xielu : Activation {
  static constexpr const char* name = "xielu";
  static constexpr OwnParams own = {{{"alpha_p", 0.8}, {"alpha_n", 0.8}, {"beta", 0.5}, {"eps", -1e-6}}};
  static constexpr int learned = 3;

  template <class V>
  static FFN_FN V fwd(V z, const V* p) {
    return value(z, p, below(z, p[3]));
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V* p) {
    const Below<V> b = below(z, p[3]);
    return {value(z, p, b), slope(z, p, b)};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V* p) {
    const Below<V> b = below(z, p[3]);
    const V bend = p[1] * (b.minus_one + V(1));
    return {value(z, p, b), slope(z, p, b), select(V(0) < z, p[0] + p[0], select(p[3] <= z, V(0), bend))};
  }

 private:
  // exp(m) − 1 and exp(m) − 1 − z.
  template <class V>
  struct Below {
    V minus_one, minus_z;
  };
  template <class V>
  static FFN_FN Below<V> below(V z, V eps) {
    const V m = min(eps, z);
    const auto [minus_one, minus_m] = expm1_pair(m);
    return {minus_one, minus_m + (m - z)};
  }
  template <class V>
  static FFN_FN V value(V z, const V* p, const Below<V>& b) {
    return select(V(0) < z, z * fma(p[0], z, p[2]), fma(p[1], b.minus_z, p[2] * z));
  }
  template <class V>
  static FFN_FN V slope(V z, const V* p, const Below<V>& b) {
    const V left = fma(p[1], select(p[3] <= z, V(-1), b.minus_one), p[2]);
    return select(V(0) < z, fma(p[0] + p[0], z, p[2]), left);
  }
};

struct Identity : Activation {
  static constexpr const char* name = "identity";

  template <class V>
  static FFN_FN V fwd(V z, const V*) {
    return z;
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V*) {
    return {z, V(1)};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V*) {
    return {z, V(1), V(0)};
  }
};

// s·q with s = sigmoid(z), c = 1 − s and q = a·tanh(z/a); up: b·tanh(u/b). (sq)' = q'·s + q·s·c,
// (sq)'' = q''·s + s·c·(2q' + q·(c − s)).
struct Situ : Activation {
  static constexpr const char* name = "situ";
  static constexpr OwnParams own = {{{"gate_softcap", 4.0, true}, {"up_softcap", 25.0, true}}};
  static constexpr bool has_up = true;

  template <class V>
  static FFN_FN V fwd(V z, const V* p) {
    return softcap(z, p[0]).value * sigmoid(z);
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V* p) {
    const auto [q, dq, ddq] = softcap(z, p[0]);
    const auto [s, c] = sigmoid_pair(z);
    return {q * s, fma(q, s * c, dq * s)};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V* p) {
    const auto [q, dq, ddq] = softcap(z, p[0]);
    const auto [s, c] = sigmoid_pair(z);
    return {q * s, fma(q, s * c, dq * s), fma(s * c, fma(q, c - s, dq + dq), ddq * s)};
  }
  template <class V>
  static FFN_FN V up(V u, const V* p) {
    return softcap(u, p[1]).value;
  }
  template <class V>
  static FFN_FN Grad<V> up_grad(V u, const V* p) {
    const auto [value, slope, curvature] = softcap(u, p[1]);
    return {value, slope};
  }
  template <class V>
  static FFN_FN Grad2<V> up_grad2(V u, const V* p) {
    return softcap(u, p[1]);
  }

 private:
  // a·t with t = tanh(x/a): the slope is 1 − t², the curvature −2t(1 − t²)/a.
  template <class V>
  static FFN_FN Grad2<V> softcap(V x, V a) {
    const V t = tanh(x / a), slope = fma(-t, t, V(1));
    return {a * t, slope, V(-2) * t * slope / a};
  }
};

// min(silu(z), cap); up: clamp(u, -cap, cap). Slopes are 0 at the cap and beyond it.
struct SwigluStep : Activation {
  static constexpr const char* name = "swiglu_step";
  static constexpr OwnParams own = {{{"cap", 7.0, true}}};
  static constexpr bool has_up = true;

  template <class V>
  static FFN_FN V fwd(V z, const V* p) {
    return min(p[0], Silu::fwd(z, p));
  }
  template <class V>
  static FFN_FN Grad<V> grad(V z, const V* p) {
    const auto [value, slope] = Silu::grad(z, p);
    return {min(p[0], value), select(p[0] <= value, V(0), slope)};
  }
  template <class V>
  static FFN_FN Grad2<V> grad2(V z, const V* p) {
    const auto [value, slope, curvature] = Silu::grad2(z, p);
    return {min(p[0], value), select(p[0] <= value, V(0), slope), select(p[0] <= value, V(0), curvature)};
  }
  template <class V>
  static FFN_FN V up(V u, const V* p) {
    return max(-p[0], min(p[0], u));
  }
  template <class V>
  static FFN_FN Grad<V> up_grad(V u, const V* p) {
    return {up(u, p), select(abs(u) < p[0], V(1), V(0))};
  }
  template <class V>
  static FFN_FN Grad2<V> up_grad2(V u, const V* p) {
    const auto [value, slope] = up_grad(u, p);
    return {value, slope, V(0)};
  }
};

using Activations = TypeList<Relu, ReluSquared, StarRelu, LeakyRelu, Sigmoid, Tanh, Gelu, GeluTanh, Silu, Swish,
                             SiluSquared, Xielu, Identity, Situ, SwigluStep>;

// Calls `f(Tag<Activation>{})` for the activation at `index` of the list; false if there is none.
template <class F>
FFN_FN constexpr bool dispatch_activation(int index, F&& f) {
  return visit_type(Activations{}, index, f);
}
