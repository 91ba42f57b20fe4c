// Textual, per instruction set: gated activation with its first and second derivatives, and sums over rows.

template <class V, class S>
FFN_FN V gated_load(const Matrix& m, int64_t r, int64_t c, int64_t n) {
    return load_columns<V>(row_pointer<S>(m, r), m.col_stride, c, n);
}

// Calls f<S, Act>(r, c, n) for every stretch of n <= lanes columns.
template <class V, class F>
void for_each_stretch(const GatedAct& g, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                      const F& f) {
    dispatch_storage<typename V::Scalar>(g.gate.dtype, [&](auto storage) {
        using S = typename decltype(storage)::Type;
        dispatch_activation(g.activation, [&](auto act_tag) {
        using Act = typename decltype(act_tag)::Type;
            for (int64_t r = row_begin; r < row_end; ++r) {
                int64_t c = col_begin;
                for (; c + V::kLanes <= col_end; c += V::kLanes) f.template operator()<S, Act>(r, c, V::kLanes);
                if (c < col_end) f.template operator()<S, Act>(r, c, col_end - c);
            }
        });
    });
}

template <class V>
void gated_act_as(const GatedAct& g, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
    const V beta(static_cast<typename V::Scalar>(g.beta));
    const auto body = [&]<class S, class Act>(int64_t r, int64_t c, int64_t n) {
        V value = Act::fwd(gated_load<V, S>(g.gate, r, c, n), beta);
        if (g.up.data) value = value * gated_load<V, S>(g.up, r, c, n);
        store_part(static_cast<S*>(g.out[0]) + r * g.out_stride + c, value, n);
    };
    for_each_stretch<V>(g, row_begin, row_end, col_begin, col_end, body);
}

template <class V>
void gated_act_backward_as(const GatedAct& g, int64_t row_begin, int64_t row_end, int64_t col_begin,
                           int64_t col_end) {
    const V beta(static_cast<typename V::Scalar>(g.beta));
    const auto body = [&]<class S, class Act>(int64_t r, int64_t c, int64_t n) {
        const auto act = Act::grad(gated_load<V, S>(g.gate, r, c, n), beta);
        const V d_out = gated_load<V, S>(g.d_out, r, c, n);
        const int64_t at = r * g.out_stride + c;
        if (g.out[0]) {
            V d_gate = d_out * act.slope;
            if (g.up.data) d_gate = d_gate * gated_load<V, S>(g.up, r, c, n);
            store_part(static_cast<S*>(g.out[0]) + at, d_gate, n);
        }
        if (g.out[1]) store_part(static_cast<S*>(g.out[1]) + at, d_out * act.value, n);
    };
    for_each_stretch<V>(g, row_begin, row_end, col_begin, col_end, body);
}

// Of <dd_gate, d_gate> + <dd_up, d_up>, with d_gate = d a'(gate) up and d_up = d a(gate): the derivatives by d, gate, up.
template <class V>
void gated_act_double_backward_as(const GatedAct& g, int64_t row_begin, int64_t row_end, int64_t col_begin,
                                  int64_t col_end) {
    const V beta(static_cast<typename V::Scalar>(g.beta));
    const auto body = [&]<class S, class Act>(int64_t r, int64_t c, int64_t n) {
        const auto act = Act::grad2(gated_load<V, S>(g.gate, r, c, n), beta);
        const V d = gated_load<V, S>(g.d_out, r, c, n);
        const V dd_gate = g.dd_gate.data ? gated_load<V, S>(g.dd_gate, r, c, n) : V::zero();
        const V dd_up = g.dd_up.data ? gated_load<V, S>(g.dd_up, r, c, n) : V::zero();
        const V up = g.up.data ? gated_load<V, S>(g.up, r, c, n) : V(1);
        const int64_t at = r * g.out_stride + c;
        const V by_d = fma(dd_gate * up, act.slope, dd_up * act.value);
        const V by_gate = d * fma(dd_gate * up, act.curvature, dd_up * act.slope);
        store_part(static_cast<S*>(g.out[0]) + at, by_d, n);
        store_part(static_cast<S*>(g.out[1]) + at, by_gate, n);
        if (g.out[2]) store_part(static_cast<S*>(g.out[2]) + at, dd_gate * d * act.slope, n);
    };
    for_each_stretch<V>(g, row_begin, row_end, col_begin, col_end, body);
}

// Three levels of 32 rows: the error grows with the cube root of the number of rows, the order depends on nothing else.
template <class V>
void column_sum_as(const ColumnSum& s, int64_t col_begin, int64_t col_end) {
    constexpr int64_t kLevel = 32;
    dispatch_storage<typename V::Scalar>(s.matrix.dtype, [&](auto storage) {
        using S = typename decltype(storage)::Type;
        for (int64_t c = col_begin; c < col_end; c += V::kLanes) {
            const int64_t n = col_end - c < V::kLanes ? col_end - c : V::kLanes;
            V total = V::zero();
            for (int64_t r2 = 0; r2 < s.rows; r2 += kLevel * kLevel) {
                V middle = V::zero();
                for (int64_t r1 = r2; r1 < s.rows && r1 < r2 + kLevel * kLevel; r1 += kLevel) {
                    V sum = V::zero();
                    for (int64_t r = r1; r < s.rows && r < r1 + kLevel; ++r)
                        sum = sum + gated_load<V, S>(s.matrix, r, c, n);
                    middle = middle + sum;
                }
                total = total + middle;
            }
            store_part(static_cast<S*>(s.out) + c, total, n);
        }
    });
}
