// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: the choice of K of E experts for each token, and the weights of the chosen. Scores,
// their sums and the choice are in float32 (float64 for float64 logits); ties go to the lowest index, NaN ranks last.

template <class T>
struct Candidate {
  T value;
  int64_t index;
};

// Whether a, behind b in the order of indices, ranks before it. NaN is behind everything.
template <class T>
FFN_FN bool ranks_before(T a, T b) {
  return a > b || (b != b && a == a);
}

// The best `count` of values[begin .. end), best first, inserted into best[0 .. held); returns how many are held.
template <class T>
FFN_FN int64_t insert_best(const T* values, int64_t begin, int64_t end, int64_t count, Candidate<T>* best,
                           int64_t held) {
  for (int64_t e = begin; e < end; ++e) {
    const T value = values[e];
    if (held == count && !ranks_before(value, best[count - 1].value)) continue;
    int64_t at = held < count ? held++ : count - 1;
    for (; at > 0 && ranks_before(value, best[at - 1].value); --at) best[at] = best[at - 1];
    best[at] = {value, e};
  }
  return held;
}

// A heap whose top is the worst, for K beyond what insertion is good for.
template <class T>
struct WorstFirst {
  Candidate<T>* heap;
  int64_t size;

  static FFN_FN bool worse(const Candidate<T>& a, const Candidate<T>& b) {
    if (ranks_before(b.value, a.value)) return true;
    if (ranks_before(a.value, b.value)) return false;
    return a.index > b.index;
  }
  void sink(int64_t at) {
    const Candidate<T> moved = heap[at];
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && worse(heap[child + 1], heap[child])) ++child;
      if (!worse(heap[child], moved)) break;
      heap[at] = heap[child];
    }
    heap[at] = moved;
  }
};

template <class T>
void best_by_heap(const T* values, int64_t n, int64_t count, Candidate<T>* best) {
  WorstFirst<T> heap{best, count};
  for (int64_t e = 0; e < count; ++e) best[e] = {values[e], e};
  for (int64_t i = count / 2; i-- > 0;) heap.sink(i);
  for (int64_t e = count; e < n; ++e) {
    if (!ranks_before(values[e], best[0].value)) continue;
    best[0] = {values[e], e};
    heap.sink(0);
  }
  while (heap.size > 1) {  // the worst goes to the end
    const Candidate<T> worst = best[0];
    best[0] = best[--heap.size];
    heap.sink(0);
    best[heap.size] = worst;
  }
}

constexpr int64_t kInsertMost = 32;

// The best `count` of a row in each lane, from W rows that are `stride` apart: `best` and `place` [count] of vectors,
// best first. A value goes in behind all that are as large and moves the rest down, in every lane at once, without a
// branch, and without one place waiting for another: each looks at the value and at the place above alone. NaN counts
// as -inf, which is above nothing: a lane with too few others ends with -inf as its last.
template <class V>
void best_in_lanes(const typename V::Scalar* values, int64_t stride, int64_t rows, int64_t n, int64_t count,
                   typename V::Scalar* best, typename V::Scalar* place) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  for (int64_t j = 0; j < count; ++j) {
    store(best + j * W, V(-__builtin_inf()));
    store(place + j * W, V::zero());
  }
  for (int64_t e0 = 0; e0 < n; e0 += W) {
    V block[W];
    for (int64_t r = 0; r < W; ++r) block[r] = load<V>(values + (r < rows ? r : 0) * stride + e0);
    transpose(block);
    for (int64_t e = e0; e < n && e < e0 + W; ++e) {
      const V value = max(block[e - e0], V(-__builtin_inf())), index(static_cast<T>(e));
      V held = load<V>(best + (count - 1) * W), held_index = load<V>(place + (count - 1) * W);
      auto larger = value > held;
      for (int64_t j = count - 1; j > 0; --j) {
        const V above = load<V>(best + (j - 1) * W), above_index = load<V>(place + (j - 1) * W);
        const auto larger_yet = value > above;
        store(best + j * W, min(above, max(value, held)));
        store(place + j * W, select(larger_yet, above_index, select(larger, index, held_index)));
        held = above;
        held_index = above_index;
        larger = larger_yet;
      }
      store(best, max(value, held));
      store(place, select(larger, index, held_index));
    }
  }
}

