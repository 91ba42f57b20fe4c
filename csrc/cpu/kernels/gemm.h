// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: the packed product. A is packed once for all tasks; a task packs its group of B panels
// for one block of k after the other, runs the micro-kernel over its A panels and hands finished tiles, hot in L1, to
// the epilogue.

// sums (+)= the partial sums of one block of k; rows of sums lie `stride` apart.
template <class V, int H, int N>
FFN_FN void add_partial_sums(const V (&partial)[H][N], typename V::Scalar* sums, int64_t stride, bool add) {
  FFN_UNROLL
  for (int i = 0; i < H; ++i) {
    FFN_UNROLL
    for (int j = 0; j < N; ++j) {
      typename V::Scalar* at = sums + i * stride + j * V::kLanes;
      store(at, add ? load<V>(at) + partial[i][j] : partial[i][j]);
    }
  }
}

// tile[H][vectors] (+)= sum over `steps` of k of a[k][H] * b[k][vectors]; steps of a lie `a_stride` apart, rows of the
// tile `stride`.
template <class V, int H>
void micro_kernel(int64_t steps, const typename V::Scalar* a, int64_t a_stride, const typename V::Scalar* b,
                  typename V::Scalar* tile, int64_t stride, bool add) {
  constexpr int W = V::kLanes;
  constexpr int N = kNRVectors;
  constexpr int64_t kSumSteps = kSumBlock / V::kKR;
  for (int64_t begin = 0; begin < steps || begin == 0; begin += kSumSteps) {
    const int64_t end = steps - begin < kSumSteps ? steps : begin + kSumSteps;
    typename V::Sum acc[H][N];
    FFN_UNROLL
    for (int i = 0; i < H; ++i) {
      FFN_UNROLL
      for (int j = 0; j < N; ++j) acc[i][j] = V::Sum::zero();
    }
#pragma GCC unroll 4
    for (int64_t k = begin; k < end; ++k) {
      V bk[N];
      FFN_UNROLL
      for (int j = 0; j < N; ++j) bk[j] = load<V>(b + (k * N + j) * W);
      FFN_UNROLL
      for (int i = 0; i < H; ++i) {
        const V ai(a[k * a_stride + i]);
        FFN_UNROLL
        for (int j = 0; j < N; ++j) acc[i][j] = fma(ai, bk[j], acc[i][j]);
      }
    }
    add_partial_sums(acc, tile, stride, add);
    add = true;
  }
}

// A block of at most kc of k: [k, k + length) of operand `b` (see Gemm::b), whose k begins at s, of one branch.
// Packed it takes `steps` from `step` on.
struct KBlock {
  int64_t branch, b, s, k, length, step, steps;
};

FFN_FN KBlock k_block_at(const ScheduledGemm& g, int64_t index) {
  const int64_t b_length = g.b_length();
  const int64_t in_branch = index % g.k_blocks();
  const int64_t blocks_of_b = divide_up(b_length, kKC);
  const int64_t k = b_length ? in_branch % blocks_of_b * kKC : 0;
  const int64_t b = b_length ? in_branch / blocks_of_b : 0;
  const int64_t length = b_length - k < kKC ? b_length - k : kKC;
  return {index / g.k_blocks(), b, b * b_length, k, length, b * g.steps(b_length) + g.steps(k), g.steps(length)};
}

// Calls f(operand, first k, columns, offset in a panel) for what makes up the unshared side of a block of k: gate and
// up, or the one operand.
template <class F>
FFN_FN void for_each_part(const ScheduledGemm& g, const KBlock& c, int64_t width, const F& f) {
  if (g.gated) {
    f(g.b[2 * c.branch], c.k, width / 2, 0);
    f(g.b[2 * c.branch + 1], c.k, width / 2, width / 2);
  } else if (g.transposed) {
    f(g.a, c.s + c.k, width, 0);
  } else {
    f(g.b[c.b], c.k, width, 0);
  }
}

template <class V>
void pack_a_as(const ScheduledGemm& g, int64_t k_block, int64_t panel_begin, int64_t panel_end) {
  const KBlock c = k_block_at(g, k_block);
  auto* out = static_cast<typename V::Scalar*>(g.packed_a) + c.step * g.panels_m * g.mr + panel_begin * c.steps * g.mr;
  const Operand& operand = g.transposed ? g.b[c.b] : g.a;
  pack_panels<V>(operand, g.first_row + panel_begin * g.mr, g.first_row + g.M, g.transposed ? c.k : c.s + c.k, c.length,
                 g.mr, out, g.mr, c.steps * g.mr, panel_end - panel_begin);
}

