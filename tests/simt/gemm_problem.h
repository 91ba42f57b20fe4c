// SPDX-License-Identifier: BSD-3-Clause
// One grouped product for tests/simt/gemm_test.cpp: its operands, the kernels' results, and the same in double from
// naive loops.
#pragma once

#include <array>

#include "gemm_case.h"

namespace gemm_test {

template <class S>
class Problem {
 public:
  using T = ComputeOf<S>;

  explicit Problem(const Case& c) : c_(c), random_(c.seed) {
    E_ = int64_t(c.rows.size());
    offsets_ = {0};
    for (const int64_t r : c.rows) offsets_.push_back(offsets_.back() + r);
    kept_ = offsets_.back();
    R_ = kept_ + c.dropped;
    job_.kind = c.kind;
    job_.E = E_;
    job_.R = R_;
    offset_memory_ = std::make_unique<simt::Buffer<int64_t>>(offsets_);
    job_.offsets = c.dense ? nullptr : offset_memory_->data();
    job_.M = c.M;
    job_.N = c.N;
    job_.K = c.K;
    job_.gated = c.gated;
    job_.dtype = Codec<S>::kDType;
    if (c.kind == Kind::kRows) {
      a_ = make_rows(c.K, c.a, c.gather_a, job_.a, false);
      b_ = make_weights(job_.b);
      if (c.gated) b_up_ = make_weights(job_.b_up);
    } else {
      a_ = make_rows(c.M, c.a, c.gather_a, job_.a, true);
      b_ = make_rows(c.N, c.b, c.gather_b, job_.b, true);
    }
    make_epilogue();
  }

  // Whether there is an instance for these operands.
  bool takes(const Way& way) const {
    if (!way.hopper) return true;
    return sizeof(S) == 2 && (way.shape == GemmShape::kShort || plan_gemm(job_, true).vector);
  }

  // Runs the kernels in one way. The outputs are as never written before.
  GemmPlan run(const Way& way, uint64_t seed = 1) {
    const GemmPlan plan = plan_gemm(job_, way.hopper, &way.shape);
    for (auto* out : {&out_, &out_up_, &h_, &gate_out_, &up_out_})
      if (*out) std::memset((*out)->memory.data(), 0xff, size_t((*out)->memory.size()) * sizeof(S));
    for (auto* out : {&dots_, &wide_out_})
      if (*out) std::memset((*out)->memory.data(), 0xff, size_t((*out)->memory.size()) * sizeof(T));
    simt::Buffer<char> workspace(row_table_offset(E_) + plan.table_entries * int64_t(sizeof(RowTile)));
    auto* table = plan.table_entries ? reinterpret_cast<RowTile*>(workspace.data() + row_table_offset(E_)) : nullptr;
    if (table)
      simt::launch({1, kTableThreads, kTableSharedBytes, seed}, &expert_tiles_kernel<>, job_.offsets, E_, R_,
                   table_tile_rows(job_, plan), plan.table_entries, reinterpret_cast<int64_t*>(workspace.data()),
                   table);
    if (plan.blocks == 0) return plan;
    dispatch_gemm<S, true>(job_, plan, [&](auto tag) {
      simt::launch({plan.blocks, kGemmThreads, plan.shared_bytes, seed},
                   &grouped_gemm_kernel<typename decltype(tag)::Type>, job_, plan, table);
    });
    return plan;
  }

  // One expert: of its rows, only this one is computed from now on.
  void keep_row(int64_t r) {
    (*offset_memory_)[0] = r;
    (*offset_memory_)[1] = r + 1;
  }
  // Everything that is written for a row.
  std::vector<double> row(int64_t r) {
    std::vector<double> all;
    for (auto* out : {&out_, &out_up_, &h_, &gate_out_, &up_out_})
      for (int64_t n = 0; *out && n < c_.N; ++n) all.push_back((*out)->value(r, n));
    for (int64_t p = 0; dots_ && p < dots_->cols; ++p) all.push_back(dots_->value(r, p));
    return all;
  }
  std::vector<S> bits() {
    std::vector<S> all;
    for (auto* out : {&out_, &out_up_, &h_, &gate_out_, &up_out_})
      if (*out) all.insert(all.end(), (*out)->memory.begin(), (*out)->memory.end());
    return all;
  }
  std::vector<T> sums() const {
    return dots_ ? std::vector<T>(dots_->memory.begin(), dots_->memory.end()) : std::vector<T>();
  }

