// Textual, per instruction set: the packed product. A is packed once for all tasks; a task packs its group of B panels
// chunk by chunk, runs the register tile over its A panels and hands finished tiles, hot in L1, to the epilogue.

// tile[H][vectors] (+)= sum over kc of a[k][H] * b[k][vectors].
template <class V, int H>
void micro_kernel(int64_t kc, const typename V::Scalar* a, const typename V::Scalar* b, typename V::Scalar* tile,
                  bool add) {
  constexpr int W = V::kLanes;
  constexpr int N = kTileVectors;
  for (int64_t run = 0; run < kc || run == 0; run += kRunK) {
    const int64_t end = kc - run < kRunK ? kc : run + kRunK;
    V acc[H][N];
    FFN_UNROLL
    for (int i = 0; i < H; ++i) {
      FFN_UNROLL
      for (int j = 0; j < N; ++j) acc[i][j] = V::zero();
    }
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
    FFN_UNROLL
    for (int i = 0; i < H; ++i) {
      FFN_UNROLL
      for (int j = 0; j < N; ++j) {
        typename V::Scalar* at = tile + (i * N + j) * W;
        store(at, add ? load<V>(at) + acc[i][j] : acc[i][j]);
      }
    }
    add = true;
  }
}

template <class V>
using MicroKernel = void (*)(int64_t, const typename V::Scalar*, const typename V::Scalar*, typename V::Scalar*, bool);

template <class V, int... H>
MicroKernel<V> micro_kernel_of(int64_t rows, std::integer_sequence<int, H...>) {
  static constexpr MicroKernel<V> kernels[] = {micro_kernel<V, H + 1>...};
  return kernels[rows - 1];
}

// One side of the product at stretch s, chunk c of k: the operand and where the chunk starts in it.
struct Side {
  const Operand& operand;
  int64_t k;
};

FFN_FN Side whole_side(const Gemm& g, int64_t s, int64_t c) { return {g.a, s + c}; }
FFN_FN Side listed_side(const Gemm& g, int64_t s, int64_t c) { return {g.b[s ? s / g.stretch() : 0], c}; }

template <class V>
void pack_a_as(const Gemm& g, int64_t panel_begin, int64_t panel_end) {
  using T = typename V::Scalar;
  const int64_t padded_rows = g.panels_m * g.panel_rows;
  const int64_t stretch = g.stretch();
  for (int64_t s = 0; s < g.K; s += stretch) {
    for (int64_t c = 0; c < stretch; c += kChunkK) {
      const int64_t kc = stretch - c < kChunkK ? stretch - c : kChunkK;
      T* chunk = static_cast<T*>(g.packed_a) + (s + c) * padded_rows;
      const Side side = g.swapped ? listed_side(g, s, c) : whole_side(g, s, c);
      pack_panels<V>(side.operand, g.first_row + panel_begin * g.panel_rows, g.first_row + g.M, side.k, kc,
                     g.panel_rows, chunk + panel_begin * kc * g.panel_rows, g.panel_rows, kc * g.panel_rows,
                     panel_end - panel_begin);
    }
  }
}

template <class V>
void gemm_task(const Gemm& g, int64_t task, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  constexpr int64_t kWidth = kTileVectors * W;
  const int64_t H = g.panel_rows;
  const int64_t q0 = task % g.tasks_n() * g.group_n;
  const int64_t q1 = q0 + g.group_n < g.panels_n ? q0 + g.group_n : g.panels_n;
  const int64_t p0 = task / g.tasks_n() * g.block_m;
  const int64_t p1 = p0 + g.block_m < g.panels_m ? p0 + g.block_m : g.panels_m;
  const int64_t groups = q1 - q0;
  const int64_t padded_rows = g.panels_m * H;
  const int64_t stretch = g.stretch();
  const int64_t columns = g.gated ? kWidth / 2 : kWidth;  // output columns of a panel

  T* packed_b = static_cast<T*>(scratch);
  T* tiles = packed_b + packed_chunks(g) * kWidth * kChunkK;
  T* sums = tiles + g.block_m * g.group_n * H * kWidth;  // branches: act(gate) * up so far
  const MicroKernel<V> micro = micro_kernel_of<V>(H, std::make_integer_sequence<int, kTileRows>{});
  const bool one_chunk = stretch <= kChunkK && stretch == g.K;

  for (int64_t branch = 0; branch < g.branches(); ++branch) {
    for (int64_t s = 0; s < g.K || s == 0; s += stretch ? stretch : 1) {
      for (int64_t c = 0; c < stretch || c == 0; c += kChunkK) {
        const int64_t kc = stretch - c < kChunkK ? stretch - c : kChunkK;
        // A single panel holds several chunks: rows are then read in longer runs, which the hardware follows.
        const int64_t run = g.group_n == 1 ? kSingleChunks * kChunkK : kChunkK;
        const int64_t packed = stretch - c < run ? stretch - c : run;
        const int64_t panel_step = kc * kWidth;
        if (c % run != 0) {
          // packed with an earlier chunk
        } else if (g.gated) {
          for (int half = 0; half < 2; ++half)
            pack_panels<V>(g.b[2 * branch + half], q0 * columns, g.N, c, packed, columns, packed_b + half * columns,
                           kWidth, panel_step, groups);
        } else {
          const Side side = g.swapped ? whole_side(g, s, c) : listed_side(g, s, c);
          pack_panels<V>(side.operand, q0 * kWidth, g.N, side.k, packed, kWidth, packed_b, kWidth, panel_step, groups);
        }
        const T* chunk = static_cast<const T*>(g.packed_a) + (s + c) * padded_rows;
        const bool first = s + c == 0;
        const bool last = s + c + kc >= g.K;
        // Short sums are bound by their stores: whole rows of the output are finished one after the other.
        const int64_t block = g.K < kShortK ? 1 : kPanelBlock;
        for (int64_t pb = p0; pb < p1; pb += block) {
          const int64_t pe = pb + block < p1 ? pb + block : p1;
          for (int64_t q = 0; q < groups; ++q) {
            for (int64_t p = pb; p < pe; ++p) {
              const int64_t slot = (p - p0) * groups + q;
              T* tile = one_chunk ? tiles : tiles + slot * H * kWidth;
              micro(kc, chunk + p * kc * H, packed_b + q * panel_step + c % run * kWidth, tile, !first);
              if (!last) continue;
              const int64_t rows = g.M - p * H < H ? g.M - p * H : H;
              const int64_t col = (q0 + q) * columns;
              const int64_t cols = g.N - col < columns ? g.N - col : columns;
              finish_tile<V>(g, branch, tile, {p * H, rows, col, cols}, sums + slot * H * columns);
            }
          }
        }
      }
    }
  }
}
