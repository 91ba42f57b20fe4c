// SPDX-License-Identifier: BSD-3-Clause
// Low-rank additions to the weights of experts, and the order in which the operators' inputs have gradients.
#pragma once

#include <array>

#include "shapes.h"

namespace ffn_ops {

// An addition to a weight [E, N, K] of `scale` times b[e] a[e]: `a` [E, rank, K] and `b` [E, N, rank], of x's dtype or
// of its arithmetic's. None: rank 0.
struct LowRank {
  const Tensor* a = nullptr;
  const Tensor* b = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rank = 0;
  double scale = 1;
};

// Checked.
inline LowRank low_rank(const MaybeTensor& a, const MaybeTensor& b, const std::string& which, double scale,
                        const MoeShape& s, int64_t N, int64_t K, Place place = {}) {
  LowRank l;
  STD_TORCH_CHECK(a.has_value() == b.has_value(), "lora: expected a_", which, " and b_", which,
                  " together, or none of them, got one");
  if (!a) return l;
  const std::string a_name = "lora.a_" + which, b_name = "lora.b_" + which;
  const DType wide = arithmetic_dtype(s.dtype);
  const auto text = [](DType d) { return std::string(kDTypeNames[static_cast<int>(d)]); };
  const auto dtype_of = [&](const Tensor& t, const std::string& name) {
    const DType dtype = storage_dtype(t, name.c_str());
    check_place(t, name.c_str(), place);
    const std::string expected = text(s.dtype) + (wide == s.dtype ? "" : " or " + text(wide));
    STD_TORCH_CHECK(dtype == s.dtype || dtype == wide, name, ": expected dtype ", expected, ", got ", text(dtype));
    return dtype;
  };
  l.dtype = dtype_of(*a, a_name);
  const DType b_dtype = dtype_of(*b, b_name);
  STD_TORCH_CHECK(b_dtype == l.dtype, b_name, ": expected dtype ", text(l.dtype), " as a_", which, " has, got ",
                  text(b_dtype));
  check_extents(*a, a_name.c_str(), {s.E, "r", K});
  l.rank = a->size(1);
  STD_TORCH_CHECK(l.rank > 0, a_name, ": expected a rank of at least 1, got shape ", shape_text(*a));
  check_extents(*b, b_name.c_str(), {s.E, N, l.rank});
  l.a = &*a;
  l.b = &*b;
  l.scale = scale;
  return l;
}

// Plain weights, which may have gradients; `up` with gate's rows in `in`, or null. Constants: all null.
struct PlainWeights {
  const Tensor *in = nullptr, *up = nullptr, *down = nullptr;
};

// In the order of the operators' `needs`.
enum Input : size_t { kX, kWeight, kIn, kUp, kDown, kBIn, kBDown, kLoraAIn, kLoraBIn, kLoraADown, kLoraBDown, kInputs };

// The gradients that backward computes: those asked for of what there is, and the matrices that they need.
struct Needed {
  std::array<bool, kInputs> of;
  bool hidden, h;  // d_hidden; h

  Needed(const std::array<bool, kInputs>& asked, bool routed, const PlainWeights& plain, const LowRank& lora_in,
         const LowRank& lora_down)
      : of(asked) {
    const auto only_if = [this](Input each, bool there) { of[each] = of[each] && there; };
    only_if(kWeight, routed);
    only_if(kIn, plain.in);
    only_if(kUp, plain.up);
    only_if(kDown, plain.down);
    for (const Input each : {kLoraAIn, kLoraBIn}) only_if(each, lora_in.rank > 0);
    for (const Input each : {kLoraADown, kLoraBDown}) only_if(each, lora_down.rank > 0);
    hidden = of[kX] || of[kWeight] || of[kIn] || of[kUp] || of[kBIn] || of[kLoraAIn] || of[kLoraBIn];
    h = of[kDown] || of[kLoraADown] || of[kLoraBDown];
  }
  bool operator[](Input each) const { return of[each]; }
};

}  // namespace ffn_ops
