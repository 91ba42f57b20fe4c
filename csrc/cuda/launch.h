// SPDX-License-Identifier: BSD-3-Clause
// One call of an operator on a GPU: its device and stream, new tensors, checked launches, and plain products by torch.
// Nothing here waits for the device.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../common/shapes.h"
#include "kernels.h"
#include "launch_kernel.h"

namespace ffn_ops::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline int32_t gpu_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.defined() && t.is_cuda(), name, ": expected a tensor on a CUDA device, got one on ", place_text(t));
  return gpu_index(t);
}

class Call {
 public:
  // `first`, the tensor that all others are checked against, sets device and dtype.
  Call(const Tensor& first, const char* name) : place_{gpu_of(first, name)}, guard_(place_.gpu) {
    // torch and this library each have a CUDA runtime, with a current device of its own.
    check_cuda(cudaSetDevice(place_.gpu), "cudaSetDevice");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place_.gpu, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(first.get(), &dtype_));
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Place place() const { return place_; }
  cudaStream_t stream() const { return stream_; }

  int capability_major() const {
    int major = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, place_.gpu), "cudaDeviceGetAttribute");
    return major;
  }

  // Dense, of the call's dtype where none is given. Memory comes from torch's allocator, which knows the stream, so it
  // may be freed before the kernels that use it have run.
  Tensor fresh(std::initializer_list<int64_t> sizes) const { return fresh(dtype_, sizes); }
  Tensor fresh(DType dtype, std::initializer_list<int64_t> sizes) const { return fresh(code(dtype), sizes); }
  Tensor fresh_indices(std::initializer_list<int64_t> sizes) const { return fresh(aoti_torch_dtype_int64(), sizes); }
  Tensor nothing() const { return fresh({0}); }

  // Memory for the rest of this call, null for none.
  void* workspace(int64_t bytes) {
    if (bytes <= 0) return nullptr;
    keep_.push_back(fresh(aoti_torch_dtype_uint8(), {bytes}));
    return keep_.back().mutable_data_ptr();
  }

  // Dense data of a tensor, null where there is none; a strided one is copied.
  const void* dense(const MaybeTensor& t) {
    if (!t) return nullptr;
    keep_.push_back(t->is_contiguous() ? *t : torch::stable::contiguous(*t));
    return keep_.back().const_data_ptr();
  }
  const int64_t* indices(const MaybeTensor& t) { return static_cast<const int64_t*>(dense(t)); }

  // Launches a kernel on the stream, unless it has no blocks.
  template <class... Parameters>
  void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              Parameters... arguments) const {
    if (blocks <= 0) return;
    STD_TORCH_CHECK(blocks <= INT32_MAX, name, ": ", blocks, " blocks are more than one launch can have");
    check_cuda(launch_kernel(kernel, blocks, threads, shared_bytes, stream_, arguments...), name);
  }

 private:
  static int32_t code(DType dtype) {
    switch (dtype) {
      case DType::kFloat64:
        return aoti_torch_dtype_float64();
      case DType::kFloat32:
        return aoti_torch_dtype_float32();
      case DType::kFloat16:
        return aoti_torch_dtype_float16();
      default:
        return aoti_torch_dtype_bfloat16();
    }
  }

  Tensor fresh(int32_t dtype, std::initializer_list<int64_t> sizes) const {
    std::vector<int64_t> strides(sizes.size());
    int64_t elements = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      strides[i] = elements;
      elements *= std::max<int64_t>(1, sizes.begin()[i]);
    }
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
                                                    dtype, aoti_torch_device_type_cuda(), place_.gpu, &handle));
    return Tensor(handle);
  }

  Place place_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int32_t dtype_ = 0;
  std::vector<Tensor> keep_;
};

// ---- tensors as kernels read them -----------------------------------------------------------------------------------

inline Matrix matrix(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.size(1) > 1 ? t.stride(1) : 1}; }

inline Matrix dense_matrix(const void* data, int64_t row_stride) { return {data, row_stride, 1}; }

inline const void* advance(const void* data, int64_t elements, DType dtype) {
  return data ? static_cast<const char*>(data) + elements * storage_size(dtype) : nullptr;
}

inline void* advance(void* data, int64_t elements, DType dtype) {
  return data ? static_cast<char*>(data) + elements * storage_size(dtype) : nullptr;
}

// ---- plain products by torch: its cuBLAS handle, workspace and settings ---------------------------------------------

// A view of [rows, cols] from an element on.
inline Tensor view(const Tensor& t, int64_t offset, int64_t rows, int64_t cols, int64_t row_stride,
                   int64_t col_stride) {
  const std::array<int64_t, 2> sizes{rows, cols}, strides{row_stride, col_stride};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& t) { return view(t, 0, t.size(1), t.size(0), t.stride(1), t.stride(0)); }

// Every step-th row from `begin` on.
inline Tensor rows_of(const Tensor& t, int64_t begin, int64_t rows, int64_t step = 1) {
  return view(t, begin * t.stride(0), rows, t.size(1), step * t.stride(0), t.stride(1));
}

// Of a vector.
inline Tensor elements_of(const Tensor& t, int64_t begin, int64_t count, int64_t step = 1) {
  const int64_t stride = step * t.stride(0);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 1, &count, &stride, begin * t.stride(0), &handle));
  return Tensor(handle);
}

// Calls one of torch's operators that write their last argument.
template <class... Arguments>
void call_torch_out(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is a new reference, which this drops
}

// out = a b, into a dense tensor.
inline void product(const Tensor& a, const Tensor& b, const Tensor& out) { call_torch_out("aten::mm", a, b, out); }

// out = a b + add. linear.out is addmm with both factors 1, which the stable interface cannot pass as they are Scalars;
// `add` is a bias [cols], or [rows, cols], where it may be `out` itself.
inline void product_plus(const Tensor& a, const Tensor& b, const Tensor& add, const Tensor& out) {
  call_torch_out("aten::linear", a, transposed(b), MaybeTensor(add), out);
}

// out = x w^T + bias: a Linear layer.
inline void linear(const Tensor& x, const Tensor& w, const MaybeTensor& bias, const Tensor& out) {
  if (bias) product_plus(x, transposed(w), *bias, out);
  else product(x, transposed(w), out);
}

}  // namespace ffn_ops::cuda
