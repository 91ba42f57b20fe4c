// SPDX-License-Identifier: BSD-3-Clause
// The host functions of csrc/cuda/gemm_grid.h: bounds that must hold whatever the routing is, and sizes beyond 2^31.
#include "../../csrc/cuda/gemm_grid.h"
#include "testing.h"

namespace {

using namespace ffn_ops;
using namespace ffn_ops::cuda;
using simt::check;

GroupedGemm rows_product(DType dtype, int64_t R, int64_t E, int64_t N, int64_t K) {
  static const int64_t offsets = 0;
  GroupedGemm g;
  g.R = R;
  g.E = E;
  g.N = N;
  g.K = K;
  g.dtype = dtype;
  g.offsets = &offsets;
  g.a = {.data = reinterpret_cast<void*>(256), .lane_stride = K};
  g.b = {.data = reinterpret_cast<void*>(512), .lane_stride = K, .expert_stride = N * K};
  return g;
}

// However R rows fall to E experts and to none, there are tiles enough: every way for small numbers.
void test_row_tiles() {
  for (int64_t tile_rows : {1, 2, 3})
    for (int64_t R = 0; R <= 7; ++R)
      for (int64_t E = 1; E <= 3; ++E) {
        int64_t most = 0;
        for (int64_t code = 0; code < 8 * 8 * 8 * 8; ++code) {
          int64_t left = R, tiles = 0;
          for (int64_t e = 0, c = code; e < E; ++e, c /= 8) {
            const int64_t rows = std::min(left, c % 8);
            tiles += divide_up(rows, tile_rows);
            left -= rows;
          }
          most = std::max(most, tiles + divide_up(left, tile_rows));
        }
        check(max_row_tiles(R, E, tile_rows) >= most, "R %lld, E %lld: %lld tiles are needed", (long long)R,
              (long long)E, (long long)most);
        check(max_row_tiles(R, E, tile_rows) <= R / tile_rows + E + 1, "more tiles than R / BLOCK_M + E + 1");
      }
}

void test_large() {
  // 2^33 rows of bfloat16 in 2^7 experts: more elements, rows and bytes than 32 bits hold.
  const GroupedGemm g = rows_product(DType::kBFloat16, int64_t{1} << 33, 128, 4096, 1024);
  const GemmPlan p = plan_gemm(g, false);
  check(p.shape == GemmShape::kTall && p.vector && p.b_along_k, "aligned operands take 16-byte copies and tall tiles");
  check(p.row_tiles == (int64_t{1} << 26) + 129, "row tiles: %lld", (long long)p.row_tiles);
  check(p.blocks == p.row_tiles * 32, "blocks: %lld", (long long)p.blocks);
  check(grouped_gemm_workspace_bytes(g, p) > int64_t{24} << 26, "workspace: %lld",
        (long long)grouped_gemm_workspace_bytes(g, p));
  GroupedGemm outer = g;
  outer.kind = GroupedGemm::Kind::kOuter;
  outer.M = outer.N = int64_t{1} << 21;
  check(plan_gemm(outer, false).blocks == int64_t{128} << 28, "blocks of an outer product: %lld",
        (long long)plan_gemm(outer, false).blocks);
  check(row_dots_parts(DType::kFloat32, (int64_t{1} << 40) + 1) == (int64_t{1} << 33) + 1, "parts of a long row");
}

void test_loaders() {
  const auto plan = [](auto change) {
    GroupedGemm g = rows_product(DType::kBFloat16, 100, 4, 64, 64);
    change(g);
    return plan_gemm(g, false);
  };
  check(plan([](GroupedGemm&) {}).vector, "dense operands");
  check(plan([](GroupedGemm& g) { g.K = 61; }).vector, "a ragged end of k in padded rows");
  check(plan([](GroupedGemm& g) { g.offsets = nullptr, g.E = 1; }).table_entries == 0, "dense: no table");
  check(!plan([](GroupedGemm& g) { g.a.data = reinterpret_cast<void*>(258); }).vector, "a's address");
  check(!plan([](GroupedGemm& g) { g.a.lane_stride = 65; }).vector, "a's rows");
  check(!plan([](GroupedGemm& g) { g.a.k_stride = 2; }).vector, "a's columns");
  check(!plan([](GroupedGemm& g) { g.b.expert_stride = 65; }).vector, "b's experts");
  check(!plan([](GroupedGemm& g) {
           g.gated = true;
           g.b_up = g.b;
           g.b_up.lane_stride = 65;
         }).vector,
        "up's rows");
  const GemmPlan transposed = plan([](GroupedGemm& g) { g.b.lane_stride = 1, g.b.k_stride = 64; });
  check(transposed.vector && !transposed.b_along_k, "transposed weights");
  const GemmPlan outer = plan([](GroupedGemm& g) {
    g.kind = GroupedGemm::Kind::kOuter;
    g.M = 64;
    g.a = g.b = {.data = reinterpret_cast<void*>(256), .lane_stride = 1, .k_stride = 64};
  });
  check(outer.vector && !outer.b_along_k && outer.table_entries == 4, "outer");
}

void test_shapes() {
  using enum GemmShape;
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const bool hopper : {false, true})
      for (const GemmShape shape : {kShort, kTall, kWide})
        check(gemm_tile(dtype, shape, hopper).cols % row_dots_cols(dtype) == 0, "row_dots depend on the tile");
    for (const GemmShape shape : {kShort, kTall})
      check(2 * (gemm_shared_bytes(dtype, shape, false) + 1024) <= 164 * 1024,
            "%s: two blocks do not fit a multiprocessor of sm_80", kDTypeNames[int(dtype)]);
  }
  const auto shape = [](const GroupedGemm& g, bool hopper = false) { return plan_gemm(g, hopper).shape; };
  check(shape(rows_product(DType::kBFloat16, 64, 8, 4096, 64)) == kShort, "8 rows per expert: short tiles");
  check(shape(rows_product(DType::kBFloat16, 512, 1, 512, 64)) == kShort, "few tiles: short ones");
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
    check(shape(rows_product(dtype, 32768, 8, 4096, 64)) == kTall, "many rows per expert: tall tiles");

  GroupedGemm large = rows_product(DType::kBFloat16, 32768, 8, 4096, 1024);
  check(plan_gemm(large, true).hopper && shape(large, true) == kWide, "Hopper: wide tiles");
  check(!plan_gemm(rows_product(DType::kFloat32, 32768, 8, 4096, 64), true).hopper, "wgmma is for 16 bits");
  check(shape(rows_product(DType::kBFloat16, 16384, 8, 192, 1024), true) == kTall, "too few wide tiles: tall ones");
  large.epilogue.kind = Epilogue::Kind::kActivateGrad;
  check(shape(large, true) == kTall, "an activation's gradient: tall tiles");
  large.a.lane_stride = 65;
  check(shape(large, true) == kShort, "no 16-byte copies: short tiles");

  check(plan_gemm(rows_product(DType::kFloat32, 0, 8, 4096, 64), false).blocks == 0, "no rows: no blocks");
  GroupedGemm none = rows_product(DType::kFloat32, 0, 0, 8, 8);
  none.kind = GroupedGemm::Kind::kOuter;
  none.M = 8;
  check(plan_gemm(none, false).blocks == 0, "no experts: no blocks");
}

}  // namespace

int main() {
  test_row_tiles();
  test_large();
  test_loaders();
  test_shapes();
  return simt::report("gemm_grid_test");
}
