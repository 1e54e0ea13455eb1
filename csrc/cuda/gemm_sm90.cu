#include "gemm_sm90.h"

#include "gemm_sm90.cuh"
#include "gemm_sm90_tuning.h"
#include "sm90_host.h"

#include <algorithm>

namespace mhmatmul::cuda {
namespace {

using namespace sm90;

template <class Tile>
Cut cut(const HeadGemm& gemm, int multiprocessors) {
  const auto blocks = [](int64_t size, int block) { return static_cast<int>((size + block - 1) / block); };
  Cut cut{};
  cut.m_blocks = blocks(gemm.m, Tile::kM);
  cut.n_blocks = blocks(gemm.n, Tile::kN);
  cut.k_blocks = blocks(gemm.k, kDepth);
  cut.heads = static_cast<int>(gemm.batch);
  share_out(cut, multiprocessors);

  constexpr int kBytes = kSharedBytes - kFixedBytes<Tile>;
  constexpr int kLeastOfA = 2, kWantedOfA = 4;  // stages
  cut.b_stays = cut.k_blocks <= kMaxStages && cut.k_blocks * Tile::kBBytes + kLeastOfA * Tile::kABytes <= kBytes;
  if (cut.b_stays) {
    // Twice B, so that the next group's comes while this one's is used, as far as A keeps what it wants.
    const int room = (kBytes - kWantedOfA * Tile::kABytes) / Tile::kBBytes;
    cut.b_stages =
        std::min(kMaxStages, std::max(cut.k_blocks, cut.m_blocks == 1 ? room : std::min(2 * cut.k_blocks, room)));
    cut.a_stages = std::min(kMaxStages, (kBytes - cut.b_stages * Tile::kBBytes) / Tile::kABytes);
  } else {
    cut.a_stages = cut.b_stages = std::min(kMaxStages, kBytes / (Tile::kABytes + Tile::kBBytes));
  }
  return cut;
}

template <class Tile>
void launch(const HeadGemm& gemm, cudaStream_t stream) {
  Params params{};
  params.cut = cut<Tile>(gemm, attribute_of_device(cudaDevAttrMultiProcessorCount));
  params.rows = gemm.a;
  params.indices = gemm.indices;
  params.a_stride = gemm.a_stride;
  params.a_batch_stride = gemm.a_batch_stride;
  params.a_rows = gemm.a_rows;
  params.rows_given = gemm.rows_given;
  params.bias = gemm.bias;
  params.bias_batch_stride = gemm.bias_batch_stride;
  params.m = static_cast<int>(gemm.m);
  params.n = static_cast<int>(gemm.n);
  params.k = static_cast<int>(gemm.k);
  params.c_leaves_cache = gemm.m * gemm.n * gemm.batch * kElementSize > tuning::kBytesCacheKeeps;
  if (!Tile::kGathers)
    params.a = tensor_map(gemm.a, {gemm.k, gemm.batch, gemm.m, gemm.a_batch_stride, gemm.a_stride, kDepth, 1, Tile::kM},
                          gemm.is_bfloat16);
  params.b = tensor_map(gemm.b.data,
                        Tile::kTransposed
                            ? Layout{gemm.k, gemm.n, gemm.batch, gemm.b.ld, gemm.b.batch_stride, kDepth, Tile::kN, 1}
                            : Layout{gemm.n, gemm.k, gemm.batch, gemm.b.ld, gemm.b.batch_stride, kDepth, kDepth, 1},
                        gemm.is_bfloat16);
  params.c = tensor_map(gemm.c, {gemm.n, gemm.batch, gemm.m, gemm.c_batch_stride, gemm.c_stride, kDepth, 1, Tile::kM},
                        gemm.is_bfloat16);
  const int bytes = kFixedBytes<Tile> + params.cut.a_stages * Tile::kABytes + params.cut.b_stages * Tile::kBBytes;
  check(cudaFuncSetAttribute(head_gemm_kernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "cudaFuncSetAttribute");
  sm90::launch(head_gemm_kernel<Tile>, dim3(params.cut.lanes * params.cut.teams), kThreads, bytes, /*cluster=*/1,
               stream, params);
}

template <class Element, int m, int n>
void launch_tile(const HeadGemm& gemm, cudaStream_t stream) {
  if (gemm.indices) {
    if (gemm.b.transposed) return launch<Tile<Element, m, n, true, true>>(gemm, stream);
    return launch<Tile<Element, m, n, true, false>>(gemm, stream);
  }
  if (gemm.b.transposed) return launch<Tile<Element, m, n, false, true>>(gemm, stream);
  return launch<Tile<Element, m, n, false, false>>(gemm, stream);
}

template <class Element>
void launch_element(const HeadGemm& gemm, cudaStream_t stream) {
  const auto tile = tuning::tile_size(gemm);
  if (tile.n == 64) return launch_tile<Element, 128, 64>(gemm, stream);
  if (tile.n == 256) return launch_tile<Element, 64, 256>(gemm, stream);
  if (tile.m == 64) return launch_tile<Element, 64, 128>(gemm, stream);
  return launch_tile<Element, 128, 128>(gemm, stream);
}

}  // namespace

bool takes_sm90(const HeadGemm& gemm) {
  if (!runs_here()) return false;
  constexpr int64_t kLargest = INT32_MAX - 256;  // a tile's end is an int, too
  for (const int64_t size : {gemm.m, gemm.n, gemm.k, gemm.batch, gemm.a_rows})
    if (size < 1 || size > kLargest) return false;
  if (gemm.indices && gemm.k % (kAlignment / kElementSize) != 0) return false;  // copied in whole 16 bytes
  if (!is_walkable(gemm.a, gemm.a_rows, gemm.a_stride, gemm.batch, gemm.a_batch_stride)) return false;
  if (!is_walkable(gemm.c, gemm.m, gemm.c_stride, gemm.batch, gemm.c_batch_stride)) return false;
  const int64_t b_outer = gemm.b.transposed ? gemm.n : gemm.k;
  if (!is_walkable(gemm.b.data, b_outer, gemm.b.ld, gemm.batch, gemm.b.batch_stride)) return false;
  return tuning::prefers_sm90(gemm, attribute_of_device(cudaDevAttrMultiProcessorCount));
}

void run_sm90(const HeadGemm& gemm, cudaStream_t stream) {
  if (gemm.is_bfloat16) return launch_element<cute::bfloat16_t>(gemm, stream);
  return launch_element<cute::half_t>(gemm, stream);
}

}  // namespace mhmatmul::cuda