// The best `count` of all n values, best first.
template <class T>
FFN_FN void choose_best(const T* values, int64_t n, int64_t count, Candidate<T>* best) {
  if (count <= kInsertMost) insert_best(values, 0, n, count, best, 0);
  else best_by_heap(values, n, count, best);
}

// The best `count` within the best groups. A group's score is its best, or the sum of its two best.
template <class T>
void choose_within_groups(const TopK& k, const T* choice, int64_t count, Candidate<T>* best, Candidate<T>* groups,
                          T* group_scores) {
  const int64_t width = (k.E - k.shared) / k.num_groups;
  for (int64_t g = 0; g < k.num_groups; ++g) {
    Candidate<T> two[2];
    const int64_t most = width < k.group_best ? width : k.group_best;
    const int64_t held = insert_best(choice, g * width, (g + 1) * width, most, two, 0);
    group_scores[g] = held == 2 ? two[0].value + two[1].value : two[0].value;
  }
  choose_best(group_scores, k.num_groups, k.top_groups, groups);
  for (int64_t i = 1; i < k.top_groups; ++i) {  // in the order of indices, so that ties are found in it
    const Candidate<T> moved = groups[i];
    int64_t at = i;
    for (; at > 0 && groups[at - 1].index > moved.index; --at) groups[at] = groups[at - 1];
    groups[at] = moved;
  }
  int64_t held = 0;
  for (int64_t i = 0; i < k.top_groups; ++i)
    held = insert_best(choice, groups[i].index * width, (groups[i].index + 1) * width, count, best, held);
}

// Scratch of whole vectors: scores of n values; what is behind them is overwritten.
template <class V>
FFN_FN void softmax_in_place(typename V::Scalar* z, int64_t n) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  for (int64_t i = n; i % W; ++i) z[i] = -__builtin_inf();
  V largest(-__builtin_inf());
  for (int64_t i = 0; i < n; i += W) largest = max(load<V>(z + i), largest);
  alignas(64) T lanes[W];
  store(lanes, largest);
  T most = lanes[0];
  for (int64_t i = 1; i < W; ++i) most = lanes[i] > most ? lanes[i] : most;
  V sums = V::zero();
  for (int64_t i = 0; i < n; i += W) {
    const V e = exp(load<V>(z + i) - V(most));
    store(z + i, e);
    sums = sums + e;
  }
  const V total(reduce_add(sums));
  for (int64_t i = 0; i < n; i += W) store(z + i, load<V>(z + i) / total);
}

template <class V>
FFN_FN void score_in_place(int score, typename V::Scalar* z, int64_t n) {
  dispatch_score(score, [&](auto tag) {
    using Score = typename decltype(tag)::Type;
    if constexpr (Score::of_row) {
      softmax_in_place<V>(z, n);
    } else {
      for (int64_t i = n; i % V::kLanes; ++i) z[i] = 0;
      for (int64_t i = 0; i < n; i += V::kLanes) store(z + i, Score::fwd(load<V>(z + i)));
    }
  });
}

// `s` holds the logits of the chosen experts, which are all that a score of_row sees. Writes the scores into s, and
// ds/dz into slope; that of softmax leaves out the part through its denominator.
template <class V>
FFN_FN void score_slopes(int score, typename V::Scalar* s, typename V::Scalar* slope, int64_t n) {
  dispatch_score(score, [&](auto tag) {
    using Score = typename decltype(tag)::Type;
    if constexpr (Score::of_row) {
      softmax_in_place<V>(s, n);
      for (int64_t i = 0; i < n; ++i) slope[i] = s[i];
    } else {
      for (int64_t i = n; i % V::kLanes; ++i) s[i] = 0;
      for (int64_t i = 0; i < n; i += V::kLanes) {
        const auto [value, ds] = Score::grad(load<V>(s + i));
        store(s + i, value);
        store(slope + i, ds);
      }
    }
  });
}

