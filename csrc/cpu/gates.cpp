// SPDX-License-Identifier: BSD-3-Clause
// The list of gates as Python reads it, in JSON: each name's own parameters with their defaults.
#include <array>
#include <cstdio>
#include <string>

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace ffn_ops {
namespace {

std::string gates() {
  std::string text;
  for (const ActivationInfo& each : kActivations.rows) {
    text += (text.empty() ? "{\"" : ", \"") + std::string(each.name) +
            "\": {\"has_up\": " + (each.has_up ? "true" : "false") + ", \"learned\": " + std::to_string(each.learned) +
            ", \"own\": {";
    for (int i = 0; i < each.own.count(); ++i) {
      std::array<char, 32> value{};
      std::snprintf(value.data(), value.size(), "%.17g", each.own.at[i].value);
      text += (i ? ", \"" : "\"") + std::string(each.own.at[i].name) + "\": [" + value.data() + ", " +
              (each.own.at[i].positive ? "true" : "false") + "]";
    }
    text += "}}";
  }
  return text + "}";
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CompositeExplicitAutograd, m) { m.impl("_gates", TORCH_BOX(&ffn_ops::gates)); }
