// SPDX-License-Identifier: BSD-3-Clause
// Checks of quantised weights, and of whole operators on them, for every device: no kernel reads out of range. A
// weight's tensors are codes, then scales, then zeros or the factor, as formats.h counts them.
#pragma once

#include "formats.h"
#include "shapes.h"

namespace ffn_ops {

struct NamedFormat {
  Format format;
  int64_t block_rows, block_cols;
};

inline NamedFormat parse_format(const std::string& text) {
  const size_t colon = text.find(':'), x = text.find('x', colon == std::string::npos ? 0 : colon);
  const std::string name = text.substr(0, colon);
  const auto number = [&](size_t begin, size_t end) {
    int64_t value = 0;
    for (size_t i = begin; i < end; ++i)
      value = text[i] >= '0' && text[i] <= '9' && value < int64_t{1} << 40 ? 10 * value + (text[i] - '0') : -1;
    return value;
  };
  for (int i = 0; i < kFormatCount; ++i) {
    if (name != kFormats[i].name || colon == std::string::npos || x == std::string::npos) continue;
    const NamedFormat f{static_cast<Format>(i), number(colon + 1, x), number(x + 1, text.size())};
    if (f.block_rows > 0 && f.block_cols > 0) return f;
  }
  std::string known;
  for (const FormatInfo& each : kFormats) known += (known.empty() ? "" : ", ") + std::string(each.name);
  STD_TORCH_CHECK(false, "formats: expected one of ", known, " and a block, such as fp8:128x128, got '", text, "'");
}

// A dense tensor of this dtype and shape (-1: any).
inline const void* check_part(const Tensor& t, const std::string& name, const std::vector<int64_t>& sizes,
                              bool right_dtype, Place place) {
  bool fits = t.defined() && place.holds(t) && right_dtype && t.dim() == static_cast<int64_t>(sizes.size());
  std::string expected;
  for (size_t i = 0; i < sizes.size(); ++i) {
    expected += (i ? ", " : "") + (sizes[i] < 0 ? std::string("*") : std::to_string(sizes[i]));
    fits = fits && (sizes[i] < 0 || t.size(static_cast<int64_t>(i)) == sizes[i]);
  }
  STD_TORCH_CHECK(fits && t.is_contiguous(), name, ": expected a contiguous part of a quantised weight of shape [",
                  expected, "] on ", place.text(), ", got ", scalar_type_text(t.scalar_type()), " of shape ",
                  shape_text(t), " on ", place_text(t));
  return t.const_data_ptr();
}

// The names in `formats`, with commas between them.
inline std::vector<std::string> split_formats(const std::string& formats) {
  std::vector<std::string> names(1);
  for (const char c : formats) {
    if (c == ',') names.emplace_back();
    else names.back() += c;
  }
  return names;
}

// `format`: a name of formats.h and the block of a scale, such as fp8:128x128.
inline StackedCodes check_codes(const std::vector<Tensor>& tensors, const std::string& format, const char* name,
                                Place place = {}) {
  using torch::headeronly::ScalarType;
  const NamedFormat f = parse_format(format);
  const FormatInfo& info = info_of(f.format);
  STD_TORCH_CHECK(static_cast<int>(tensors.size()) == info.tensors, name, ": expected ", info.tensors,
                  " tensors of a quantised weight in ", info.name, ", got ", tensors.size());
  const Tensor& data = tensors[0];
  StackedCodes w;
  Codes& c = w.first;
  c.format = f.format;
  c.block_rows = f.block_rows;
  c.block_cols = f.block_cols;
  c.data =
      static_cast<const uint8_t*>(check_part(data, name, {-1, -1, -1}, data.scalar_type() == ScalarType::Byte, place));
  w.E = data.size(0);
  w.N = data.size(1);
  c.row_bytes = data.size(2);
  STD_TORCH_CHECK(c.row_bytes % info.block_bytes == 0, name, ": expected rows of whole blocks of ", info.block_bytes,
                  " bytes, got ", c.row_bytes, " bytes");
  w.K = c.row_bytes / info.block_bytes * info.block;
  w.data_bytes = w.N * c.row_bytes;
  const int64_t scale_rows = divide_up(w.N, c.block_rows), groups = divide_up(w.K, c.block_cols);
  if (info.tensors > 1) {
    const Tensor& scales = tensors[1];
    const ScalarType type = scales.scalar_type();
    c.scale_row = groups;
    switch (type) {
      case ScalarType::Float:
        c.scale_type = ScaleType::kFloat32;
        break;
      case ScalarType::Half:
        c.scale_type = ScaleType::kFloat16;
        break;
      case ScalarType::BFloat16:
        c.scale_type = ScaleType::kBFloat16;
        break;
      default:
        c.scale_type = f.format == Format::kNvfp4 ? ScaleType::kE4M3 : ScaleType::kE8M0;
    }
    const bool bytes = type == ScalarType::Byte;
    const bool floats = !bytes && (c.scale_type == ScaleType::kFloat32 || c.scale_type == ScaleType::kFloat16 ||
                                   c.scale_type == ScaleType::kBFloat16);
    const bool one_byte = f.format == Format::kMxfp4 || f.format == Format::kNvfp4;
    c.scales = check_part(scales, std::string(name) + ".scales", {w.E, scale_rows, groups},
                          one_byte ? bytes : floats || (bytes && f.format == Format::kFp8), place);
    w.scale_bytes = scale_rows * groups * (bytes ? 1 : c.scale_type == ScaleType::kFloat32 ? 4 : 2);
  }
  if (f.format == Format::kNvfp4)
    w.factors = static_cast<const float*>(check_part(tensors[2], std::string(name) + ".factor", {w.E},
                                                     tensors[2].scalar_type() == ScalarType::Float, place));
  if (f.format == Format::kUint4) {
    c.zero_row_bytes = divide_up(groups, 2);
    c.zeros = static_cast<const uint8_t*>(check_part(tensors[2], std::string(name) + ".zeros",
                                                     {w.E, scale_rows, c.zero_row_bytes},
                                                     tensors[2].scalar_type() == ScalarType::Byte, place));
    w.zero_bytes = scale_rows * c.zero_row_bytes;
  }
  return w;
}

inline DType check_quantized_dtype(const Tensor& x, const char* name) {
  const DType dtype = storage_dtype(x, name);
  STD_TORCH_CHECK(dtype != DType::kFloat64, name,
                  ": expected dtype float32, float16 or bfloat16 where weights are quantised, got float64");
  return dtype;
}

// What dequantize makes.
inline DType check_dequantized_dtype(const std::string& dtype) {
  for (const DType each : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    if (dtype == kDTypeNames[static_cast<int>(each)]) return each;
  STD_TORCH_CHECK(false, "dtype: expected float32, float16 or bfloat16, got '", dtype, "'");
}

// `in` holds the rows of gate and up where it is gated and there is no `up`.
struct QuantizedMoeShape : MoeShape {
  StackedCodes in, down;
  std::optional<StackedCodes> up;
};

inline QuantizedMoeShape check_quantized_moe(const Tensor& x, const MaybeTensor& token, const MaybeTensor& weight,
                                             const MaybeTensor& offsets, const MaybeTensor& row,
                                             const MaybeTensor& slot_offsets, const std::vector<Tensor>& w_in,
                                             const std::vector<Tensor>& w_up, const std::vector<Tensor>& w_down,
                                             const std::string& formats, const MaybeTensor& b_in,
                                             const MaybeTensor& b_down, bool gated, bool interleaved, const Gate& form,
                                             Place place = {}) {
  const std::vector<std::string> names = split_formats(formats);
  const bool two = names.size() == 3;  // gate and up are two weights; else w_up is not read
  STD_TORCH_CHECK(two || names.size() == 2, "formats: expected one for each weight, got '", formats, "'");
  QuantizedMoeShape s;
  s.in = check_codes(w_in, names.front(), "w_in", place);
  s.down = check_codes(w_down, names.back(), "w_down", place);
  if (two) s.up = check_codes(w_up, names[1], "w_up", place);
  s.dtype = check_quantized_dtype(x, "x");
  check_tensor(x, "x", s.dtype, {"T", "D"}, place);
  s.T = s.R = x.size(0);
  s.D = x.size(1);
  s.E = s.in.E;
  s.O = s.down.N;
  s.gated = gated;
  s.interleaved = interleaved;
  s.form = form;
  const bool one_weight = gated && !s.up;
  check_interleaved(interleaved, gated, one_weight);
  STD_TORCH_CHECK(gated || !s.up, "gated: expected True where w_up is given, got False");
  check_gated_form(form, gated);
  STD_TORCH_CHECK(s.E > 0, "w_in: expected at least one expert, got none");
  STD_TORCH_CHECK(!one_weight || s.in.N % 2 == 0, "w_in: expected an even number of rows, of gate and up, got ",
                  s.in.N);
  s.F = one_weight ? s.in.N / 2 : s.in.N;
  const auto fits = [&](const StackedCodes& each, const char* name, int64_t N, int64_t K) {
    STD_TORCH_CHECK(each.E == s.E && each.N == N && each.K == K, name, ": expected a quantised weight of shape [", s.E,
                    ", ", N, ", ", K, "], got [", each.E, ", ", each.N, ", ", each.K, "]");
  };
  fits(s.in, "w_in", s.in.N, s.D);
  if (s.up) fits(*s.up, "w_up", s.F, s.D);
  fits(s.down, "w_down", s.O, s.F);
  if (b_in) check_tensor(*b_in, "b_in", s.dtype, {s.E, s.hidden()}, place);
  if (b_down) check_tensor(*b_down, "b_down", s.dtype, {s.E, s.O}, place);
  s.routed = token.has_value();
  STD_TORCH_CHECK(s.routed == weight.has_value() && s.routed == row.has_value() &&
                      s.routed == slot_offsets.has_value() && (offsets || !s.routed),
                  "routing: expected token, weight, row and slot_offsets together, or none of them");
  STD_TORCH_CHECK(offsets || s.E == 1, "offsets: expected a tensor where there are several experts, got none");
  if (offsets) check_indices_shape(*offsets, "offsets", {s.E + 1}, place);
  if (s.routed) {
    check_indices_shape(*slot_offsets, "slot_offsets", {s.T + 1}, place);
    s.R = check_routes(*token, weight, s.dtype, *offsets, *row, *slot_offsets, place).R;
  }
  return s;
}

struct QuantizedLinearShape {
  DType dtype;
  StackedCodes w;
  int64_t in, out;
};

inline QuantizedLinearShape check_quantized_linear(const Tensor& rows, const std::vector<Tensor>& w,
                                                   const std::string& format, const Tensor& offsets, bool transposed,
                                                   Place place = {}) {
  QuantizedLinearShape s{check_quantized_dtype(rows, "rows"), check_codes(w, format, "w", place), 0, 0};
  s.in = transposed ? s.w.N : s.w.K;
  s.out = transposed ? s.w.K : s.w.N;
  check_tensor(rows, "rows", s.dtype, {"R", s.in}, place);
  check_indices_shape(offsets, "offsets", {s.w.E + 1}, place);
  return s;
}

}  // namespace ffn_ops
