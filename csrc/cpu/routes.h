// SPDX-License-Identifier: BSD-3-Clause
// Shared code of the operators on routed rows: index tensors, checked so that no kernel reads out of range, and rows
// per expert.
#pragma once

#include <cstring>
#include <vector>

#include "ops.h"

namespace ffn_ops {

// Rows [begin, end) belong to an expert.
struct Segment {
  int64_t expert, begin, end;
  int64_t rows() const { return end - begin; }
};

// A dense int64 tensor of `size` elements that lie in [0, limit].
inline const int64_t* check_indices(const Tensor& t, const char* name, int64_t size, int64_t limit,
                                    std::vector<Tensor>& keep) {
  check_indices_shape(t, name, {size});
  const auto* data = static_cast<const int64_t*>(dense_data(t, keep));
  bool inside = true;
  for (int64_t i = 0; i < t.size(0); ++i) inside = inside && data[i] >= 0 && data[i] <= limit;
  STD_TORCH_CHECK(inside, name, ": expected indices between 0 and ", limit, ", got one outside");
  return data;
}

// Offsets [count + 1] that begin at 0, never fall and end at most at `rows`.
inline const int64_t* check_offsets(const Tensor& t, const char* name, int64_t count, int64_t rows,
                                    std::vector<Tensor>& keep) {
  const int64_t* data = check_indices(t, name, count + 1, rows, keep);
  bool rising = data[0] == 0;
  for (int64_t i = 0; i < count; ++i) rising = rising && data[i] <= data[i + 1];
  STD_TORCH_CHECK(rising, name, ": expected offsets that begin at 0 and never fall");
  return data;
}

// Checks that `row` lists each kept row once, under its own token. Otherwise forward and backward would use different
// routings, and neither the intended one.
inline void check_agreement(const Routes& routes) {
  std::vector<char> seen(static_cast<size_t>(routes.kept));
  int64_t found = 0;
  bool agree = true;
  for (int64_t t = 0; t < routes.tokens; ++t) {
    for (int64_t p = routes.slot_offsets[t]; p < routes.slot_offsets[t + 1]; ++p) {
      const int64_t r = routes.row[p];
      if (r >= routes.kept) continue;
      char& before = seen[static_cast<size_t>(r)];
      agree = agree && routes.token[r] == t && !before;
      before = 1;
      ++found;
    }
  }
  STD_TORCH_CHECK(agree && found == routes.kept, "token, row: expected a routing that lists each of its ", routes.kept,
                  " rows once, in row and under the token that stands in token, got one that contradicts itself");
}

// The experts that have rows.
inline std::vector<Segment> segments(const int64_t* offsets, int64_t E) {
  std::vector<Segment> result;
  for (int64_t e = 0; e < E; ++e)
    if (offsets[e] < offsets[e + 1]) result.push_back({e, offsets[e], offsets[e + 1]});
  return result;
}

// Expert e of a stacked weight [E, rows, columns].
inline Matrix expert_matrix(const Tensor& t, DType dtype, int64_t e, int64_t from_row = 0, int64_t from_col = 0) {
  Matrix m;
  m.row_stride = t.stride(1);
  m.col_stride = t.size(2) > 1 ? t.stride(2) : 1;
  m.dtype = dtype;
  m.data = static_cast<const char*>(t.const_data_ptr()) +
           (e * t.stride(0) + from_row * m.row_stride + from_col * m.col_stride) * storage_size(dtype);
  return m;
}

inline void zero_rows(Steps& steps, void* data, int64_t begin, int64_t end, int64_t row_bytes) {
  if (begin >= end || row_bytes == 0) return;
  const int64_t rows = std::max<int64_t>(1, (int64_t{1} << 18) / row_bytes);
  steps.pass(divide_up(end - begin, rows), [=](int64_t task, int64_t) {
    const int64_t first = begin + task * rows;
    std::memset(static_cast<char*>(data) + first * row_bytes, 0,
                static_cast<size_t>((std::min(end, first + rows) - first) * row_bytes));
  });
}

// Tokens or rows of a task that moves `cols` columns of them.
inline int64_t rows_of_task(int64_t cols) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols)); }

inline void add_combine(Steps& steps, const MoveRows& m) {
  const int64_t tokens = rows_of_task(m.cols);
  const KernelTable& table = kernels();
  steps.pass(divide_up(m.routes.tokens, tokens), [=, &table](int64_t task, int64_t) {
    table.combine_rows(m, task * tokens, std::min(m.routes.tokens, (task + 1) * tokens));
  });
}

}  // namespace ffn_ops