// What the next B panels are packed from. It is asked for while the present ones are multiplied, a few lines for each
// micro-tile: the micro-kernel leaves memory idle, and packing would wait for it.
struct NextSource {
  struct Rows {
    const char* data;
    int64_t stride, rows, bytes;
  };
  Rows parts[2] = {};
  int64_t count = 0, part = 0, byte = 0, lines = 0;

  FFN_FN void add(const Operand& operand, int64_t lane, int64_t lanes, int64_t k, int64_t length) {
    const Matrix& m = operand.matrix;
    if (m.codes || m.rows || m.col_stride != 1 || lanes <= 0 || length <= 0) return;
    const int64_t size = storage_size(m.dtype);
    const int64_t row = operand.k_along_rows ? k : lane, col = operand.k_along_rows ? lane : k;
    const int64_t rows = operand.k_along_rows ? length : lanes, cols = operand.k_along_rows ? lanes : length;
    parts[count++] = {static_cast<const char*>(m.data) + (row * m.row_stride + col) * size, m.row_stride * size, rows,
                      cols * size};
    lines += rows * divide_up(cols * size, 64);
  }
  FFN_FN void ask(int64_t n) {
    for (; n > 0 && part < count; --n) {
      Rows& r = parts[part];
      prefetch_l2(r.data + byte);
      byte += 64;
      if (byte < r.bytes) continue;
      byte = 0;
      r.data += r.stride;
      if (--r.rows == 0) ++part;
    }
  }
};

// Of block i + 1 of k, or of the task or product that follows on this thread.
template <class V>
FFN_FN NextSource next_source(const ScheduledGemm& now, int64_t task, int64_t i, int64_t blocks, int64_t width) {
  NextSource next;
  const ScheduledGemm* g = &now;
  if (++i == blocks) {
    i = 0;
    task += now.at_once;
    if (task >= now.tasks_m() * now.tasks_n()) {
      task = 0;
      g = now.then;
    }
  }
  if (!g || g->kernel != Schedule::Kernel::kPacked) return next;
  const KBlock c = k_block_at(*g, i);
  const int64_t q = task % g->tasks_n() * g->nc_panels;
  for_each_part(*g, c, width, [&](const Operand& operand, int64_t k, int64_t part, int64_t) {
    const int64_t left = g->N - q * part;
    next.add(operand, q * part, left < g->nc_panels * part ? left : g->nc_panels * part, k, c.length);
  });
  return next;
}

// Steps of k for which a piece of a B panel stays in L1 while A panels pass: whole sum blocks, so that cutting there
// changes no bit.
template <class V>
FFN_FN constexpr int64_t l1_steps() {
  constexpr int64_t kSumSteps = kSumBlock / V::kKR;
  constexpr int64_t kBytes = kSumSteps * kNRVectors * V::kLanes * sizeof(typename V::Scalar);
  return (kL1Bytes < kBytes ? 1 : kL1Bytes / kBytes) * kSumSteps;
}

