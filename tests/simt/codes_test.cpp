// SPDX-License-Identifier: BSD-3-Clause
// Kernels of quantised weights on the host: dequantize against the formula of each format, one element at a time, and
// products against those of the dense kernels with the values that dequantize gives, bit for bit.
#include <cmath>

#include "../../csrc/cuda/gemm_codes.cuh"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::Buffer;
using simt::check;

constexpr double kFp4[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};

double e4m3(int byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 127) == 127) return NAN;
  const double value = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return byte & 128 ? -value : value;
}
double fp4(int nibble) { return nibble & 8 ? -kFp4[nibble & 7] : kFp4[nibble]; }
float half_at(const uint8_t* p) { return Codec<Half>::decode(Half{uint16_t(p[0] + 256 * p[1])}); }

// A weight [E, N, K] of random bytes in memory of exactly its size, its codes `odd` bytes behind an aligned address.
struct Weight {
  StackedCodes w;
  Buffer<uint8_t> codes, zeros;
  Buffer<char> scales;
  Buffer<float> factors;

  Weight(Format format, int64_t E, int64_t N, int64_t K, int64_t block_rows, int64_t block_cols, ScaleType type,
         simt::Random& random, int odd = 0)
      : codes(E * N * K / info_of(format).block * info_of(format).block_bytes + odd),
        zeros(format == Format::kUint4 ? E * divide_up(N, block_rows) * divide_up(divide_up(K, block_cols), 2) : 0),
        scales(info_of(format).tensors > 1 ? E * divide_up(N, block_rows) * divide_up(K, block_cols) * size(type) : 0),
        factors(format == Format::kNvfp4 ? E : 0) {
    const FormatInfo& info = info_of(format);
    w.E = E, w.N = N, w.K = K;
    Codes& c = w.first;
    c.format = format;
    c.data = codes.data() + odd;
    c.row_bytes = K / info.block * info.block_bytes;
    w.data_bytes = N * c.row_bytes;
    c.block_rows = block_rows, c.block_cols = block_cols;
    const int64_t scale_rows = divide_up(N, block_rows), groups = divide_up(K, block_cols);
    for (uint8_t& byte : codes) {
      do byte = uint8_t(random.next() >> 40);
      while (format == Format::kFp8 && (byte & 127) == 127);
    }
    if (info.tensors == 1) {
      moderate(odd);
      return;
    }
    c.scales = scales.data();
    c.scale_type = type;
    c.scale_row = groups;
    w.scale_bytes = scale_rows * groups * size(type);
    for (int64_t i = 0; i < E * scale_rows * groups; ++i) {
      const float value = float(1 + random.below(1000)) * 1e-4f;
      if (type == ScaleType::kFloat32) reinterpret_cast<float*>(scales.data())[i] = value;
      else if (type == ScaleType::kFloat16) reinterpret_cast<Half*>(scales.data())[i] = Codec<Half>::encode(value);
      else if (type == ScaleType::kBFloat16)
        reinterpret_cast<BFloat16*>(scales.data())[i] = Codec<BFloat16>::encode(value);
      else scales.data()[i] = char(type == ScaleType::kE8M0 ? 118 + random.below(8) : 1 + random.below(100));
    }
    if (format == Format::kUint4) {
      for (uint8_t& byte : zeros) byte = uint8_t(random.next() >> 40);
      c.zeros = zeros.data();
      c.zero_row_bytes = divide_up(groups, 2);
      w.zero_bytes = scale_rows * c.zero_row_bytes;
    }
    for (float& factor : factors) factor = float(1 + random.below(9)) * 0.01f;
    if (format == Format::kNvfp4) w.factors = factors.data();
  }

  static int64_t size(ScaleType type) {
    return type == ScaleType::kFloat32 ? 4 : type == ScaleType::kFloat16 || type == ScaleType::kBFloat16 ? 2 : 1;
  }

