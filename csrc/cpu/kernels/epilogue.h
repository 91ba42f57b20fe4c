// Textual, per instruction set: what happens to a finished tile [rows][2 vectors] of accumulators: bias, activation or
// its gradient, and the one rounding to the storage dtype.

template <class V, class S>
FFN_FN S* tile_row(void* base, int64_t row_stride, int64_t row, int64_t col) {
    return static_cast<S*>(base) + row * row_stride + col;
}

template <class V, class S>
FFN_FN void store_part(S* to, V v, int64_t n) {
    if (n == V::kLanes) store(to, v);
    else store(to, v, static_cast<int>(n));
}

template <class V, class S>
FFN_FN V load_part(const S* from, int64_t n) {
    return n == V::kLanes ? load<V>(from) : load<V>(from, static_cast<int>(n));
}

template <class V, class S>
FFN_FN V bias_part(const void* bias, int64_t col, int64_t n) {
    return bias ? load_part<V>(static_cast<const S*>(bias) + col, n) : V::zero();
}

template <class V, class S>
void finish_store(const Epilogue& e, const typename V::Scalar* tile, int64_t row0, int64_t rows, int64_t col,
                  int64_t cols) {
    constexpr int64_t W = V::kLanes;
    const void* bias = e.bias ? e.bias[0] : nullptr;
    for (int64_t j = 0; j < cols; j += W) {
        const int64_t n = cols - j < W ? cols - j : W;
        const V b = bias_part<V, S>(bias, col + j, n);
        for (int64_t i = 0; i < rows; ++i) {
            V v = load<V>(tile + i * 2 * W + j);
            if (bias) v = v + b;
            store_part(tile_row<V, S>(e.out, e.out_stride, row0 + i, col + j), v, n);
        }
    }
}

// Gated: vector 0 of a tile row is gate, vector 1 up, of the same columns.
template <class V, class S, class Act>
void finish_gated(const Gemm& g, int64_t branch, const typename V::Scalar* tile, int64_t row0, int64_t rows,
                  int64_t col, int64_t n, typename V::Scalar* sums) {
    constexpr int64_t W = V::kLanes;
    const Epilogue& e = g.epilogue;
    const V beta(static_cast<typename V::Scalar>(e.beta));
    const void* bias_gate = e.bias ? e.bias[2 * branch] : nullptr;
    const void* bias_up = e.bias ? e.bias[2 * branch + 1] : nullptr;
    const V b0 = bias_part<V, S>(bias_gate, col, n);
    const V b1 = bias_part<V, S>(bias_up, col, n);
    const bool first = branch == 0, last = branch + 1 == g.branches();
    for (int64_t i = 0; i < rows; ++i) {
        V gate = load<V>(tile + i * 2 * W);
        V up = load<V>(tile + i * 2 * W + W);
        if (bias_gate) gate = gate + b0;
        if (bias_up) up = up + b1;
        if (e.gate) {
            const int64_t at = branch * e.pre_branch_stride + (row0 + i) * e.pre_stride + col;
            store_part(static_cast<S*>(e.gate) + at, gate, n);
            store_part(static_cast<S*>(e.up) + at, up, n);
        }
        V value = Act::fwd(gate, beta) * up;
        if (!first) value = load<V>(sums + i * W) + value;
        if (!last) store(sums + i * W, value);
        else if (e.out) store_part(tile_row<V, S>(e.out, e.out_stride, row0 + i, col), value, n);
    }
}

template <class V, class S, class Act>
void finish_plain(const Gemm& g, const typename V::Scalar* tile, int64_t row0, int64_t rows, int64_t col,
                  int64_t cols) {
    constexpr int64_t W = V::kLanes;
    const Epilogue& e = g.epilogue;
    const V beta(static_cast<typename V::Scalar>(e.beta));
    const void* bias = e.bias ? e.bias[0] : nullptr;
    for (int64_t j = 0; j < cols; j += W) {
        const int64_t n = cols - j < W ? cols - j : W;
        const V b = bias_part<V, S>(bias, col + j, n);
        for (int64_t i = 0; i < rows; ++i) {
            V pre = load<V>(tile + i * 2 * W + j);
            if (bias) pre = pre + b;
            if (e.gate) store_part(static_cast<S*>(e.gate) + (row0 + i) * e.pre_stride + col + j, pre, n);
            if (e.out) store_part(tile_row<V, S>(e.out, e.out_stride, row0 + i, col + j), Act::fwd(pre, beta), n);
        }
    }
}

template <class V, class S, class Act>
void finish_activate_grad(const Epilogue& e, const typename V::Scalar* tile, int64_t row0, int64_t rows, int64_t col,
                          int64_t cols) {
    constexpr int64_t W = V::kLanes;
    const V beta(static_cast<typename V::Scalar>(e.beta));
    for (int64_t j = 0; j < cols; j += W) {
        const int64_t n = cols - j < W ? cols - j : W;
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t at = (row0 + i) * e.pre_stride + col + j;
            const V dh = load<V>(tile + i * 2 * W + j);
            const auto act = Act::grad(load_part<V>(static_cast<const S*>(e.gate) + at, n), beta);
            V d_gate = dh * act.slope;
            if (e.up) {
                d_gate = d_gate * load_part<V>(static_cast<const S*>(e.up) + at, n);
                store_part(tile_row<V, S>(e.out_up, e.out_stride, row0 + i, col + j), dh * act.value, n);
            }
            store_part(tile_row<V, S>(e.out, e.out_stride, row0 + i, col + j), d_gate, n);
        }
    }
}

template <class V>
void finish_tile(const Gemm& g, int64_t branch, const typename V::Scalar* tile, int64_t row0, int64_t rows,
                 int64_t col, int64_t cols, typename V::Scalar* sums) {
    const Epilogue& e = g.epilogue;
    dispatch_storage<typename V::Scalar>(e.dtype, [&](auto storage) {
        using S = typename decltype(storage)::Type;
        if (e.kind == Epilogue::Kind::kStore) {
            finish_store<V, S>(e, tile, row0, rows, col, cols);
            return;
        }
        dispatch_activation(e.activation, [&](auto act_tag) {
        using Act = typename decltype(act_tag)::Type;
            if (e.kind == Epilogue::Kind::kActivateGrad)
                finish_activate_grad<V, S, Act>(e, tile, row0, rows, col, cols);
            else if (g.gated)
                finish_gated<V, S, Act>(g, branch, tile, row0, rows, col, cols, sums);
            else
                finish_plain<V, S, Act>(g, tile, row0, rows, col, cols);
        });
    });
}
