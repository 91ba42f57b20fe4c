// SPDX-License-Identifier: BSD-3-Clause
// See quantized.h; and the operators on one quantised weight: dequantize, and a product per expert.
#include "quantized.h"

#include <cstring>

#include <torch/csrc/stable/library.h>

namespace ffn_ops {
namespace {

using torch::headeronly::ScalarType;

struct NamedFormat {
  Format format;
  int64_t block_rows, block_cols;
};

NamedFormat parse_format(const std::string& text) {
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

// A dense tensor on the CPU of this dtype and shape (-1: any).
const void* check_part(const Tensor& t, const std::string& name, const std::vector<int64_t>& sizes, bool right_dtype) {
  bool fits = t.defined() && t.is_cpu() && right_dtype && t.dim() == static_cast<int64_t>(sizes.size());
  std::string expected;
  for (size_t i = 0; i < sizes.size(); ++i) {
    expected += (i ? ", " : "") + (sizes[i] < 0 ? std::string("*") : std::to_string(sizes[i]));
    fits = fits && (sizes[i] < 0 || t.size(static_cast<int64_t>(i)) == sizes[i]);
  }
  STD_TORCH_CHECK(fits && t.is_contiguous(), name, ": expected a contiguous part of a quantised weight of shape [",
                  expected, "] on the CPU, got ", scalar_type_text(t.scalar_type()), " of shape ", shape_text(t),
                  " on ", place_text(t));
  return t.const_data_ptr();
}

}  // namespace

std::vector<std::string> split_formats(const std::string& formats) {
  std::vector<std::string> names(1);
  for (const char c : formats) {
    if (c == ',') names.emplace_back();
    else names.back() += c;
  }
  return names;
}

QuantizedWeight::QuantizedWeight(const std::vector<Tensor>& tensors, const std::string& format, const char* name) {
  const NamedFormat f = parse_format(format);
  const FormatInfo& info = info_of(f.format);
  STD_TORCH_CHECK(static_cast<int>(tensors.size()) == info.tensors, name, ": expected ", info.tensors,
                  " tensors of a quantised weight in ", info.name, ", got ", tensors.size());
  const Tensor& data = tensors[0];
  Codes c;
  c.format = f.format;
  c.block_rows = f.block_rows;
  c.block_cols = f.block_cols;
  c.data = static_cast<const uint8_t*>(check_part(data, name, {-1, -1, -1}, data.scalar_type() == ScalarType::Byte));
  E = data.size(0);
  N = data.size(1);
  c.row_bytes = data.size(2);
  STD_TORCH_CHECK(c.row_bytes % info.block_bytes == 0, name, ": expected rows of whole blocks of ", info.block_bytes,
                  " bytes, got ", c.row_bytes, " bytes");
  K = c.row_bytes / info.block_bytes * info.block;
  const int64_t scale_rows = divide_up(N, c.block_rows), groups = divide_up(K, c.block_cols);
  int64_t scale_bytes = 0;
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
    c.scales = check_part(scales, std::string(name) + ".scales", {E, scale_rows, groups},
                          one_byte ? bytes : floats || (bytes && f.format == Format::kFp8));
    scale_bytes = scale_rows * groups * (bytes ? 1 : c.scale_type == ScaleType::kFloat32 ? 4 : 2);
  }
  const float* factors = nullptr;
  if (f.format == Format::kNvfp4)
    factors = static_cast<const float*>(
        check_part(tensors[2], std::string(name) + ".factor", {E}, tensors[2].scalar_type() == ScalarType::Float));
  if (f.format == Format::kUint4) {
    c.zero_row_bytes = divide_up(groups, 2);
    c.zeros = static_cast<const uint8_t*>(check_part(tensors[2], std::string(name) + ".zeros",
                                                     {E, scale_rows, c.zero_row_bytes},
                                                     tensors[2].scalar_type() == ScalarType::Byte));
  }
  experts_.assign(static_cast<size_t>(E), c);
  for (int64_t e = 0; e < E; ++e) {
    Codes& each = experts_[static_cast<size_t>(e)];
    each.data = c.data + e * N * c.row_bytes;
    if (c.scales) each.scales = static_cast<const char*>(c.scales) + e * scale_bytes;
    if (c.zeros) each.zeros = c.zeros + e * scale_rows * c.zero_row_bytes;
    if (factors) each.factor = factors[e];
  }
}

Matrix QuantizedWeight::at(int64_t expert, int64_t row, int64_t col) const {
  Matrix m;
  m.row_stride = 1;
  m.codes = &codes(expert);
  m.first_row = row;
  m.first_col = col;
  return m;
}

namespace {

Tensor dequantize(std::vector<Tensor> w, std::string format, std::string dtype) {
  const QuantizedWeight weight(w, format, "w");
  const int32_t types[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16()};
  constexpr DType storage[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  size_t at = 0;
  while (at < 3 && dtype != kDTypeNames[static_cast<int>(storage[at])]) ++at;
  STD_TORCH_CHECK(at < 3, "dtype: expected float32, float16 or bfloat16, got '", dtype, "'");
  Tensor out = fresh(types[at], {weight.E, weight.N, weight.K});
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const int64_t rows = rows_of_task(weight.K), tasks = divide_up(weight.N, rows);
  const KernelTable& table = kernels();
  Phases phases;
  phases.add(weight.E * tasks, [&](int64_t task, int64_t) {
    const int64_t e = task / tasks, begin = task % tasks * rows;
    const int64_t expert_bytes = weight.N * weight.K * storage_size(storage[at]);
    table.dequantize({&weight.codes(e), weight.K, data + e * expert_bytes, storage[at]}, begin,
                     std::min(weight.N, begin + rows));
  });
  phases.run(weight.E * weight.N * weight.K < 1 << 15 ? 1 : threads());
  return out;
}

// rows[r] w[e]^T, or rows[r] w[e]; rows after the experts' are zero.
Tensor quantized_linear(const Tensor& rows, std::vector<Tensor> w, std::string format, const Tensor& offsets,
                        bool transposed) {
  const QuantizedWeight weight(w, format, "w");
  const int64_t in = transposed ? weight.N : weight.K, width = transposed ? weight.K : weight.N;
  Experts c;
  c.dtype = storage_dtype(rows, "rows");
  STD_TORCH_CHECK(c.dtype != DType::kFloat64,
                  "rows: expected dtype float32, float16 or bfloat16 where weights are quantised, got float64");
  check_tensor(rows, "rows", c.dtype, {"R", in});
  c.set_rows(offsets, weight.E, rows.size(0));
  return run_linear(c, rows, width, transposed ? columns_of(weight.stacked()) : rows_of(weight.stacked()));
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&ffn_ops::dequantize));
  m.impl("quantized_linear", TORCH_BOX(&ffn_ops::quantized_linear));
}