  // Every element of every output against the reference.
  void check(const char* how) {
    how_ = how;
    if (c_.kind == Kind::kOuter) return check_outer();
    for (int64_t r = 0; r < R_; ++r)
      for (int64_t n = 0; n < c_.N; ++n) check_element(r, n);
    if (dots_)
      for (int64_t r = 0; r < R_; ++r)
        for (int64_t p = 0; p < dots_->cols; ++p) check_dot(r, p);
    untouched();
  }

 private:
  struct Sum {
    double value = 0, magnitude = 0;
    void add(double product) { value += product, magnitude += std::abs(product); }
  };

  double uniform() { return double(random_.next() >> 11) * 0x1p-52 - 1; }
  // Routed rows, in order or gathered from a matrix with more rows; rows that no expert has stay NaN.
  std::unique_ptr<Stored<S>> make_rows(int64_t cols, Layout layout, bool gather, Operand& o, bool rows_are_k) {
    const int64_t sources = gather ? R_ + 3 : R_;
    auto m = std::make_unique<Stored<S>>(sources, cols, layout);
    std::vector<int64_t> index(static_cast<size_t>(R_));
    for (int64_t r = 0; r < R_; ++r) {
      index[size_t(r)] = gather ? int64_t(random_.below(size_t(sources))) : r;
      if (r >= kept_) {
        index[size_t(r)] = gather && c_.wrong_indices ? (r % 2 ? -7 : int64_t{1} << 60) : index[size_t(r)];
        continue;
      }
      if (gather && c_.wrong_indices && random_.below(4) == 0) {
        index[size_t(r)] = random_.coin() ? -1 - int64_t(random_.below(1000)) : sources + int64_t(random_.below(1000));
        continue;
      }
      for (int64_t i = 0; i < cols; ++i) m->set(index[size_t(r)], i, uniform());
    }
    o.data = m->data();
    o.lane_stride = rows_are_k ? m->col_stride : m->row_stride;
    o.k_stride = rows_are_k ? m->row_stride : m->col_stride;
    if (gather) {
      gathers_.push_back(std::make_unique<simt::Buffer<int64_t>>(index));
      o.gather = gathers_.back()->data();
      o.gather_limit = sources;
    }
    return m;
  }

  // [E, N, K]; experts without rows are NaN.
  std::unique_ptr<Stored<S>> make_weights(Operand& o) {
    const bool lanes_first = c_.b == Layout::kTransposed;
    auto m = std::make_unique<Stored<S>>(E_ * (lanes_first ? c_.K : c_.N), lanes_first ? c_.N : c_.K,
                                         lanes_first ? Layout::kAligned : c_.b);
    o.data = m->data();
    o.lane_stride = lanes_first ? m->col_stride : m->row_stride;
    o.k_stride = lanes_first ? m->row_stride : m->col_stride;
    o.expert_stride = (lanes_first ? c_.K : c_.N) * m->row_stride;
    for (int64_t e = 0; e < E_; ++e)
      for (int64_t i = 0; c_.rows[size_t(e)] && i < c_.N * c_.K; ++i)
        m->data()[e * o.expert_stride + i / c_.K * o.lane_stride + i % c_.K * o.k_stride] =
            Codec<S>::encode(T(uniform()));
    return m;
  }

  std::unique_ptr<Stored<S>> make_out(int64_t rows, int64_t cols) {
    return std::make_unique<Stored<S>>(rows, cols, c_.odd_out ? Layout::kOdd : Layout::kAligned);
  }
  std::unique_ptr<Stored<S>> make_filled(int64_t rows, int64_t cols, int64_t valid) {
    auto m = make_out(rows, cols);
    for (int64_t r = 0; r < valid; ++r)
      for (int64_t n = 0; n < cols; ++n) m->set(r, n, 2 * uniform());
    return m;
  }

