// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: a gate with its first and second derivatives and the sums for the gradients of its own
// parameters, over whole vectors of scratch, as the epilogue of a product calls them, and over a matrix in its storage
// dtype; and sums over rows.

#include "../../common/gate_math.h"

// float32 or float64, without a tail: callers load and store, and lanes beyond the end are computed and not stored.
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

constexpr int64_t kRowBlock = 256;  // elements that pass through scratch in L1 at a time

template <class V>
struct RowBlock {
  alignas(64) typename V::Scalar values[kRowBlock];
  bool nontemporal = false;

  // Whole vectors of what the arithmetic takes stay where they are.
  static bool in_place(DType dtype, int64_t n) { return dtype == arithmetic_dtype(dtype) && n % V::kLanes == 0; }

  const typename V::Scalar* read(const Matrix& m, int64_t r, int64_t c, int64_t n) {
    if (!m.data) return nullptr;
    if (in_place(m.dtype, n) && m.col_stride == 1) return row_pointer<typename V::Scalar>(m, r) + c;
    read_row<V>(m, r, c, n, values);
    return values;
  }

  bool stays(DType dtype, int64_t n) const { return in_place(dtype, n) && !nontemporal; }

  typename V::Scalar* place(DType dtype, void* to, int64_t at, int64_t n) {
    return to && stays(dtype, n) ? static_cast<typename V::Scalar*>(to) + at : values;
  }

  void write(DType dtype, void* to, int64_t at, int64_t n) const {
    if (!to || stays(dtype, n)) return;
    dispatch_storage<typename V::Scalar>(dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      store_row<V>(static_cast<S*>(to) + at, n, nontemporal,
                   [&](int64_t i, int64_t left)
                       __attribute__((always_inline)) { return load_part<V>(values + i, left); });
    });
  }
};

// Runs the kernel that `pick` chooses over rows and columns of the range, a block at a time.
template <class V>
void gated_act_range(const GatedAct& g, void (*ActKernels<V>::*pick)(const ActVectors<V>&), const Range& range) {
  const auto kernel = act_kernels<V>(g).*pick;
  RowBlock<V> gate, up, d, dd_gate, dd_up, out[3];
  for (RowBlock<V>& each : out) each.nontemporal = g.nontemporal;
  for (int64_t r = range.row_begin; r < range.row_end; ++r) {
    for (int64_t c = range.col_begin; c < range.col_end; c += kRowBlock) {
      const int64_t n = range.col_end - c < kRowBlock ? range.col_end - c : kRowBlock;
      const auto dtype = [&](int i) { return i == 2 && g.h_unrounded ? arithmetic_dtype(g.gate.dtype) : g.gate.dtype; };
      const int64_t at = r * g.out_stride + c;
      typename V::Scalar* to[3];
      for (int i = 0; i < 3; ++i) to[i] = out[i].place(dtype(i), g.out[i], at, n);
      kernel({.count = divide_up(n, V::kLanes),
              .stride = V::kLanes,
              .gate = gate.read(g.gate, r, c, n),
              .up = up.read(g.up, r, c, n),
              .d = d.read(g.d_out, r, c, n),
              .dd_gate = dd_gate.read(g.dd_gate, r, c, n),
              .dd_up = dd_up.read(g.dd_up, r, c, n),
              .out = {to[0], to[1], to[2]},
              .form = g});
      if (g.row_weight) {
        const V weight(static_cast<const typename V::Scalar*>(g.row_weight)[r]);
        for (int64_t i = 0; i < n; i += V::kLanes) store(to[2] + i, weight * load<V>(to[2] + i));
      }
      for (int i = 0; i < 3; ++i) out[i].write(dtype(i), g.out[i], at, n);
    }
  }
  if (g.nontemporal) end_nontemporal();
}

// Sums over a block of the range have the arithmetic's dtype, their sum is added in double.
template <class V>
void own_sums_range(const GatedAct& g, const Range& range, double* sums) {
  const auto kernel = act_kernels<V>(g).own_sums;
  RowBlock<V> x, d, dd_x;
  typename V::Scalar found[kMostOwnParams] = {};
  for (int64_t r = range.row_begin; r < range.row_end; ++r) {
    for (int64_t c = range.col_begin; c < range.col_end; c += kRowBlock) {
      const int64_t n = range.col_end - c < kRowBlock ? range.col_end - c : kRowBlock;
      kernel({.count = divide_up(n, V::kLanes),
              .stride = V::kLanes,
              .gate = x.read(g.gate, r, c, n),
              .d = d.read(g.d_out, r, c, n),
              .dd_gate = dd_x.read(g.dd_gate, r, c, n),
              .out = {found},
              .form = g});
      for (int k = 0; k < kMostOwnParams; ++k) sums[k] += double(found[k]);
    }
  }
}

template <class V>
FFN_FN V add_weighted(V sum, V value, const typename V::Scalar* weight, int64_t r) {
  return weight ? fma(V(weight[r]), value, sum) : sum + value;
}

// Three levels of 32 rows: the error grows with the cube root of the number of rows, the order depends on nothing else.
// Several rows at a time pass over a page of columns, whose sums wait in L1: memory is read along the rows.
template <class V>
void column_sum_as(const ColumnSum& s, int64_t col_begin, int64_t col_end) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes, kLevel = 32, kAtOnce = 8, kColumns = 4096 / sizeof(T);
  const auto* weight = static_cast<const T*>(s.weight);
  alignas(64) T sum[kColumns], middle[kColumns], total[kColumns];
  // A level that ends joins the next and begins anew.
  const auto join = [](T* from, T* to, int64_t cols) {
    for (int64_t c = 0; c < cols; c += W) {
      store(to + c, load<V>(to + c) + load<V>(from + c));
      store(from + c, V::zero());
    }
  };
  dispatch_storage<T>(s.matrix.dtype, [&](auto storage) {
    using S = typename decltype(storage)::Type;
    for (int64_t begin = col_begin; begin < col_end; begin += kColumns) {
      const int64_t cols = col_end - begin < kColumns ? col_end - begin : kColumns;
      for (int64_t c = 0; c < cols; c += W) {
        store(sum + c, V::zero());
        store(middle + c, V::zero());
        store(total + c, V::zero());
      }
      for (int64_t r = 0; r < s.rows; r += kAtOnce) {
        const int64_t rows = s.rows - r < kAtOnce ? s.rows - r : kAtOnce;
        const S *from[kAtOnce], *next_from[kAtOnce];
        for (int64_t i = 0; i < rows; ++i) {
          from[i] = row_pointer<S>(s.matrix, r + i);
          next_from[i] = row_pointer<S>(s.matrix, r + i + kAtOnce < s.rows ? r + i + kAtOnce : s.rows - 1);
        }
        for (int64_t c = 0; c < cols; c += W) {
          const int64_t n = cols - c < W ? cols - c : W;
          V v = load<V>(sum + c);
          for (int64_t i = 0; i < rows; ++i)
            v = add_weighted(v, load_columns<V>(from[i], s.matrix.col_stride, begin + c, n), weight, r + i);
          for (int64_t i = 0; i < rows; ++i) prefetch_l2(next_from[i] + (begin + c) * s.matrix.col_stride);
          store(sum + c, v);
        }
        const int64_t next = r + rows;
        if (next % kLevel == 0 || next == s.rows) join(sum, middle, cols);
        if (next % (kLevel * kLevel) == 0 || next == s.rows) join(middle, total, cols);
      }
      for (int64_t c = 0; c < cols; c += W)
        store_part(static_cast<S*>(s.out) + begin + c, load<V>(total + c), cols - c < W ? cols - c : W);
    }
  });
}