// The pieces of a worker's scratch, see top_k_scratch_bytes: W rows of scores and of what they are chosen by.
template <class V>
struct TopKScratch {
  using T = typename V::Scalar;
  int64_t stride;  // of rows
  T *scores, *choice, *best, *place, *chosen, *group_scores;
  Candidate<T>*candidates, *groups;

  FFN_FN TopKScratch(const TopK& k, void* scratch) {
    constexpr int64_t W = V::kLanes;
    stride = divide_up(k.E, W) * W;
    scores = static_cast<T*>(scratch);
    choice = scores + W * stride;
    best = choice + W * stride;
    place = best + k.K * W;
    chosen = place + k.K * W;
    group_scores = chosen + k.K + W;
    void* const behind = static_cast<char*>(scratch) + top_k_scratch_bytes(k);
    groups = static_cast<Candidate<T>*>(behind) - k.num_groups;
    candidates = groups - k.K;
  }
};

constexpr double kNormEpsilon = 1e-20;  // DeepSeek-V3's; without influence where weights are not all tiny

// Whether experts are chosen by scores. Scores grow with logits, and logits tell more experts apart, so logits choose
// unless something is added to the scores.
FFN_FN bool chosen_by_score(const TopK& k) { return (k.bias || k.num_groups > 1) && !k.by_logits; }
// Whether scores are made of the chosen experts' logits alone.
FFN_FN bool scored_after(const TopK& k) { return k.of_row ? k.by_logits : !chosen_by_score(k); }

// `scores` of one row (its logits, where scores are computed after the choice), and `choice`, by which it is made.
template <class V>
FFN_FN void score_row(const TopK& k, int64_t t, typename V::Scalar* scores, typename V::Scalar* choice) {
  using T = typename V::Scalar;
  const T* bias = static_cast<const T*>(k.bias);
  const bool by_score = chosen_by_score(k);
  read_row<V>(k.logits, t, 0, k.E, scores);
  if (!by_score) __builtin_memcpy(choice, scores, sizeof(T) * k.E);
  if (!scored_after(k)) score_in_place<V>(k.score, scores, k.E);
  if (by_score) __builtin_memcpy(choice, scores, sizeof(T) * k.E);
  if (bias)
    for (int64_t e = 0; e < k.E - k.shared; ++e) choice[e] += bias[e];
}

template <class V>
void top_k_as(const TopK& k, int64_t row_begin, int64_t row_end, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  const TopKScratch<V> at(k, scratch);
  const int64_t experts = k.E - k.shared, count = k.K - k.shared;
  const bool in_lanes = k.num_groups == 1 && count <= kInsertMost && !k.given;
  for (int64_t first = row_begin; first < row_end; first += W) {
    const int64_t rows = row_end - first < W ? row_end - first : W;
    for (int64_t r = 0; r < rows; ++r) score_row<V>(k, first + r, at.scores + r * at.stride, at.choice + r * at.stride);
    if (in_lanes) best_in_lanes<V>(at.choice, at.stride, rows, experts, count, at.best, at.place);
    for (int64_t r = 0; r < rows; ++r) {
      const T *scores = at.scores + r * at.stride, *choice = at.choice + r * at.stride;
      int64_t* ids = k.ids + (first + r) * k.K;
      if (k.given) {
        for (int64_t j = 0; j < k.K; ++j) ids[j] = k.given[(first + r) * k.K + j];
      } else if (in_lanes && at.best[(count - 1) * W + r] > -__builtin_inf()) {
        for (int64_t j = 0; j < count; ++j) ids[j] = static_cast<int64_t>(at.place[j * W + r]);
      } else {
        if (k.num_groups > 1) choose_within_groups(k, choice, count, at.candidates, at.groups, at.group_scores);
        else choose_best(choice, experts, count, at.candidates);
        for (int64_t j = 0; j < count; ++j) ids[j] = at.candidates[j].index;
      }
      for (int64_t j = 0; j < k.shared; ++j) ids[count + j] = experts + j;
      for (int64_t j = 0; j < k.K; ++j) at.chosen[j] = scores[ids[j]];
      if (scored_after(k)) score_in_place<V>(k.score, at.chosen, k.K);
      T factor = static_cast<T>(k.scale);
      if (k.renormalize) {
        T sum = 0;
        for (int64_t j = 0; j < k.K; ++j) sum += at.chosen[j];
        factor /= sum + static_cast<T>(kNormEpsilon);
      }
      for (int64_t j = 0; j < k.K; ++j) static_cast<T*>(k.weights)[(first + r) * k.K + j] = at.chosen[j] * factor;
    }
  }
}

