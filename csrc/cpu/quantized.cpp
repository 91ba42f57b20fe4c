// SPDX-License-Identifier: BSD-3-Clause
// See quantized.h; and the operators on one quantised weight: dequantize, and a product per expert.
#include "quantized.h"

#include <torch/csrc/stable/library.h>

namespace ffn_ops {

QuantizedWeight::QuantizedWeight(const StackedCodes& w) : E(w.E), N(w.N), K(w.K) {
  experts_.assign(static_cast<size_t>(E), w.first);
  for (int64_t e = 0; e < E; ++e) {
    Codes& each = experts_[static_cast<size_t>(e)];
    each.data += e * w.data_bytes;
    if (each.scales) each.scales = static_cast<const char*>(each.scales) + e * w.scale_bytes;
    if (each.zeros) each.zeros += e * w.zero_bytes;
    if (w.factors) each.factor = w.factors[e];
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
  const QuantizedWeight weight(check_codes(w, format, "w"));
  const DType storage = check_dequantized_dtype(dtype);
  const int32_t type = storage == DType::kFloat32   ? aoti_torch_dtype_float32()
                       : storage == DType::kFloat16 ? aoti_torch_dtype_float16()
                                                    : aoti_torch_dtype_bfloat16();
  Tensor out = fresh(type, {weight.E, weight.N, weight.K});
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const int64_t rows = rows_of_task(weight.K), tasks = divide_up(weight.N, rows);
  const KernelTable& table = kernels();
  Phases phases;
  phases.add(weight.E * tasks, [&](int64_t task, int64_t) {
    const int64_t e = task / tasks, begin = task % tasks * rows;
    const int64_t expert_bytes = weight.N * weight.K * storage_size(storage);
    table.dequantize({&weight.codes(e), weight.K, data + e * expert_bytes, storage}, begin,
                     std::min(weight.N, begin + rows));
  });
  phases.run(workers_for(static_cast<double>(weight.E * weight.N * weight.K), 1 << 14, threads()));
  return out;
}

// rows[r] w[e]^T, or rows[r] w[e]; rows after the experts' are zero.
Tensor quantized_linear(const Tensor& rows, std::vector<Tensor> w, std::string format, const Tensor& offsets,
                        bool transposed) {
  const QuantizedLinearShape s = check_quantized_linear(rows, w, format, offsets, transposed);
  const QuantizedWeight weight(s.w);
  Experts c;
  c.dtype = s.dtype;
  c.set_rows(offsets, weight.E, rows.size(0));
  return run_linear(c, rows, s.out, transposed ? columns_of(weight.stacked()) : rows_of(weight.stacked()));
}

}  // namespace
}  // namespace ffn_ops

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&ffn_ops::dequantize));
  m.impl("quantized_linear", TORCH_BOX(&ffn_ops::quantized_linear));
}