  // Scales of moderate size in blocks of GGUF.
  void moderate(int odd) {
    const FormatInfo& info = info_of(w.first.format);
    for (int64_t at = odd; at < codes.size(); at += info.block_bytes) {
      uint8_t* b = codes.data() + at;
      if (w.first.format == Format::kGgufMxfp4) b[0] = uint8_t(118 + b[0] % 8);
      else if (w.first.format == Format::kQ6_K) b[209] = uint8_t(0x20 + b[209] % 8);
      else b[1] = uint8_t(0x20 + b[1] % 8);
      if (w.first.format == Format::kQ4_K || w.first.format == Format::kQ5_K) b[3] = uint8_t(0x20 + b[3] % 8);
    }
  }

  float value(int64_t e, int64_t n, int64_t k) const {
    const Codes& c = w.first;
    const uint8_t* row = c.data + e * w.data_bytes + n * c.row_bytes;
    if (!c.scales) return gguf(row + k / info_of(c.format).block * info_of(c.format).block_bytes, k);
    const int64_t block = n / c.block_rows, group = k / c.block_cols;
    const char* at =
        static_cast<const char*>(c.scales) + e * w.scale_bytes + (block * c.scale_row + group) * size(c.scale_type);
    float scale = 0;
    switch (c.scale_type) {
      case ScaleType::kFloat32:
        std::memcpy(&scale, at, 4);
        break;
      case ScaleType::kFloat16:
        scale = half_at(reinterpret_cast<const uint8_t*>(at));
        break;
      case ScaleType::kBFloat16:
        scale = Codec<BFloat16>::decode(*reinterpret_cast<const BFloat16*>(at));
        break;
      case ScaleType::kE8M0:
        scale = float(std::ldexp(1.0, int(uint8_t(*at)) - 127));
        break;
      case ScaleType::kE4M3:
        scale = float(e4m3(uint8_t(*at))) * w.factors[e];
    }
    const int nibble = row[k / 2] >> k % 2 * 4 & 15;
    switch (c.format) {
      case Format::kMxfp4:
      case Format::kNvfp4:
        return float(fp4(nibble)) * scale;
      case Format::kFp8:
        return float(e4m3(row[k])) * scale;
      case Format::kInt8:
        return float(int8_t(row[k])) * scale;
      case Format::kInt4:
        return float(nibble - 8) * scale;
      default:
        return float(nibble -
                     (c.zeros[e * w.zero_bytes + block * c.zero_row_bytes + group / 2] >> group % 2 * 4 & 15)) *
               scale;
    }
  }

  float gguf(const uint8_t* b, int64_t k) const {
    const int i = int(k % 32), j = int(k % 256) / 32;
    switch (w.first.format) {
      case Format::kQ8_0:
        return half_at(b) * float(int8_t(b[2 + i]));
      case Format::kQ4_0:
        return half_at(b) * float((b[2 + i % 16] >> i / 16 * 4 & 15) - 8);
      case Format::kGgufMxfp4:
        return float(fp4(b[1 + i % 16] >> i / 16 * 4 & 15) * std::ldexp(1.0, b[0] - 127));
      case Format::kQ6_K: {
        const int n = j / 4, quarter = j % 4;
        const int low = b[64 * n + i + 32 * (quarter % 2)] >> 4 * (quarter / 2) & 15;
        const int q = low + 16 * (b[128 + 32 * n + i] >> 2 * quarter & 3);
        return half_at(b + 208) * float(int8_t(b[192 + k % 256 / 16])) * float(q - 32);
      }
      default: {
        const uint8_t* s = b + 4;
        const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) + (s[j - 4] >> 6) * 16;
        const int low = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) + (s[j] >> 6) * 16;
        const bool five = w.first.format == Format::kQ5_K;
        int q = b[(five ? 48 : 16) + 32 * (j / 2) + i] >> 4 * (j % 2) & 15;
        if (five) q += 16 * (b[16 + i] >> j & 1);
        return half_at(b) * float(scale) * float(q) - half_at(b + 2) * float(low);
      }
    }
  }

  template <class S>
  Buffer<S> dequantized() const {
    Buffer<S> out(w.E * w.N * w.K);
    if (out.size() == 0) return out;
    simt::launch({dequantize_blocks(w), kDequantizeThreads, 0, 1}, &dequantize_kernel<S>,
                 Dequantize{coded_weight(w), Codec<S>::kDType, out.data()});
    return out;
  }
};