// With w = scale * s / (sum of the chosen s): ds = scale * (dw - <dw, s> / sum) / sum; dz is ds through the softmax of
// all, of the chosen, or through the score of each. An expert may be chosen twice where the caller chooses.
template <class V>
void top_k_backward_as(const TopK& k, int64_t row_begin, int64_t row_end, void* scratch) {
  using T = typename V::Scalar;
  constexpr int64_t W = V::kLanes;
  const TopKScratch<V> at(k, scratch);
  T *const z = at.scores, *const dz = at.choice, *const ds = at.chosen, *const s = at.best, *const slope = at.place;
  const bool of_all = k.of_row && !k.by_logits;
  for (int64_t t = row_begin; t < row_end; ++t) {
    const int64_t* ids = k.ids + t * k.K;
    const T* dw = static_cast<const T*>(k.weights) + t * k.K;
    read_row<V>(k.logits, t, 0, k.E, z);
    if (of_all) score_in_place<V>(k.score, z, k.E);
    for (int64_t j = 0; j < k.K; ++j) s[j] = slope[j] = z[ids[j]];
    if (!of_all) score_slopes<V>(k.score, s, slope, k.K);
    T factor = static_cast<T>(k.scale), shift = 0;
    if (k.renormalize) {
      T sum = static_cast<T>(kNormEpsilon), dot = 0;
      for (int64_t j = 0; j < k.K; ++j) sum += s[j];
      for (int64_t j = 0; j < k.K; ++j) dot += dw[j] * (s[j] / sum);
      factor /= sum;
      shift = dot;
    }
    T common = 0;  // through the softmax's denominator; a renormalised weight does not depend on it
    for (int64_t j = 0; j < k.K; ++j) {
      ds[j] = factor * (dw[j] - shift);
      if (k.of_row && !k.renormalize) common += ds[j] * s[j];
    }
    for (int64_t e = 0; e < k.E; e += W) store(dz + e, V::zero());
    if (of_all && !k.renormalize) {
      for (int64_t j = 0; j < k.K; ++j) dz[ids[j]] += ds[j];
      for (int64_t e = 0; e < k.E; e += W) store(dz + e, load<V>(z + e) * (load<V>(dz + e) - V(common)));
    } else {  // the chosen only: 0 * s of another one would be NaN where its score is
      for (int64_t j = 0; j < k.K; ++j) dz[ids[j]] += slope[j] * (ds[j] - common);
    }
    dispatch_storage<T>(k.logits.dtype, [&](auto tag) {
      using S = typename decltype(tag)::Type;
      for (int64_t e = 0; e < k.E; e += W)
        store_part(static_cast<S*>(k.d_logits) + t * k.E + e, load<V>(dz + e), k.E - e < W ? k.E - e : W);
    });
  }
}
