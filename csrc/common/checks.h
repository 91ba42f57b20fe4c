// SPDX-License-Identifier: BSD-3-Clause
// Checks before any work, on every device: dtype, device, rank and extents of each tensor. Messages give the name, the
// expected and the actual value, in the words of ffn_ops/_checks.py, which checks where there is no data. The public
// functions call an operator first, and turn its refusal into a ValueError or a TypeError. Checks of whole operators
// are in shapes.h.
#pragma once

#include <cstdio>
#include <concepts>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "gate.h"
#include "names.h"

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

inline torch::headeronly::ScalarType scalar_type_of(DType dtype) {
  using torch::headeronly::ScalarType;
  constexpr ScalarType types[] = {ScalarType::Double, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
  return types[static_cast<int>(dtype)];
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
  std::string text() const { return gpu < 0 ? "cpu" : "cuda:" + std::to_string(gpu); }
};

inline std::string place_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(gpu_index(t)) : "another device";
}

// An extent that a tensor must have, or a letter where any will do.
struct Extent {
  constexpr Extent(std::integral auto extent) : size(extent) {}  // NOLINT: implicit, for lists in braces
  constexpr Extent(const char* any) : letter(any) {}             // NOLINT
  int64_t size = -1;
  const char* letter = "*";

  std::string text() const { return size < 0 ? letter : std::to_string(size); }
};
using Extents = std::initializer_list<Extent>;

inline void check_place(const Tensor& t, const char* name, Place place, const char* of = "x") {
  STD_TORCH_CHECK(t.defined(), name, ": expected a torch.Tensor, got NoneType");
  STD_TORCH_CHECK(place.holds(t), name, ": expected device ", place.text(), " as ", of, " has, got ", place_text(t));
}

inline void check_extents(const Tensor& t, const char* name, Extents extents) {
  bool fits = t.dim() == static_cast<int64_t>(extents.size());
  int64_t at = 0;
  for (const Extent& each : extents) {
    fits = fits && (each.size < 0 || t.size(at) == each.size);
    ++at;
  }
  if (fits) return;
  std::string expected;
  for (const Extent& each : extents) expected += (expected.empty() ? "" : ", ") + each.text();
  STD_TORCH_CHECK(false, name, ": expected shape [", expected, "], got ", shape_text(t));
}

// Checks for a strided tensor of this dtype, which is that of `of` where one is named, with these extents.
inline void check_tensor(const Tensor& t, const char* name, DType dtype, Extents extents, Place place = {},
                         const char* of = "x") {
  check_place(t, name, place, of ? of : "x");
  STD_TORCH_CHECK(t.scalar_type() == scalar_type_of(dtype), name, ": expected dtype ",
                  kDTypeNames[static_cast<int>(dtype)], of ? std::string(" as ") + of + " has" : "", ", got ",
                  scalar_type_text(t.scalar_type()));
  check_extents(t, name, extents);
}

// Checks for indices with these extents, without their values.
inline void check_indices_shape(const Tensor& t, const char* name, Extents extents, Place place = {}) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Long, name, ": expected dtype int64, got ",
                  scalar_type_text(t.scalar_type()));
  check_place(t, name, place);
  check_extents(t, name, extents);
}

inline void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  const std::string range = std::to_string(least) + " to " + std::to_string(most);
  STD_TORCH_CHECK(value >= least && value <= most, name, ": expected ", range, ", got ", value);
}

inline void check_needs(const std::vector<bool>& needs, size_t count) {
  STD_TORCH_CHECK(needs.size() == count, "needs: expected ", count, " flags, got ", needs.size());
}

inline int check_activation(const std::string& name) {
  const int index = kActivations.index(name);
  STD_TORCH_CHECK(index >= 0, "activation: expected one of ", kActivations.names(), ", got '", name, "'");
  return index;
}

inline std::string limit_text(const Gate& gate) {
  char text[32] = "None";
  if (gate.limit < __builtin_inf()) std::snprintf(text, sizeof(text), "%g", gate.limit);
  return text;
}

// params: limit (0: none), up_shift, then the activation's own parameters in the order of their declaration.
inline Gate check_gate(const std::string& activation, const std::vector<double>& params) {
  Gate gate{check_activation(activation)};
  const ActivationInfo& info = kActivations.rows[gate.activation];
  const auto count = static_cast<size_t>(info.own.count());
  STD_TORCH_CHECK(params.size() == 2 + count, "params: expected ", 2 + count, " numbers of ", activation, ", got ",
                  params.size());
  if (params[0] != 0) gate.limit = params[0];
  gate.up_shift = params[1];
  STD_TORCH_CHECK(gate.limit > 0, "limit: expected a positive number, got ", gate.limit);
  if (info.has_up && gate.limited()) {
    std::string bounds;
    for (size_t i = 0; i < count; ++i) bounds += (i ? ", " : "") + std::string(info.own.at[i].name);
    STD_TORCH_CHECK(false, "limit, up_shift: expected None and 0 of ", activation, ", which bounds gate and up by ",
                    bounds, ", got ", limit_text(gate), " and ", gate.up_shift);
  }
  for (size_t i = 0; i < count; ++i) {
    gate.own[i] = params[2 + i];
    STD_TORCH_CHECK(!info.own.at[i].positive || gate.own[i] > 0, info.own.at[i].name,
                    ": expected a positive number, got ", gate.own[i]);
  }
  return gate;
}

inline void check_gated_form(const Gate& gate, bool gated) {
  STD_TORCH_CHECK(gated || !gate.limited(), "limit, up_shift: expected None and 0 where nothing is gated, got ",
                  limit_text(gate), " and ", gate.up_shift);
}

// `one_weight`: it holds the rows of gate and up.
inline void check_interleaved(bool interleaved, bool gated, bool one_weight) {
  STD_TORCH_CHECK(!interleaved || one_weight, "interleaved: expected False where ",
                  gated ? "gate and up have a tensor each" : "nothing is gated", ", got True");
}

}  // namespace ffn_ops
