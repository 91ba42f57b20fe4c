// SPDX-License-Identifier: BSD-3-Clause
// The names of the activations for host code, read off the one list in activations.h. A normal header, no vector code.
#pragma once

#include <string_view>

#include "dtypes.h"
#include "gate.h"

namespace ffn_ops {
namespace activation_list {
#include "activations.h"
}

struct ActivationInfo {
  const char* name;
  OwnParams own;
  bool has_up;
  int learned;  // how many of `own` may be tensors with gradients
};

template <class... As>
struct ActivationTable {
  explicit constexpr ActivationTable(TypeList<As...>) {}
  static constexpr int kSize = sizeof...(As);
  ActivationInfo rows[kSize] = {{As::name, As::own, As::has_up, As::learned}...};
};

// Indexed like `dispatch_activation`.
inline constexpr ActivationTable kActivations{activation_list::Activations{}};

// The index of `name` in the list, or -1.
constexpr int activation_index(std::string_view name) {
  for (int i = 0; i < kActivations.kSize; ++i) {
    if (name == kActivations.rows[i].name) return i;
  }
  return -1;
}

}  // namespace ffn_ops
