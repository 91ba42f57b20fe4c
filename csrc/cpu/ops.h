// SPDX-License-Identifier: BSD-3-Clause
// Shared code of the operators: tensors as the kernels read them, new outputs, biases, sums over tokens.
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../common/shapes.h"
#include "parallel.h"

namespace ffn_ops {

// The table of the instruction set in use.
const KernelTable& kernels();

inline int64_t threads() { return torch::stable::get_num_threads(); }

inline Matrix matrix(const Tensor& t, DType dtype, int64_t from_row = 0) {
  Matrix m;
  m.row_stride = t.stride(0);
  m.col_stride = t.size(1) > 1 ? t.stride(1) : 1;
  m.dtype = dtype;
  m.data = static_cast<const char*>(t.const_data_ptr()) + from_row * m.row_stride * storage_size(dtype);
  return m;
}

inline Matrix dense(const void* data, int64_t row_stride, DType dtype) { return {data, row_stride, 1, dtype, nullptr}; }

// Elements from row to row of a matrix in the workspace. Rows that lie whole pages apart share a few places of L1, and
// a load waits for an earlier store to the same place of another page: such rows lie two cache lines further.
inline int64_t apart(int64_t cols, DType dtype) {
  const int64_t size = storage_size(dtype);
  return cols * size % 1024 == 0 ? cols + 128 / size : cols;
}

inline Operand operand(Matrix m, bool k_along_rows) {
  // If columns lie closer than rows, as in a transposed weight, read the transpose.
  if (m.row_stride > 0 && m.row_stride < m.col_stride && !m.rows) {
    std::swap(m.row_stride, m.col_stride);
    k_along_rows = !k_along_rows;
  }
  Operand op;
  op.matrix = m;
  op.k_along_rows = k_along_rows;
  return op;
}

inline Operand lanes_are_rows(const Matrix& m) { return operand(m, false); }    // element (lane, k) is m(lane, k)
inline Operand lanes_are_columns(const Matrix& m) { return operand(m, true); }  // element (lane, k) is m(k, lane)

// Whether an output of so many bytes is stored past the caches: its first lines have left the last level, 32 MiB for a
// core of today's servers, before its last is written; so no line is read from memory only to be overwritten, and what
// the cores read stays in the caches.
inline bool past_caches(int64_t bytes) { return bytes > int64_t{32} << 20; }

using Strides = std::array<int64_t, 3>;  // of an output: no operator has one of more dimensions
inline Strides dense_strides(std::initializer_list<int64_t> sizes) {
  assert(sizes.size() <= std::tuple_size_v<Strides>);
  Strides strides{};
  int64_t elements = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = elements;
    elements *= std::max<int64_t>(1, sizes.begin()[i]);
  }
  return strides;
}

inline int32_t dtype_code(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// A dense tensor on the CPU, in torch's own memory, as any other tensor: it can be resized and shared. It calls the
// C interface directly, because torch::stable's own functions look up their operator by name at each call, which would
// slow down small calls.
inline Tensor fresh(int32_t dtype, std::initializer_list<int64_t> sizes) {
  size_t bytes = aoti_torch_dtype_element_size(dtype);
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  AtenTensorHandle handle = nullptr;
  const auto what = [&] {
    std::string shape;
    for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    return "a tensor of shape [" + shape + "]";
  };
  allocate_or_fail(bytes, what, [&] {
    return !aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), dense_strides(sizes).data(),
                                     dtype, aoti_torch_device_type_cpu(), 0, &handle);
  });
  Tensor t(handle);
  advise_huge_pages(t.mutable_data_ptr(), bytes);
  return t;
}

inline Tensor fresh(const Tensor& like, std::initializer_list<int64_t> sizes) { return fresh(dtype_code(like), sizes); }

inline Tensor fresh_arithmetic(DType storage, std::initializer_list<int64_t> sizes) {
  return fresh(storage == DType::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), sizes);
}

inline Tensor fresh_indices(std::initializer_list<int64_t> sizes) { return fresh(aoti_torch_dtype_int64(), sizes); }

inline Tensor nothing(const Tensor& like) { return fresh(like, {0}); }

// Dense data of an optional tensor, null where there is none. `keep` holds the copy of a strided one.
inline const void* dense_data(const std::optional<Tensor>& t, std::vector<Tensor>& keep) {
  if (!t) return nullptr;
  keep.push_back(t->is_contiguous() ? *t : torch::stable::contiguous(*t));
  return keep.back().const_data_ptr();
}

inline const void* advance(const void* data, int64_t elements, DType dtype) {
  return data ? static_cast<const char*>(data) + elements * storage_size(dtype) : nullptr;
}

inline void* advance(void* data, int64_t elements, DType dtype) {
  return data ? static_cast<char*>(data) + elements * storage_size(dtype) : nullptr;
}

inline void add_gated_act_backward(Steps& steps, const GatedAct& a) {
  constexpr int64_t kRows = 16;
  const KernelTable& table = kernels();
  steps.pass(divide_up(a.rows, kRows), [=, &table](int64_t task, int64_t) {
    table.gated_act_backward(a, {task * kRows, std::min(a.rows, (task + 1) * kRows), 0, a.cols});
  });
}

// Columns of a task of column sums: long pieces of rows, as many as two for each thread want.
inline int64_t columns_of_task(int64_t cols) {
  return std::clamp<int64_t>(divide_up(divide_up(cols, 2 * threads()), 64) * 64, 64, 1024);
}

inline void add_column_sum(Steps& steps, const Matrix& m, int64_t rows, int64_t cols, void* out) {
  const int64_t step = columns_of_task(cols);
  const KernelTable& table = kernels();
  steps.pass(divide_up(cols, step), [=, &table](int64_t task, int64_t) {
    table.column_sum({rows, cols, m, nullptr, out}, task * step, std::min(cols, (task + 1) * step));
  });
}

}  // namespace ffn_ops
