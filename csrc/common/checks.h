// SPDX-License-Identifier: BSD-3-Clause
// Checks before any work, on every device: dtype, device, rank and extents of each tensor. Messages give the name, the
// expected and the actual value. The Python functions check first and raise ValueError or TypeError; these checks guard
// torch.ops. The checks of whole operators are in shapes.h.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "activation_names.h"
#include "gate.h"

namespace ffn_ops {

using torch::stable::Tensor;

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// The name that torch has in Python.
inline const char* scalar_type_text(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::UInt64:
      return "uint64";
    default:  // ComplexHalf, Float8_e4m3fn and others
      return torch::headeronly::toString(type);
  }
}

inline DType storage_dtype(const Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype float64, float32, float16 or bfloat16, got ",
                      scalar_type_text(t.scalar_type()));
  }
}

// The device of a tensor on a GPU, by the C interface, which is the same in every torch.
inline int32_t gpu_index(const Tensor& t) {
  int32_t index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  return index;
}

// The device of all tensors of a call: a GPU, or the CPU.
struct Place {
  int32_t gpu = -1;
  bool holds(const Tensor& t) const { return gpu < 0 ? t.is_cpu() : t.is_cuda() && gpu_index(t) == gpu; }
  std::string text() const { return gpu < 0 ? "the CPU" : "cuda:" + std::to_string(gpu); }
};

inline std::string place_text(const Tensor& t) {
  if (t.is_cpu()) return "the CPU";
  return t.is_cuda() ? "cuda:" + std::to_string(gpu_index(t)) : "another device";
}

// Checks for a defined, strided tensor with the device and dtype of the call and these extents (-1: any).
inline void check_tensor(const Tensor& t, const char* name, DType dtype, const std::vector<int64_t>& sizes,
                         Place place = {}) {
  STD_TORCH_CHECK(t.defined(), name, ": expected a tensor, got none");
  STD_TORCH_CHECK(place.holds(t), name, ": expected a tensor on ", place.text(), ", got one on ", place_text(t));
  STD_TORCH_CHECK(storage_dtype(t, name) == dtype, name, ": expected dtype ", kDTypeNames[static_cast<int>(dtype)],
                  ", got ", kDTypeNames[static_cast<int>(storage_dtype(t, name))]);
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  std::string expected = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    expected += (i ? ", " : "") + (sizes[i] < 0 ? std::string("*") : std::to_string(sizes[i]));
    fits = fits && (sizes[i] < 0 || t.size(static_cast<int64_t>(i)) == sizes[i]);
  }
  STD_TORCH_CHECK(fits, name, ": expected shape ", expected, "], got ", shape_text(t));
}

// Checks for indices [size] (-1: any), without their values.
inline void check_index_vector(const Tensor& t, const char* name, int64_t size, Place place = {}) {
  STD_TORCH_CHECK(
      t.defined() && place.holds(t) && t.scalar_type() == torch::headeronly::ScalarType::Long && t.dim() == 1, name,
      ": expected an int64 vector on ", place.text(), ", got one of dtype ", scalar_type_text(t.scalar_type()),
      " and shape ", shape_text(t), " on ", place_text(t));
  STD_TORCH_CHECK(size < 0 || t.size(0) == size, name, ": expected shape [", size, "], got ", shape_text(t));
}

inline void check_needs(const std::vector<bool>& needs, size_t count) {
  STD_TORCH_CHECK(needs.size() == count, "needs: expected ", count, " flags, got ", needs.size());
}

inline int check_activation(const std::string& name) {
  const int index = activation_index(name);
  if (index < 0) {
    std::string known;
    for (const ActivationInfo& each : kActivations.rows) known += (known.empty() ? "" : ", ") + std::string(each.name);
    STD_TORCH_CHECK(false, "activation: expected one of ", known, ", got '", name, "'");
  }
  return index;
}

// params: limit (0: none), up_shift, then the activation's own parameters in the order of their declaration.
inline Gate check_gate(const std::string& activation, const std::vector<double>& params) {
  Gate gate{check_activation(activation)};
  const ActivationInfo& info = kActivations.rows[gate.activation];
  const auto count = static_cast<size_t>(info.own.count());
  STD_TORCH_CHECK(params.size() == 2 + count, "params: expected limit, up_shift and ", count, " parameters of ",
                  activation, ", got ", params.size(), " numbers");
  if (params[0] != 0) gate.limit = params[0];
  gate.up_shift = params[1];
  STD_TORCH_CHECK(gate.limit > 0, "limit: expected a positive number, got ", gate.limit);
  STD_TORCH_CHECK(!info.has_up || !gate.limited(), "limit, up_shift: expected none and 0 of ", activation,
                  ", which has a side of up of its own, got ", gate.limit, " and ", gate.up_shift);
  for (size_t i = 0; i < count; ++i) {
    gate.own[i] = params[2 + i];
    STD_TORCH_CHECK(!info.own.at[i].positive || gate.own[i] > 0, info.own.at[i].name,
                    ": expected a positive number, got ", gate.own[i]);
  }
  return gate;
}

inline void check_gated_form(const Gate& gate, bool gated) {
  STD_TORCH_CHECK(gated || !gate.limited(), "limit, up_shift: expected none and 0 where nothing is gated, got ",
                  gate.limit, " and ", gate.up_shift);
}

}  // namespace ffn_ops