  void make_epilogue() {
    Epilogue& e = job_.epilogue;
    e.kind = c_.finish;
    const int64_t rows = c_.kind == Kind::kOuter ? E_ * c_.M : R_;
    out_ = make_out(rows, c_.interleaved ? 2 * c_.N : c_.N);
    e.out = c_.act ? out_->data() : nullptr;
    e.out_stride = out_->row_stride;
    if (c_.bias) {
      bias_ = make_filled(E_, c_.N, E_);
      e.bias = bias_->data();
      e.bias_stride = bias_->row_stride;
      if (c_.gated) bias_up_ = make_filled(E_, c_.N, E_);
      if (c_.gated) e.bias_up = bias_up_->data();
    }
    if (c_.unrounded) {
      wide_out_ = std::make_unique<Stored<T>>(R_, c_.N, Layout::kOdd);
      e.unrounded = true;
      e.scale = 0.75;
      e.out = wide_out_->data();
      e.out_stride = wide_out_->row_stride;
    }
    for (auto [m, data] : {std::pair{&added_, &e.added}, {&added_up_, &e.added_up}}) {
      if (!c_.added || (m == &added_up_ && !c_.gated)) continue;
      *m = std::make_unique<Stored<T>>(R_, c_.N, Layout::kOdd);
      for (int64_t r = 0; r < kept_; ++r)
        for (int64_t n = 0; n < c_.N; ++n) (*m)->set(r, n, uniform());
      *data = (*m)->data();
      e.added_stride = (*m)->row_stride;
    }
    e.activation = c_.activation;
    for (double& own : e.own) own = 1.5;
    if (c_.limited && !has_up()) e.limit = 0.75, e.up_shift = 0.5;
    e.interleaved = c_.interleaved;
    if (c_.finish == Finish::kActivate && c_.save) {
      gate_out_ = make_out(R_, c_.N);
      e.gate = gate_out_->data();
      e.pre_stride = gate_out_->row_stride;
      if (c_.gated) up_out_ = make_out(R_, c_.N);
      if (c_.gated) e.up = up_out_->data();
    }
    if (c_.finish != Finish::kActivateGrad) return;
    gate_ = make_filled(R_, c_.N, kept_);
    e.gate = gate_->data();
    e.pre_stride = gate_->row_stride;
    if (c_.save) {  // gated
      up_ = make_filled(R_, c_.N, kept_);
      e.up = up_->data();
      if (!c_.interleaved) out_up_ = make_out(R_, c_.N);
      if (!c_.interleaved) e.out_up = out_up_->data();
    }
    if (c_.h) h_ = make_out(R_, c_.N), e.h = h_->data();
    if (!c_.weighted) return;
    weight_ = std::make_unique<Stored<T>>(1, R_, Layout::kOdd);
    for (int64_t r = 0; r < kept_; ++r) weight_->set(0, r, uniform());
    e.row_weight = weight_->data();
    dots_ = std::make_unique<Stored<T>>(R_, row_dots_parts(job_.dtype, c_.N), Layout::kOdd);
    e.row_dots = dots_->data();
    e.row_dots_stride = dots_->row_stride;
  }

  // ---- the reference ----

  int64_t expert(int64_t r) const {
    for (int64_t e = 0; e < E_; ++e)
      if (r < offsets_[size_t(e) + 1]) return e;
    return E_;
  }
  // Element (lane, k) as the descriptor says; rows with an index outside count as zeros.
  static double read(const Operand& o, int64_t e, int64_t lane, int64_t k, bool rows_are_k) {
    int64_t& row = rows_are_k ? k : lane;
    if (o.gather) row = o.gather[row];
    if (o.gather && (row < 0 || row >= o.gather_limit)) return 0;
    const auto* data = static_cast<const S*>(o.data);
    return double(Codec<S>::decode(data[e * o.expert_stride + lane * o.lane_stride + k * o.k_stride]));
  }
  Sum product(const Operand& b, int64_t r, int64_t e, int64_t n) const {
    Sum sum;
    const double scale = job_.epilogue.scale;
    for (int64_t k = 0; k < c_.K; ++k) sum.add(scale * read(job_.a, 0, r, k, false) * read(b, e, n, k, false));
    const auto& added = &b == &job_.b_up ? added_up_ : added_;
    if (added) sum.add(added->value(r, n));
    return sum;
  }

