// SPDX-License-Identifier: BSD-3-Clause
// See quantized.h; and the operators on one quantised weight: dequantize, and a product per expert.
#include "quantized.h"

#include <torch/csrc/stable/library.h>

#include "codes.cuh"
#include "gemm_launch.cuh"

namespace ffn_ops::cuda {
namespace {

CodedGemm coded(const GroupedGemm& g, const StackedCodes& w, bool transposed,
                const std::optional<StackedCodes>& second) {
  const CodedWeight first = coded_weight(w);
  return {g, {first, second ? coded_weight(*second) : first}, w.N, transposed};
}

void launch(Call& call, const CodedGemm& job) {
  const GemmPlan plan = plan_coded_gemm(job);
  void* workspace = call.workspace(grouped_gemm_workspace_bytes(job, plan));
  check_cuda(launch_coded_gemm(job, plan, workspace, call.stream()), "coded_gemm_kernel");
}

}  // namespace

void check_groups(const StackedCodes& w, const char* name) {
  static_assert(kCodesAtOnce == 8);
  STD_TORCH_CHECK(has_even_blocks(w), name,
                  ": expected a scale for whole rows or a multiple of 8 columns on a GPU, got one for ",
                  w.first.block_cols, " columns");
}

WithWeights with_codes(Call& call, const StackedCodes& w, bool transposed, const std::optional<StackedCodes>& second) {
  return [&call, w, transposed, second](const GroupedGemm& g, int64_t col) {
    CodedGemm job = coded(g, w, transposed, second);
    job.first = col;
    launch(call, job);
  };
}

WithWeights with_gate_and_up(Call& call, const QuantizedMoeShape& s) {
  return [&call, &s](const GroupedGemm& g, int64_t) {
    CodedGemm job = coded(g, s.in, false, s.up);
    job.step = s.interleaved ? 2 : 1;
    job.up_first = s.interleaved ? 1 : s.F;
    launch(call, job);
  };
}

namespace {

Tensor dequantize(std::vector<Tensor> w, std::string format, std::string dtype) {
  if (w.empty()) check_codes(w, format, "w");  // refuses it
  Call call(w[0], "w");
  Dequantize job;
  const StackedCodes codes = check_codes(w, format, "w", call.place());
  check_groups(codes, "w");
  job.w = coded_weight(codes);
  job.dtype = check_dequantized_dtype(dtype);
  Tensor out = call.fresh(job.dtype, {codes.E, codes.N, codes.K});
  job.out = out.mutable_data_ptr();
  const auto launch = [&](auto kernel) {
    call.launch("dequantize_kernel", kernel, dequantize_blocks(codes), kDequantizeThreads, 0, job);
  };
  if (job.dtype == DType::kFloat32) launch(dequantize_kernel<float>);
  else if (job.dtype == DType::kFloat16) launch(dequantize_kernel<Half>);
  else launch(dequantize_kernel<BFloat16>);
  return out;
}

// rows[r] w[e]^T, or rows[r] w[e]; rows after the experts' are zero.
Tensor quantized_linear(const Tensor& rows, std::vector<Tensor> w, std::string format, const Tensor& offsets,
                        bool transposed) {
  Call call(rows, "rows");
  const QuantizedLinearShape s = check_quantized_linear(rows, w, format, offsets, transposed, call.place());
  check_groups(s.w, "w");
  const Experts c{s.dtype, s.w.E, rows.size(0), call.indices(offsets)};
  const Tensor readable = aligned_rows(call, rows, s.dtype);
  Tensor out = call.fresh({c.R, s.out});
  combined_product(call, c, token_rows(c, readable), s.in, with_codes(call, s.w, transposed), s.out, nullptr, nullptr,
                   out);
  return out;
}

}  // namespace
}  // namespace ffn_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(ffn_ops, CUDA, m) {
  m.impl("dequantize", TORCH_BOX(&ffn_ops::cuda::dequantize));
  m.impl("quantized_linear", TORCH_BOX(&ffn_ops::cuda::quantized_linear));
}
