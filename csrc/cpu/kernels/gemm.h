// Textual, per instruction set: the packed product. A is packed once for all tasks; a task packs its group of B panels
// chunk by chunk, runs the register tile over its A panels and hands finished tiles, hot in L1, to the epilogue.

// The kernel for 1 .. kMost rows: of(integral constant) gives its address.
template <class F, int... I>
FFN_FN auto choose_among(int64_t rows, std::integer_sequence<int, I...>, const F& of) {
  const decltype(of(std::integral_constant<int, 1>{})) kernels[] = {of(std::integral_constant<int, I + 1>{})...};
  return kernels[rows - 1];
}

template <int kMost, class F>
FFN_FN auto choose(int64_t rows, const F& of) {
  return choose_among(rows, std::make_integer_sequence<int, kMost>{}, of);
}

// sums (+)= the sums of one run.
template <class V, int H, int N>
FFN_FN void end_run(const V (&run)[H][N], typename V::Scalar* sums, bool add) {
  FFN_UNROLL
  for (int i = 0; i < H; ++i) {
    FFN_UNROLL
    for (int j = 0; j < N; ++j) {
      typename V::Scalar* at = sums + (i * N + j) * V::kLanes;
      store(at, add ? load<V>(at) + run[i][j] : run[i][j]);
    }
  }
}

// tile[H][vectors] (+)= sum over `steps` of k of a[k][H] * b[k][vectors].
template <class V, int H>
void micro_kernel(int64_t steps, const typename V::Scalar* a, const typename V::Scalar* b, typename V::Scalar* tile,
                  bool add) {
  constexpr int W = V::kLanes;
  constexpr int N = kTileVectors;
  constexpr int64_t kRun = kRunK / V::kTerms;
  for (int64_t run = 0; run < steps || run == 0; run += kRun) {
    const int64_t end = steps - run < kRun ? steps : run + kRun;
    typename V::Sum acc[H][N];
    FFN_UNROLL
    for (int i = 0; i < H; ++i) {
      FFN_UNROLL
      for (int j = 0; j < N; ++j) acc[i][j] = V::Sum::zero();
    }
#pragma GCC unroll 4
    for (int64_t k = run; k < end; ++k) {
      V bk[N];
      FFN_UNROLL
      for (int j = 0; j < N; ++j) bk[j] = load<V>(b + (k * N + j) * W);
      FFN_UNROLL
      for (int i = 0; i < H; ++i) {
        const V ai(a[k * H + i]);
        FFN_UNROLL
        for (int j = 0; j < N; ++j) acc[i][j] = fma(ai, bk[j], acc[i][j]);
      }
    }
    end_run(acc, tile, add);
    add = true;
  }
}

// A piece of k that is packed at once: [k, k + length) of stretch `b` (see Gemm::b), which begins at s, of one branch.
// Packed it takes `steps` from `step` on.
struct Chunk {
  int64_t branch, b, s, k, length, step, steps;
};

FFN_FN Chunk chunk_at(const Gemm& g, int64_t index) {
  const int64_t stretch = g.stretch();
  const int64_t in_branch = index % g.chunks();
  const int64_t per_stretch = divide_up(stretch, kChunkK);
  const int64_t k = stretch ? in_branch % per_stretch * kChunkK : 0;
  const int64_t b = stretch ? in_branch / per_stretch : 0;
  const int64_t length = stretch - k < kChunkK ? stretch - k : kChunkK;
  return {index / g.chunks(), b, b * stretch, k, length, b * g.steps(stretch) + g.steps(k), g.steps(length)};
}

// Calls f(operand, first k, columns, place in a panel) for what makes up the unshared side of a chunk: gate and up, or
// the one operand.
template <class F>
FFN_FN void for_each_part(const Gemm& g, const Chunk& c, int64_t width, const F& f) {
  if (g.gated) {
    f(g.b[2 * c.branch], c.k, width / 2, 0);
    f(g.b[2 * c.branch + 1], c.k, width / 2, width / 2);
  } else if (g.swapped) {
    f(g.a, c.s + c.k, width, 0);
  } else {
    f(g.b[c.b], c.k, width, 0);
  }
}

template <class V>
void pack_a_as(const Gemm& g, int64_t chunk, int64_t panel_begin, int64_t panel_end) {
  const Chunk c = chunk_at(g, chunk);
  auto* out = static_cast<typename V::Scalar*>(g.packed_a) + c.step * g.panels_m * g.panel_rows +
              panel_begin * c.steps * g.panel_rows;
  const Operand& operand = g.swapped ? g.b[c.b] : g.a;
  pack_panels<V>(operand, g.first_row + panel_begin * g.panel_rows, g.first_row + g.M, g.swapped ? c.k : c.s + c.k,
                 c.length, g.panel_rows, out, g.panel_rows, c.steps * g.panel_rows, panel_end - panel_begin);
}

template <class V>
void gemm_task(const Gemm& g, int64_t task, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  constexpr int64_t kWidth = kTileVectors * W;
  const int64_t H = g.panel_rows;
  const int64_t q0 = task % g.tasks_n() * g.group_n;
  const int64_t groups = g.panels_n - q0 < g.group_n ? g.panels_n - q0 : g.group_n;
  const int64_t p0 = task / g.tasks_n() * g.block_m;
  const int64_t p1 = p0 + g.block_m < g.panels_m ? p0 + g.block_m : g.panels_m;
  const int64_t columns = g.panel_columns;

  T* packed_b = static_cast<T*>(scratch);
  T* tiles = packed_b + g.group_n * kWidth * g.steps(g.chunk_length());
  T* sums = tiles + (g.chunks() > 1 ? g.block_m * g.group_n : 1) * H * kWidth;  // branches: act(gate) * up so far
  const auto micro = choose<kTileRows>(H, [](auto rows) { return &micro_kernel<V, decltype(rows)::value>; });

  const int64_t chunks = g.chunks() * g.branches();
  for (int64_t i = 0; i < chunks; ++i) {
    const Chunk c = chunk_at(g, i);
    const int64_t panel_step = c.steps * kWidth;
    for_each_part(g, c, kWidth, [&](const Operand& operand, int64_t k, int64_t width, int64_t place) {
      pack_panels<V>(operand, q0 * width, g.N, k, c.length, width, packed_b + place, kWidth, panel_step, groups);
    });
    const T* chunk = static_cast<const T*>(g.packed_a) + c.step * g.panels_m * H;
    const bool first = i % g.chunks() == 0;
    const bool last = (i + 1) % g.chunks() == 0;
    // Short sums are bound by their stores: whole rows of the output are finished one after the other.
    const int64_t block = g.K < kShortK ? 1 : kPanelBlock;
    for (int64_t pb = p0; pb < p1; pb += block) {
      const int64_t pe = pb + block < p1 ? pb + block : p1;
      for (int64_t q = 0; q < groups; ++q) {
        for (int64_t p = pb; p < pe; ++p) {
          const int64_t slot = (p - p0) * groups + q;
          T* tile = g.chunks() == 1 ? tiles : tiles + slot * H * kWidth;
          const int64_t col = (q0 + q) * columns;
          const TilePart part = {p * H, g.M - p * H < H ? g.M - p * H : H, col,
                                 g.N - col < columns ? g.N - col : columns};
          if (last) prefetch_tile(g.epilogue, part);
          micro(c.steps, chunk + p * c.steps * H, packed_b + q * panel_step, tile, !first);
          if (last) finish_tile<typename V::Sum>(g, c.branch, tile, part, sums + slot * H * columns);
        }
      }
    }
  }
}
