#include "tf32_sm90.h"

#include "sm90_host.h"
#include "tf32_held_sm90.cuh"
#include "tf32_sm90_tuning.h"
#include "tf32_streamed_sm90.cuh"

#include <iterator>
#include <utility>

namespace mhmatmul::cuda {
namespace {

using namespace sm90;

constexpr int64_t kFloatSize = sizeof(float);

tuning::Sizes sizes_of(const HeadGemm& gemm) { return {gemm.m, gemm.n, gemm.k, gemm.batch, gemm.indices != nullptr}; }

CUtensorMap map_of_a(const HeadGemm& gemm, int rows) {
  return tensor_map(gemm.a, {gemm.k, gemm.batch, gemm.m, gemm.a_batch_stride, gemm.a_stride, kFloats, 1, rows},
                    CU_TENSOR_MAP_DATA_TYPE_TFLOAT32);
}

// Parts of 32 columns by `k` of their elements or, transposed, by 32.
CUtensorMap map_of_b(const HeadGemm& gemm, int k) {
  const Operand& b = gemm.b;
  const int64_t rows = b.transposed ? gemm.n : gemm.k, width = b.transposed ? gemm.k : gemm.n;
  return tensor_map(b.data, {width, rows, gemm.batch, b.ld, b.batch_stride, kFloats, b.transposed ? kFloats : k, 1},
                    CU_TENSOR_MAP_DATA_TYPE_TFLOAT32);
}

// `rows`: of A, that come together; `k`: of B's elements along k.
template <class Params>
Params params_of(const HeadGemm& gemm, int rows, int k) {
  Params params{};
  params.a = map_of_a(gemm, rows);
  params.b = map_of_b(gemm, k);
  params.bias = static_cast<const float*>(gemm.bias);
  params.bias_batch_stride = gemm.bias_batch_stride;
  params.c = static_cast<float*>(gemm.c);
  params.c_stride = gemm.c_stride;
  params.c_batch_stride = gemm.c_batch_stride;
  params.m = static_cast<int>(gemm.m);
  params.n = static_cast<int>(gemm.n);
  return params;
}

template <class Tile>
void launch_held(const HeadGemm& gemm, cudaStream_t stream) {
  auto params = params_of<Tf32HeldParams>(gemm, Tile::kM, Tile::kK);
  params.is_b_transposed = gemm.b.transposed;
  params.cut = tuning::cut_of(sizes_of(gemm), Tile::kSize, multiprocessors_here());
  sm90::launch<tf32_held_kernel<Tile>>(dim3(params.cut.blocks), Tile::kThreads, Tile::kBytes, /*cluster=*/1, stream,
                                       params);
}

void launch_streamed(const HeadGemm& gemm, cudaStream_t stream) {
  using Tile = Tf32StreamedTile;
  auto params = params_of<Tf32StreamedParams>(gemm, Tile::kBox, kFloats);
  params.k_blocks = static_cast<int>((gemm.k + 2 * kFloats - 1) / (2 * kFloats) * 2);
  params.deal = tuning::deal_of(sizes_of(gemm), multiprocessors_here()).value();
  sm90::launch<tf32_streamed_kernel<Tile>>(dim3(params.deal.blocks), Tile::kThreads, Tile::kBytes, params.deal.team,
                                           stream, params);
}

constexpr bool is(const tuning::Tf32Size& size, const HeadGemm& gemm) {
  return gemm.tile_m == size.m && gemm.tile_n == size.n && gemm.tile_k == size.k;
}

template <size_t... i>
bool launch_held_chosen(const HeadGemm& gemm, cudaStream_t stream, std::index_sequence<i...>) {
  constexpr const auto& sizes = tuning::kTf32Held;
  return ((is(sizes[i], gemm) && (launch_held<Tf32HeldTile<sizes[i].m, sizes[i].n, sizes[i].k>>(gemm, stream), true)) ||
          ...);
}

}  // namespace

bool takes_tf32_sm90(HeadGemm& gemm) {
  if (!runs_here()) return false;
  if (!are_countable({gemm.m, gemm.n, gemm.k, gemm.batch})) return false;
  const auto fits = [&](const void* data, int64_t rows, int64_t stride, int64_t batch_stride, int64_t alignment) {
    return is_walkable(data, rows, stride, gemm.batch, batch_stride, kFloatSize, alignment);
  };
  if (!fits(gemm.a, gemm.m, gemm.a_stride, gemm.a_batch_stride, kAlignment) ||
      !fits(gemm.b.data, gemm.b.transposed ? gemm.n : gemm.k, gemm.b.ld, gemm.b.batch_stride, kAlignment) ||
      !fits(gemm.c, gemm.m, gemm.c_stride, gemm.c_batch_stride, tuning::kSectorBytes))
    return false;
  const auto tile = tuning::preferred_tf32(sizes_of(gemm), gemm.b.transposed, multiprocessors_here());
  if (!tile) return false;
  gemm.tile_m = tile->m;
  gemm.tile_n = tile->n;
  gemm.tile_k = tile->k;
  return true;
}

void run_tf32_sm90(const HeadGemm& gemm, cudaStream_t stream) {
  if (is(tuning::kTf32Streamed, gemm)) return launch_streamed(gemm, stream);
  if (!launch_held_chosen(gemm, stream, std::make_index_sequence<std::size(tuning::kTf32Held)>()))
    throw std::logic_error("run_tf32_sm90 without takes_tf32_sm90");
}

}  // namespace mhmatmul::cuda