struct Form {
  Format format;
  int64_t N, K;  // that the format allows, as ragged as it can be
  int64_t block_rows = 1, block_cols = 1;
  ScaleType type = ScaleType::kFloat32;
  int odd = 0;  // bytes before the codes
};
const Form kForms[] = {{Format::kMxfp4, 75, 96, 1, 32, ScaleType::kE8M0},
                       {Format::kMxfp4, 9, 160, 1, 32, ScaleType::kE8M0, 1},
                       {Format::kNvfp4, 75, 48, 1, 16, ScaleType::kE4M3},
                       {Format::kFp8, 200, 301, 128, 128},
                       {Format::kFp8, 75, 33, 1, 33},
                       {Format::kFp8, 75, 40, 75, 40, ScaleType::kE8M0, 3},
                       {Format::kInt8, 75, 101, 1, 101, ScaleType::kBFloat16},
                       {Format::kInt8, 41, 72, 1, 24, ScaleType::kFloat16},
                       {Format::kInt4, 75, 64, 1, 32, ScaleType::kBFloat16},
                       {Format::kInt4, 7, 70, 1, 70, ScaleType::kFloat32},
                       {Format::kUint4, 75, 192, 1, 64, ScaleType::kFloat16},
                       {Format::kUint4, 75, 40, 3, 8, ScaleType::kFloat32, 2},
                       {Format::kQ8_0, 9, 96},
                       {Format::kQ4_0, 9, 96},
                       {Format::kQ4_K, 5, 512},
                       {Format::kQ5_K, 5, 512},
                       {Format::kQ6_K, 5, 512},
                       {Format::kGgufMxfp4, 9, 96}};

Weight weight_of(const Form& f, simt::Random& random, int64_t E, int64_t N) {
  return Weight(f.format, E, N, f.K, f.block_rows, f.block_cols, f.type, random, f.odd);
}

const char* name_of(const Form& f) { return info_of(f.format).name; }

void test_dequantize() {
  simt::Random random(1);
  for (const Form& f : kForms) {
    const Weight weight = weight_of(f, random, 2, f.N);
    const Buffer<float> got = weight.dequantized<float>();
    const Buffer<BFloat16> brief = weight.dequantized<BFloat16>();
    const Buffer<Half> half = weight.dequantized<Half>();
    for (int64_t i = 0; i < got.size(); ++i) {
      const int64_t k = i % f.K, n = i / f.K % f.N, e = i / f.K / f.N;
      const float value = weight.value(e, n, k);
      check(std::memcmp(&got[i], &value, 4) == 0, "%s: element %lld is %g instead of %g", name_of(f), (long long)i,
            double(got[i]), double(value));
      check(brief[i].bits == Codec<BFloat16>::encode(value).bits && half[i].bits == Codec<Half>::encode(value).bits,
            "%s: element %lld in 16 bits", name_of(f), (long long)i);
    }
  }
  // Every e4m3 code, NaN as well, and every scale of e8m0.
  Weight all(Format::kFp8, 1, 1, 256, 1, 256, ScaleType::kFloat32, random);
  for (int i = 0; i < 256; ++i) all.codes[i] = uint8_t(i);
  const float one = 1;
  std::memcpy(all.scales.data(), &one, 4);
  const Buffer<float> got = all.dequantized<float>();
  for (int i = 0; i < 256; ++i)
    check(std::isnan(e4m3(i)) ? std::isnan(got[i]) : double(got[i]) == e4m3(i), "e4m3 code %d is %g", i,
          double(got[i]));
  Weight scales(Format::kMxfp4, 1, 255, 32, 1, 32, ScaleType::kE8M0, random);
  for (int i = 0; i < 255; ++i) scales.scales[i] = char(i);
  const Buffer<float> scaled = scales.dequantized<float>();
  for (int64_t i = 0; i < scaled.size(); ++i)
    check(scaled[i] == scales.value(0, i / 32, i % 32), "e8m0 scale %d", int(i / 32));
}