  // Sums of `terms` products in T, and the rounding to X.
  template <class X>
  void close(X got, double want, double magnitude, double terms, const char* what, int64_t r, int64_t n) {
    const double unit = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;
    const double storage = sizeof(X) == 8            ? 0x1p-53
                           : sizeof(X) == 4          ? 0x1p-24
                           : std::is_same_v<X, Half> ? 0x1p-11
                                                     : 0x1p-8;
    const double tiny = std::is_same_v<X, Half> ? 0x1p-24 : 0;
    const double limit = (terms + 12) * unit * magnitude + storage * (std::abs(want) + magnitude * terms * unit) + tiny;
    const double error = std::abs(double(Codec<X>::decode(got)) - want);
    simt::check(error <= limit, "%s, %s, %s: %s[%lld, %lld] is %.9g, expected %.9g within %.3g", c_.reason,
                kDTypeNames[int(job_.dtype)], how_, what, (long long)r, (long long)n, double(Codec<X>::decode(got)),
                want, limit);
  }
  template <class X>
  void zero(X got, const char* what, int64_t r, int64_t n) {
    simt::check(Codec<X>::decode(got) == 0, "%s, %s, %s: %s[%lld, %lld] is %g, expected 0", c_.reason,
                kDTypeNames[int(job_.dtype)], how_, what, (long long)r, (long long)n, double(Codec<X>::decode(got)));
  }

  Grad<Lane<double>> act_at(double z) const {
    Grad<Lane<double>> g{0, 0};
    dispatch_activation(c_.activation, [&](auto tag) {
      const double limit = job_.epilogue.limit;
      g = decltype(tag)::Type::grad(Lane<double>(std::min(z, limit)), own().data());
      if (z >= limit) g.slope = 0;
    });
    return g;
  }
  Grad<Lane<double>> up_at(double u) const {
    const Epilogue& e = job_.epilogue;
    Grad<Lane<double>> h{std::max(-e.limit, std::min(e.limit, u)) + e.up_shift, std::abs(u) < e.limit ? 1 : 0};
    dispatch_activation(c_.activation, [&](auto tag) {
      using Act = typename decltype(tag)::Type;
      if constexpr (Act::has_up) h = Act::up_grad(Lane<double>(u), own().data());
    });
    return h;
  }
  std::array<Lane<double>, kMostOwnParams> own() const {
    std::array<Lane<double>, kMostOwnParams> own{};
    for (size_t i = 0; i < own.size(); ++i) own[i] = job_.epilogue.own[i];
    return own;
  }
  bool has_up() const {
    bool has = false;
    dispatch_activation(c_.activation, [&](auto tag) { has = decltype(tag)::Type::has_up; });
    return has;
  }

  void check_element(int64_t r, int64_t n) {
    const int64_t e = expert(r);
    if (e == E_) {
      if (wide_out_) return zero(wide_out_->at(r, n), "out", r, n);
      for (auto [m, name] :
           {std::pair{&out_, "out"}, {&out_up_, "out_up"}, {&h_, "h"}, {&gate_out_, "gate"}, {&up_out_, "up"}})
        if (*m && (m != &out_ || c_.act)) zero((*m)->at(r, n), name, r, n);
      if (c_.interleaved) zero(out_->at(r, c_.N + n), "out", r, c_.N + n);
      return;
    }
    const double terms = double(c_.K);
    Sum acc = product(job_.b, r, e, n);
    if (c_.finish == Finish::kActivateGrad) return check_grad(acc, r, n);
    if (bias_) acc.add(bias_->value(e, n));
    if (wide_out_) return close(wide_out_->at(r, n), acc.value, acc.magnitude, terms, "out", r, n);
    if (c_.finish == Finish::kStore) return close(out_->at(r, n), acc.value, acc.magnitude, terms, "out", r, n);
    if (gate_out_) close(gate_out_->at(r, n), acc.value, acc.magnitude, terms, "gate", r, n);
    double value = act_at(acc.value).value.value, magnitude = 2 * (acc.magnitude + 1) * (acc.magnitude + 1);
    if (c_.gated) {
      Sum up = product(job_.b_up, r, e, n);
      if (bias_up_) up.add(bias_up_->value(e, n));
      if (up_out_) close(up_out_->at(r, n), up.value, up.magnitude, terms, "up", r, n);
      value *= up_at(up.value).value.value;
      magnitude *= up.magnitude + 1;
    }
    if (c_.act) close(out_->at(r, n), value, magnitude, terms, "out", r, n);
  }

