// SPDX-License-Identifier: BSD-3-Clause
// Every grouped product of a mixture's training step alone, in each shape of tile: `make products`, then on a Hopper
// GPU `build/products [ROW ...]`, rows as in gpu_rows.py. Results of up, down, dX and both weight gradients are
// compared with sums in double at 2048 places before they are timed (dH's epilogue has its tests). No torch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../csrc/common/names.h"
#include "../csrc/cuda/gemm_instances.cuh"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using S = BFloat16;
using Kind = GroupedGemm::Kind;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

__device__ __host__ float widened(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// Triangular numbers of (-scale, scale), the same for a seed.
__global__ void fill_kernel(uint16_t* to, int64_t n, uint64_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t z = (uint64_t(i) + 1) * 0x9e3779b97f4a7c15u + seed;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    const float value = (float(z & 0xffffff) + float(z >> 24 & 0xffffff)) / 16777216.0f - 1.0f;
    uint32_t bits;
    const float scaled = value * scale;
    memcpy(&bits, &scaled, 4);
    to[i] = uint16_t((bits + 0x8000) >> 16);
  }
}

struct Place {
  int64_t expert, row, col;  // kOuter: row of the expert's matrix
};

__device__ double element(const Operand& o, int64_t expert, int64_t lane, int64_t k) {
  return widened(
      static_cast<const uint16_t*>(o.data)[expert * o.expert_stride + lane * o.lane_stride + k * o.k_stride]);
}

// Squares of the errors and of the values at n places.
__global__ void compare_kernel(GroupedGemm g, const uint16_t* out, int64_t stride, const Place* places, double* squares,
                               int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const Place p = places[i];
  double sum = 0;
  int64_t at = p.row * stride + p.col;
  if (g.kind == Kind::kRows) {
    const int64_t row = g.a.gather ? g.a.gather[p.row] : p.row;
    for (int64_t k = 0; k < g.K; ++k) sum += element(g.a, 0, row, k) * element(g.b, p.expert, p.col, k);
  } else {
    for (int64_t r = g.offsets[p.expert]; r < g.offsets[p.expert + 1]; ++r)
      sum += element(g.a, 0, p.row, g.a.gather ? g.a.gather[r] : r) *
             element(g.b, 0, p.col, g.b.gather ? g.b.gather[r] : r);
    at += p.expert * g.M * stride;
  }
  const double error = widened(out[at]) - sum;
  squares[2 * i] = error * error;
  squares[2 * i + 1] = sum * sum;
}

template <class T>
class Memory {
 public:
  explicit Memory(int64_t n) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), size_t(n) * sizeof(T)), "cudaMalloc");
  }
  explicit Memory(const std::vector<T>& values) : Memory(int64_t(values.size())) {
    check(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Memory(const Memory&) = delete;
  ~Memory() { cudaFree(data_); }
  T* data() { return data_; }

 private:
  T* data_ = nullptr;
};

Memory<uint16_t>& filled(Memory<uint16_t>& memory, int64_t n, uint64_t seed, double scale) {
  fill_kernel<<<1024, 256>>>(memory.data(), n, seed, float(scale));
  return memory;
}

struct Row {
  const char* name;
  int64_t T, D, F, E, K;
};
constexpr Row kRowsOf[] = {{"1", 40960, 768, 256, 128, 8},   {"3", 40960, 768, 1024, 32, 2},
                           {"5", 24576, 1536, 512, 64, 4},   {"8", 32768, 4096, 512, 128, 8},
                           {"12", 32768, 4096, 2048, 64, 4}, {"14", 8192, 2048, 768, 128, 8}};
constexpr int64_t kCold = int64_t{128} << 20, kWork = int64_t{64} << 20;
constexpr int kPlaces = 2048, kRounds = 5;

// Milliseconds, the median of a few calls with a cold L2 cache.
double time_of(const GroupedGemm& g, const GemmPlan& plan, char* cold, char* work) {
  RowTile* const table = reinterpret_cast<RowTile*>(work + row_table_offset(g.E));
  const auto run = [&] {
    expert_tiles_kernel<><<<1, kTableThreads, kTableSharedBytes>>>(
        g.offsets, g.E, g.R, table_tile_rows(g, plan), plan.table_entries, reinterpret_cast<int64_t*>(work), table);
    check(launch_gemm_instance<S>(g, plan, table, nullptr), "grouped_gemm_kernel");
  };
  run();
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = 0; i < kRounds; ++i) {
    cudaMemsetAsync(cold, i, size_t(kCold));
    cudaEventRecord(begin);
    run();
    cudaEventRecord(end);
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    times.push_back(0);
    cudaEventElapsedTime(&times.back(), begin, end);
  }
  std::sort(times.begin(), times.end());
  return times[kRounds / 2];
}

