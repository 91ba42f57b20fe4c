// What a gated or plain activation computes: act(min(gate, limit)) * (clamp(up, -limit, limit) + up_shift), or
// act(gate). Descriptions of work for every device derive from it. No torch, no std.
#pragma once

namespace ffn_ops {

struct GateForm {
  int activation = 0;  // its place in the list of activations.h
  double beta = 1.0;
  double limit = __builtin_inf();  // where not infinite, or up_shift not 0: gated only
  double up_shift = 0.0;

  constexpr void set_form(const GateForm& form) { *this = form; }                                 // of what derives
  constexpr double bound() const { return limit < __builtin_inf() ? limit : __builtin_nan(""); }  // of GateLimit
  constexpr bool limited() const { return limit < __builtin_inf() || up_shift != 0.0; }
};

}  // namespace ffn_ops