  // Slopes and values of act at |z| <= 2 are below 5.
  void check_grad(const Sum& acc, int64_t r, int64_t n) {
    const double terms = double(c_.K), weight = weight_ ? double(weight_->at(0, r)) : 1;
    const auto act = act_at(gate_->value(r, n));
    const double raw_up = up_ ? up_->value(r, n) : 1, up = up_ ? up_at(raw_up).value.value : 1, d = weight * acc.value;
    const double d_up = d * act.value.value * up_at(raw_up).slope.value;
    const int64_t at = c_.interleaved ? 2 * n : n;
    close(out_->at(r, at), d * act.slope.value * up, 10 * acc.magnitude, terms, "out", r, at);
    if (up_) {
      const S got = c_.interleaved ? out_->at(r, at + 1) : out_up_->at(r, n);
      close(got, d_up, 10 * acc.magnitude, terms, "out_up", r, n);
    }
    if (h_) close(h_->at(r, n), weight * act.value.value * up, 10, 1, "h", r, n);
  }

  void check_dot(int64_t r, int64_t part) {
    if (expert(r) == E_) return zero(dots_->at(r, part), "row_dots", r, part);
    const int64_t width = row_dots_cols(job_.dtype);
    Sum dot;
    double magnitude = 0;
    for (int64_t n = part * width; n < c_.N && n < (part + 1) * width; ++n) {
      const Sum acc = product(job_.b, r, expert(r), n);
      dot.add(acc.value * act_at(gate_->value(r, n)).value.value * (up_ ? up_at(up_->value(r, n)).value.value : 1));
      magnitude += 10 * acc.magnitude;
    }
    close(dots_->at(r, part), dot.value, magnitude, double(c_.K + width), "row_dots", r, part);
  }

  void check_outer() {
    for (int64_t e = 0; e < E_; ++e)
      for (int64_t m = 0; m < c_.M; ++m)
        for (int64_t n = 0; n < c_.N; ++n) {
          Sum sum;
          for (int64_t r = offsets_[size_t(e)]; r < offsets_[size_t(e) + 1]; ++r)
            sum.add(read(job_.a, e, m, r, true) * read(job_.b, e, n, r, true));
          const double terms = double(c_.rows[size_t(e)]);
          close(out_->at(e * c_.M + m, n), sum.value, sum.magnitude, terms, "out", e * c_.M + m, n);
        }
    untouched();
  }

  // Between rows nothing is written.
  void untouched() {
    if (!out_ || c_.odd_out || wide_out_) return;
    const S poison = Stored<S>(1, 1, Layout::kAligned).at(0, 0);
    for (int64_t r = 0; r + 1 < out_->rows; ++r)
      for (int64_t n = out_->cols; n < out_->row_stride; ++n)
        simt::check(std::memcmp(&out_->at(r, n), &poison, sizeof(S)) == 0, "%s: written behind row %lld", c_.reason,
                    (long long)r);
  }

  const Case c_;
  simt::Random random_;
  int64_t E_, R_, kept_;
  std::vector<int64_t> offsets_;
  std::unique_ptr<simt::Buffer<int64_t>> offset_memory_;
  std::vector<std::unique_ptr<simt::Buffer<int64_t>>> gathers_;
  GroupedGemm job_;
  std::unique_ptr<Stored<S>> a_, b_, b_up_, bias_, bias_up_, gate_, up_;
  std::unique_ptr<Stored<S>> out_, out_up_, h_, gate_out_, up_out_;
  std::unique_ptr<Stored<T>> dots_, weight_, added_, added_up_, wide_out_;
  const char* how_ = "";
};

}  // namespace gemm_test