void measure(const Row& c, char* cold, char* work) {
  const int64_t R = c.T * c.K;
  std::mt19937 random(1);
  std::vector<std::vector<int64_t>> tokens(size_t(c.E), std::vector<int64_t>());
  for (int64_t t = 0; t < c.T; ++t) {
    std::vector<size_t> chosen;
    while (int64_t(chosen.size()) < c.K) {
      const size_t e = random() % size_t(c.E);
      if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e), tokens[e].push_back(t);
    }
  }
  std::vector<int64_t> offsets{0}, token;
  for (const auto& each : tokens) {
    token.insert(token.end(), each.begin(), each.end());
    offsets.push_back(int64_t(token.size()));
  }
  Memory<int64_t> offsets_memory(offsets), token_memory(token);
  Memory<uint16_t> x(c.T * c.D), w_in(2 * c.E * c.F * c.D), w_down(c.E * c.D * c.F), gate(R * c.F), up(R * c.F),
      h(R * c.F), h_out(R * c.F), rows(R * c.D), hidden(2 * R * c.F), d_w(2 * c.E * c.F * c.D);
  filled(x, c.T * c.D, 1, 1);
  filled(w_in, 2 * c.E * c.F * c.D, 2, 1 / std::sqrt(double(c.D)));
  filled(w_down, c.E * c.D * c.F, 3, 1 / std::sqrt(double(c.F)));
  filled(h, R * c.F, 4, 1);
  filled(hidden, 2 * R * c.F, 5, 1);
  const int64_t parts = row_dots_parts(DType::kBFloat16, c.F);
  Memory<float> dots(R * parts), weight(std::vector<float>(size_t(R), 0.3f));

  GroupedGemm base;
  base.E = c.E;
  base.R = R;
  base.offsets = offsets_memory.data();
  base.dtype = DType::kBFloat16;
  const auto matrix = [](const void* data, int64_t width, int64_t expert_stride = 0) {
    Operand o;
    o.data = data;
    o.lane_stride = width;
    o.expert_stride = expert_stride;
    return o;
  };
  const auto gathered = [&](const void* data, int64_t width) {
    Operand o = matrix(data, width);
    o.gather = token_memory.data();
    o.gather_limit = c.T;
    return o;
  };
  const auto turned = [](Operand o) {
    std::swap(o.lane_stride, o.k_stride);
    return o;
  };
  struct Job {
    const char* name;
    GroupedGemm g;
    const uint16_t* out;  // what is compared; null: nothing
    int64_t stride;
  };
  std::vector<Job> jobs;
  jobs.reserve(6);  // references into it stay
  const auto add = [&](const char* name, Kind kind, int64_t M, int64_t N, int64_t K, const Operand& a, const Operand& b,
                       uint16_t* out) -> GroupedGemm& {
    GroupedGemm g = base;
    g.kind = kind, g.M = M, g.N = N, g.K = K, g.a = a, g.b = b;
    g.epilogue.out = out;
    g.epilogue.out_stride = N;
    jobs.push_back({name, g, out, N});
    return jobs.back().g;
  };
  GroupedGemm& first = add("up", Kind::kRows, 0, c.F, c.D, gathered(x.data(), c.D),
                           matrix(w_in.data(), c.D, 2 * c.F * c.D), h_out.data());
  first.gated = true;
  first.b_up = matrix(w_in.data() + c.F * c.D, c.D, 2 * c.F * c.D);
  first.epilogue.kind = Epilogue::Kind::kActivate;
  first.epilogue.gate = gate.data(), first.epilogue.up = up.data();
  first.epilogue.pre_stride = c.F;
  first.epilogue.activation = ffn_ops::kActivations.index("silu");
  jobs.back().out = gate.data();
  add("down", Kind::kRows, 0, c.D, c.F, matrix(h.data(), c.F), matrix(w_down.data(), c.F, c.D * c.F), rows.data());
  GroupedGemm& gradient = add("dH", Kind::kRows, 0, c.F, c.D, gathered(x.data(), c.D),
                              turned(matrix(w_down.data(), c.F, c.D * c.F)), hidden.data());
  Epilogue& e = gradient.epilogue;
  e = first.epilogue;
  e.kind = Epilogue::Kind::kActivateGrad;
  e.out = hidden.data(), e.out_up = hidden.data() + c.F, e.out_stride = 2 * c.F;
  e.h = h_out.data(), e.row_weight = weight.data(), e.row_dots = dots.data(), e.row_dots_stride = parts;
  jobs.back().out = nullptr;
  add("dX", Kind::kRows, 0, c.D, 2 * c.F, matrix(hidden.data(), 2 * c.F),
      turned(matrix(w_in.data(), c.D, 2 * c.F * c.D)), rows.data());
  add("dW_down", Kind::kOuter, c.D, c.F, 0, turned(gathered(x.data(), c.D)), turned(matrix(h.data(), c.F)), d_w.data());
  add("dW_in", Kind::kOuter, 2 * c.F, c.D, 0, turned(matrix(hidden.data(), 2 * c.F)), turned(gathered(x.data(), c.D)),
      d_w.data());

  std::printf("row %s: T %lld, %lld/%lld, E %lld, K %lld\n  %-8s", c.name, (long long)c.T, (long long)c.D,
              (long long)c.F, (long long)c.E, (long long)c.K, "product");
  for (const char* shape : {"short", "tall", "wide"}) std::printf("  %-16s error  ", shape);
  for (Job& job : jobs) {
    std::printf("\n  %-8s", job.name);
    const bool hidden_width = job.g.gated || !std::strcmp(job.name, "dX") || !std::strcmp(job.name, "dW_in");
    const double flops = (hidden_width ? 4.0 : 2.0) * double(R) * double(c.D) * double(c.F);
    for (const GemmShape shape : {GemmShape::kShort, GemmShape::kTall, GemmShape::kWide}) {
      const GemmPlan plan = plan_gemm(job.g, true, &shape);
      const double ms = time_of(job.g, plan, cold, work);
      double error = std::nan("");
      if (job.out) {
        std::vector<Place> places;
        while (places.size() < size_t(kPlaces)) {
          const auto e = int64_t(random() % size_t(c.E));
          const int64_t begin = offsets[size_t(e)], count = offsets[size_t(e) + 1] - begin;
          const int64_t most = job.g.kind == Kind::kRows ? count : job.g.M;
          if (most == 0) continue;
          const int64_t row = int64_t(random() % size_t(most)) + (job.g.kind == Kind::kRows ? begin : 0);
          places.push_back({e, row, int64_t(random() % size_t(job.g.N))});
        }
        Memory<Place> place_memory(places);
        Memory<double> squares(2 * kPlaces);
        compare_kernel<<<kPlaces / 128, 128>>>(job.g, job.out, job.stride, place_memory.data(), squares.data(),
                                               kPlaces);
        std::vector<double> found(2 * kPlaces);
        check(cudaMemcpy(found.data(), squares.data(), found.size() * 8, cudaMemcpyDeviceToHost), "compare_kernel");
        double errors = 0, values = 0;
        for (size_t i = 0; i < found.size(); i += 2) errors += found[i], values += found[i + 1];
        error = std::sqrt(errors / values);
        if (!(error < 0.004)) std::exit((std::printf(" wrong: relative error %g\n", error), 1));
      }
      std::printf("  %7.3f ms %4.0f TF %7.1e", ms, flops / ms * 1e-9, error);
    }
  }
  std::printf("\n");
}

}  // namespace

int main(int count, char** names) {
  Memory<char> cold(kCold), work(kWork);
  for (const Row& row : kRowsOf) {
    bool chosen = count < 2;
    for (int i = 1; i < count; ++i) chosen = chosen || !std::strcmp(names[i], row.name);
    if (chosen) measure(row, cold.data(), work.data());
  }
}
