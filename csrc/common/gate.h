// SPDX-License-Identifier: BSD-3-Clause
// A gate as kernels of every device take it: act(min(gate, limit)) * (clamp(up, -limit, limit) + up_shift), or
// act(gate) where nothing is gated. The derivatives are in gate_math.h. No torch, no std.
#pragma once

namespace ffn_ops {

// The most parameters of its own that a gate has.
constexpr int kMostOwnParams = 4;

struct OwnParam {
  const char* name = nullptr;
  double value = 0.0;     // the default
  bool positive = false;  // else any finite number
};

// What a struct of activations.h declares.
struct OwnParams {
  OwnParam at[kMostOwnParams];

  constexpr int count() const {
    int n = 0;
    while (n < kMostOwnParams && at[n].name) ++n;
    return n;
  }
};

struct Gate {
  int activation = 0;              // its place in the list of activations.h
  double limit = __builtin_inf();  // where not infinite, or up_shift not 0: gated only
  double up_shift = 0.0;
  double own[kMostOwnParams] = {};  // as the activation declares them

  constexpr void set_form(const Gate& gate) { *this = gate; }                                     // of what derives
  constexpr double bound() const { return limit < __builtin_inf() ? limit : __builtin_nan(""); }  // of GateLimit
  constexpr bool limited() const { return limit < __builtin_inf() || up_shift != 0.0; }
};

}  // namespace ffn_ops
