#include "tf32_sm90.h"

#include "sm90_host.h"
#include "tf32_sm90.cuh"
#include "tf32_sm90_tuning.h"

#include <iterator>
#include <utility>

namespace mhmatmul::cuda {
namespace {

using namespace sm90;

constexpr int64_t kFloatSize = sizeof(float);

tuning::Sizes sizes_of(const HeadGemm& gemm) { return {gemm.m, gemm.n, gemm.k, gemm.batch, gemm.indices != nullptr}; }

template <class Tile>
void launch(const HeadGemm& gemm, cudaStream_t stream) {
  const int multiprocessors = attribute_of_device(cudaDevAttrMultiProcessorCount);
  Tf32Params params{};
  params.cut = tuning::cut_of(sizes_of(gemm), Tile::kSize, multiprocessors);
  params.is_paired = Tile::kPairs && params.cut.n_blocks % 2 == 0 && params.cut.blocks > 1;
  if (params.is_paired) params.cut.blocks -= params.cut.blocks % 2;
  params.bias = static_cast<const float*>(gemm.bias);
  params.bias_batch_stride = gemm.bias_batch_stride;
  params.n = static_cast<int>(gemm.n);
  params.is_b_transposed = gemm.b.transposed;
  params.c_leaves_cache = gemm.m * gemm.n * gemm.batch * kFloatSize > tuning::kBytesCacheKeeps;
  params.a = tensor_map(gemm.a, {gemm.k, gemm.batch, gemm.m, gemm.a_batch_stride, gemm.a_stride, kFloats, 1, Tile::kM},
                        CU_TENSOR_MAP_DATA_TYPE_TFLOAT32);
  const int64_t b_rows = gemm.b.transposed ? gemm.n : gemm.k, b_width = gemm.b.transposed ? gemm.k : gemm.n;
  params.b = tensor_map(
      gemm.b.data,
      {b_width, b_rows, gemm.batch, gemm.b.ld, gemm.b.batch_stride, kFloats, gemm.b.transposed ? kFloats : Tile::kK, 1},
      CU_TENSOR_MAP_DATA_TYPE_TFLOAT32);
  params.c = tensor_map(gemm.c, {gemm.n, gemm.batch, gemm.m, gemm.c_batch_stride, gemm.c_stride, kFloats, 1, Tile::kM},
                        CU_TENSOR_MAP_DATA_TYPE_FLOAT32);
  check(cudaFuncSetAttribute(tf32_kernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kBytes),
        "cudaFuncSetAttribute");
  sm90::launch(tf32_kernel<Tile>, dim3(params.cut.blocks), Tile::kThreads, Tile::kBytes,
               /*cluster=*/params.is_paired ? 2 : 1, stream, params);
}

template <class Tile>
bool launch_if_chosen(const HeadGemm& gemm, cudaStream_t stream) {
  if (gemm.tile_m != Tile::kM || gemm.tile_n != Tile::kN || gemm.tile_k != Tile::kK) return false;
  launch<Tile>(gemm, stream);
  return true;
}

template <size_t... i>
void launch_chosen(const HeadGemm& gemm, cudaStream_t stream, std::index_sequence<i...>) {
  constexpr const auto& sizes = tuning::kTf32Sizes;
  if (!(launch_if_chosen<Tf32Tile<sizes[i].k, sizes[i].units, sizes[i].groups>>(gemm, stream) || ...))
    throw std::logic_error("run_tf32_sm90 without takes_tf32_sm90");
}

}  // namespace

bool takes_tf32_sm90(HeadGemm& gemm) {
  if (!runs_here()) return false;
  if (!are_countable({gemm.m, gemm.n, gemm.k, gemm.batch})) return false;
  const auto fits = [&](const void* data, int64_t rows, int64_t stride, int64_t batch_stride) {
    return is_walkable(data, rows, stride, gemm.batch, batch_stride, kFloatSize);
  };
  if (!fits(gemm.a, gemm.m, gemm.a_stride, gemm.a_batch_stride) ||
      !fits(gemm.b.data, gemm.b.transposed ? gemm.n : gemm.k, gemm.b.ld, gemm.b.batch_stride) ||
      !fits(gemm.c, gemm.m, gemm.c_stride, gemm.c_batch_stride))
    return false;
  const auto tile =
      tuning::preferred_tf32(sizes_of(gemm), gemm.b.transposed, attribute_of_device(cudaDevAttrMultiProcessorCount));
  if (!tile) return false;
  gemm.tile_m = tile->m();
  gemm.tile_n = tile->n();
  gemm.tile_k = tile->k;
  return true;
}

void run_tf32_sm90(const HeadGemm& gemm, cudaStream_t stream) {
  launch_chosen(gemm, stream, std::make_index_sequence<std::size(tuning::kTf32Sizes)>());
}

}  // namespace mhmatmul::cuda