template <class V>
void packed_task(const ScheduledGemm& g, int64_t task, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  constexpr int64_t kWidth = kNRVectors * W;
  const int64_t H = g.mr;
  const int64_t q0 = task % g.tasks_n() * g.nc_panels;
  const int64_t groups = g.panels_n - q0 < g.nc_panels ? g.panels_n - q0 : g.nc_panels;
  const int64_t p0 = task / g.tasks_n() * g.mc_panels;
  const int64_t p1 = p0 + g.mc_panels < g.panels_m ? p0 + g.mc_panels : g.panels_m;
  const int64_t columns = g.nr;

  T* packed_b = static_cast<T*>(scratch);
  T* tiles = packed_b + g.nc_panels * kWidth * g.steps(g.kc());
  const int64_t in_row = g.tiles_in_row(H * kWidth * g.element());
  T* sums = tiles + tiles_of_task(g, in_row) * H * kWidth;  // branches: act(gate) * up
  const auto micro = [](int64_t rows) {
    return choose<kMR>(rows, [](auto r) { return &micro_kernel<V, decltype(r)::value>; });
  };
  const auto whole = micro(H), rest = micro(g.M % H ? g.M % H : H);  // the last panel may have fewer rows

  const Epilogue& e = g.epilogue;
  const bool direct = g.stores_directly();
  const bool waiting = g.k_blocks() > 1;          // sums, for their next block of k
  const bool together = g.transposed && waiting;  // tiles of a few panels go to their place at once
  const int64_t blocks = g.k_blocks() * g.branches();
  for (int64_t i = 0; i < blocks; ++i) {
    const KBlock c = k_block_at(g, i);
    const int64_t panel_step = c.steps * kWidth;
    for_each_part(g, c, kWidth, [&](const Operand& operand, int64_t k, int64_t width, int64_t offset) {
      pack_panels<V>(operand, q0 * width, g.N, k, c.length, width, packed_b + offset, kWidth, panel_step, groups);
    });
    const T* packed_a = static_cast<const T*>(g.packed_a) + c.step * g.panels_m * H;
    const bool first = i % g.k_blocks() == 0;
    const bool last = (i + 1) % g.k_blocks() == 0;
    // While memory is asked for the next panels, a piece of a B panel stays in L1 and all A panels pass it; else each
    // streams the whole B panel from L2. Short sums are bound by their stores: whole rows of the output are finished
    // one after the other.
    NextSource next = g.asks_ahead() ? next_source<V>(g, task, i, blocks, kWidth) : NextSource{};
    const bool pieces = g.few_panels() && g.b[0].k_along_rows;
    const int64_t block = g.K < kShortK ? 1 : kL2Panels;
    const int64_t piece = pieces && l1_steps<V>() < c.steps ? l1_steps<V>() : c.steps;
    const int64_t lines = next.count ? divide_up(next.lines, groups * (p1 - p0) * divide_up(c.steps, piece)) : 0;
    for (int64_t pb = p0; pb < p1; pb += block) {
      const int64_t pe = pb + block < p1 ? pb + block : p1;
      for (int64_t q = 0; q < groups; ++q) {
        const T* const b = packed_b + q * panel_step;
        const int64_t col = (q0 + q) * columns, cols = g.N - col < columns ? g.N - col : columns;
        int64_t k = 0;
        do {
          const int64_t steps = c.steps - k < piece ? c.steps - k : piece;
          const bool begins = first && k == 0, ends = last && k + steps == c.steps;
          for (int64_t p = pb; p < pe; ++p) {
            const int64_t slot = (p - p0) * groups + q;
            T* tile = tiles + (waiting ? slot : in_row > 1 ? q % in_row : pieces ? p - pb : 0) * H * kWidth;
            const TilePart part = {p * H, g.M - p * H < H ? g.M - p * H : H, col, cols};
            const T* const a = packed_a + (p * c.steps + k) * H;
            next.ask(lines);
            if (ends && in_row == 1) prefetch_tile(g, part);
            if (direct && part.rows == H && part.cols == kWidth) {
              T* const out = static_cast<T*>(e.out) + part.row0 * e.out_stride + col;
              whole(steps, a, H, b + k * kWidth, out, e.out_stride, !begins);
              continue;
            }
            (part.rows == H ? whole : rest)(steps, a, H, b + k * kWidth, tile, kWidth, !begins);
            if (in_row > 1) {
              if (e.bias) add_bias<typename V::Sum>(part, e.dtype, e.bias[0], tile);
              if ((q + 1) % in_row == 0 || q + 1 == groups) {
                const int64_t begin = (q0 + q / in_row * in_row) * columns;
                row_to_storage<typename V::Sum>({part.row0, part.rows, begin, col + part.cols - begin}, e, tiles,
                                                H * kWidth);
              }
            } else if (ends && !together) {
              finish_tile<typename V::Sum>(g, c.branch, tile, part, sums + slot * H * columns);
            }
          }
          k += steps;
        } while (k < c.steps);
        if (last && together)
          finish_transposed<typename V::Sum>(g, tiles + ((pb - p0) * groups + q) * H * kWidth, groups * H * kWidth,
                                             {pb * H, (pe * H < g.M ? pe * H : g.M) - pb * H, col, cols});
      }
    }
  }
}