enum class Use { kPlain, kTransposed, kGated, kInterleaved, kTwo, kTwoTransposed };

// Rows of three experts and of none, times the weight in codes and as dense values.
template <class S>
void test_product(const Form& f, Use use, uint64_t seed) {
  simt::Random random(seed);
  const bool transposed = use == Use::kTransposed || use == Use::kTwoTransposed;
  const bool two = use == Use::kTwo || use == Use::kTwoTransposed;
  const bool gated = !transposed && use != Use::kPlain;
  const int64_t E = 3, F = f.N, rows_of_w = gated && !two ? 2 * F : F;
  const Form other{Format::kInt8, f.N, f.K, 1, f.K};  // up, where it is a weight of its own
  const Weight in = weight_of(f, random, E, rows_of_w), up = weight_of(two ? other : f, random, two ? E : 0, F);
  const int64_t K = transposed ? rows_of_w + (two ? F : 0) : f.K, N = transposed ? f.K : F;
  const std::vector<int64_t> at = {0, 3, 3, 80};
  const int64_t R = 82;
  const Buffer<int64_t> offsets(at);

  const int64_t wide = 16 / int64_t(sizeof(S)), stride = divide_up(K, wide) * wide;
  Buffer<S> a(R * stride);
  for (int64_t r = 0; r < at.back(); ++r)
    for (int64_t k = 0; k < K; ++k) a[r * stride + k] = Codec<S>::encode(float(random.next() >> 40) * 0x1p-23f - 1);

  GroupedGemm g;
  g.E = E;
  g.R = R;
  g.offsets = offsets.data();
  g.N = N;
  g.K = K;
  g.gated = gated;
  g.dtype = Codec<S>::kDType;
  g.a = {.data = a.data(), .lane_stride = stride};
  const auto run = [&](auto job, const GemmPlan& plan, const auto& launch) {
    std::vector<Buffer<S>> out;
    for (int i = 0; i < (gated ? 3 : 1); ++i) out.emplace_back(R * N);
    job.epilogue.kind = gated ? Epilogue::Kind::kActivate : Epilogue::Kind::kStore;
    job.epilogue.out = out[0].data();
    job.epilogue.out_stride = job.epilogue.pre_stride = N;
    if (gated) job.epilogue.gate = out[1].data(), job.epilogue.up = out[2].data();
    Buffer<char> workspace(grouped_gemm_workspace_bytes(job, plan));
    auto* table = reinterpret_cast<RowTile*>(workspace.data() + row_table_offset(E));
    simt::launch({1, kTableThreads, kTableSharedBytes, seed}, &expert_tiles_kernel<>, job.offsets, E, R,
                 table_tile_rows(job, plan), plan.table_entries, reinterpret_cast<int64_t*>(workspace.data()), table);
    launch(job, table);
    return out;
  };

  CodedGemm coded{g, {coded_weight(in.w), coded_weight(two ? up.w : in.w)}, rows_of_w, transposed};
  if (gated) coded.step = use == Use::kInterleaved ? 2 : 1, coded.up_first = use == Use::kInterleaved ? 1 : F;
  const GemmPlan plan = plan_coded_gemm(coded);
  const auto ours = run(coded, plan, [&](const CodedGemm& job, const RowTile* table) {
    dispatch_coded_gemm<S>(plan, [&](auto tag) {
      simt::launch({plan.blocks, kGemmThreads, plan.shared_bytes, seed},
                   &coded_gemm_kernel<typename decltype(tag)::Type>, job, plan, table);
    });
  });

  // The values one below the other, with `up` behind them.
  const Buffer<S> first = in.dequantized<S>(), second = up.dequantized<S>();
  const int64_t all = rows_of_w + (two ? F : 0);
  Buffer<S> dense(E * all * f.K);
  for (int64_t e = 0; e < E; ++e) {
    std::copy_n(first.data() + e * rows_of_w * f.K, rows_of_w * f.K, dense.data() + e * all * f.K);
    if (two) std::copy_n(second.data() + e * F * f.K, F * f.K, dense.data() + (e * all + rows_of_w) * f.K);
  }
  g.b = {.data = dense.data(), .lane_stride = f.K, .expert_stride = all * f.K};
  if (transposed) std::swap(g.b.lane_stride, g.b.k_stride);
  g.b_up = g.b;
  if (use == Use::kInterleaved) g.b.lane_stride = g.b_up.lane_stride = 2 * f.K;
  g.b_up.data = dense.data() + (use == Use::kInterleaved ? 1 : F) * f.K;
  // Of the dense instances, which agree, those that read element by element.
  constexpr GemmShape kShort = GemmShape::kShort;
  const GemmPlan dense_plan = plan_gemm(g, false, &kShort);
  const auto theirs = run(g, dense_plan, [&](const GroupedGemm& job, const RowTile* table) {
    const auto launch = [&](auto kernel) {
      simt::launch({dense_plan.blocks, kGemmThreads, dense_plan.shared_bytes, seed}, kernel, job, dense_plan, table);
    };
    if (transposed) launch(&grouped_gemm_kernel<GemmInstance<S, kShort, false, false, false, false>>);
    else launch(&grouped_gemm_kernel<GemmInstance<S, kShort, false, false, true, false>>);
  });
  for (size_t i = 0; i < ours.size(); ++i)
    check(std::memcmp(ours[i].data(), theirs[i].data(), size_t(R * N) * sizeof(S)) == 0,
          "%s, %s, use %d: result %zu has other bits than the dense product's", name_of(f),
          kDTypeNames[int(Codec<S>::kDType)], int(use), i);
}

// Columns of a slab: from a row or a column of the weight on.
void test_first() {
  simt::Random random(5);
  const Weight w = weight_of({Format::kInt8, 300, 264, 1, 264}, random, 1, 300);
  for (const bool transposed : {false, true}) {
    const int64_t K = transposed ? 300 : 264, first = 256, N = transposed ? 8 : 44, R = 2, stride = 304;
    Buffer<float> a(R * stride), out(R * N);
    for (float& x : a) x = float(random.below(7));
    CodedGemm g{{}, {coded_weight(w.w), coded_weight(w.w)}, 300, transposed, first};
    g.R = R;
    g.N = N;
    g.K = K;
    g.a = {.data = a.data(), .lane_stride = stride};
    g.epilogue.out = out.data();
    g.epilogue.out_stride = N;
    const GemmPlan plan = plan_coded_gemm(g);
    dispatch_coded_gemm<float>(plan, [&](auto tag) {
      simt::launch({plan.blocks, kGemmThreads, plan.shared_bytes, 1}, &coded_gemm_kernel<typename decltype(tag)::Type>,
                   g, plan, static_cast<const RowTile*>(nullptr));
    });
    for (int64_t r = 0; r < R; ++r)
      for (int64_t n = 0; n < N; ++n) {
        double sum = 0;
        for (int64_t k = 0; k < K; ++k)
          sum += double(a[r * stride + k]) * double(transposed ? w.value(0, k, first + n) : w.value(0, first + n, k));
        check(std::abs(double(out[r * N + n]) - sum) < 1e-2, "from %lld on: %g instead of %g", (long long)first,
              double(out[r * N + n]), sum);
      }
  }
}

}  // namespace

int main() {
  test_dequantize();
  for (const Form& f : kForms)
    for (const Use use : {Use::kPlain, Use::kTransposed}) {
      test_product<float>(f, use, 1);
      test_product<BFloat16>(f, use, 2);
    }
  for (const Form& f : {kForms[0], kForms[3], kForms[11]})
    for (const Use use : {Use::kGated, Use::kInterleaved, Use::kTwo, Use::kTwoTransposed}) {
      test_product<float>(f, use, 3);
      test_product<Half>(f, use, 4);
    }
  test_first();
  return simt::report("codes_test");
}
