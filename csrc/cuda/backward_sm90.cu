#include "backward_sm90.h"

#include "backward_sm90.cuh"
#include "backward_sm90_tuning.h"
#include "sm90_host.h"

namespace mhmatmul::cuda {
namespace {

using namespace sm90;

int clusters_of(const HeadBackward& backward) {
  return multiprocessors_here() / tuning::backward_tile_shape(backward).cluster;
}

BackwardCut cut(const HeadBackward& backward) {
  const auto tile = tuning::backward_tile_shape(backward);
  const int64_t inputs_of_cluster = int64_t{tile.hd} * tile.cluster;
  BackwardCut cut{};
  cut.heads = static_cast<int>(backward.heads);
  cut.hd_groups = static_cast<int>((backward.hd + inputs_of_cluster - 1) / inputs_of_cluster);
  cut.row_tiles = static_cast<int>((backward.m + kRows - 1) / kRows);
  cut.teams = clusters_of(backward);
  // A split's sum is written and read in float32: so many tiles' bytes.
  const auto hd = static_cast<double>(backward.hd), e = static_cast<double>(backward.e);
  choose_splits(cut, tuning::kTilesPerSegment, 8 * hd * e / (kRows * kElementSize * (e + 2 * hd)));
  cut.teams = std::min(cut.teams, cut.segments());
  return cut;
}

template <class Tile>
void run(const HeadBackward& backward, float* partial, cudaStream_t stream) {
  const int64_t hd = backward.hd, e = backward.e, heads = backward.heads, m = backward.m;
  const bool is_bfloat16 = backward.is_bfloat16;
  constexpr int kColumns = kRowBytes / kElementSize;
  BackwardParams params{};
  params.cut = cut(backward);
  params.m = static_cast<int>(m);
  params.hd = static_cast<int>(hd);
  params.e = static_cast<int>(e);
  params.wants_input = backward.grad_input != nullptr;
  params.grad_weight = backward.grad_weight;
  params.partial = params.cut.splits > 1 ? partial : nullptr;
  if (params.wants_input)
    params.weight = tensor_map(
        backward.weight, {e, hd, heads, backward.weight_stride, backward.weight_head_stride, kColumns, Tile::kHd, 1},
        is_bfloat16);
  const auto grad_output = [&](int rows) {
    return tensor_map(backward.grad_output,
                      {e, heads, m, backward.grad_output_head_stride, backward.grad_output_stride, kColumns, 1, rows},
                      is_bfloat16);
  };
  params.grad_output = grad_output(kRows / Tile::kCluster);
  if constexpr (Tile::kGathers) {
    params.grad_output_row = grad_output(1);
    params.indices = backward.indices;
    params.named_rows = backward.named_rows;
    params.input_rows = backward.input;
    params.input_stride = backward.input_stride;
    params.input_head_stride = backward.input_head_stride;
    params.grad_input_rows = backward.grad_input;
  } else {
    const auto rows = [&](const void* data, int64_t head_stride, int64_t stride) {
      return tensor_map(data, {hd, heads, m, head_stride, stride, kColumns, 1, kRows}, is_bfloat16);
    };
    params.input = rows(backward.input, backward.input_head_stride, backward.input_stride);
    if (params.wants_input) params.grad_input = rows(backward.grad_input, hd, heads * hd);
  }
  launch<backward_kernel<Tile>>(dim3(params.cut.teams * Tile::kCluster), Tile::kThreads, kBackwardBytes<Tile>,
                                Tile::kCluster, stream, params);
  if (!params.partial) return;
  constexpr int kThreads = 256, kPerThread = 4;
  const int64_t count = heads * hd * e / kPerThread;
  launch<add_splits_kernel<typename Tile::Element>>(
      dim3(static_cast<unsigned int>((count + kThreads - 1) / kThreads)), kThreads, 0, 1, stream,
      reinterpret_cast<const float4*>(partial), params.cut.splits, count, static_cast<uint2*>(backward.grad_weight));
}

template <class Element, bool gathers>
void run_element(const HeadBackward& backward, float* partial, cudaStream_t stream) {
  const auto tile = tuning::backward_tile_shape(backward);
  if (tile.e == 64) return run<BackwardTile<Element, 64, 64, 1, gathers>>(backward, partial, stream);
  if (tile.e == 128) return run<BackwardTile<Element, 128, 128, 1, gathers>>(backward, partial, stream);
  if (tile.e == 512) return run<BackwardTile<Element, 64, 512, 2, gathers>>(backward, partial, stream);
  if (tile.cluster == 1) return run<BackwardTile<Element, 128, 256, 1, gathers>>(backward, partial, stream);
  return run<BackwardTile<Element, 128, 256, 2, gathers>>(backward, partial, stream);
}

template <class Element>
void run_indices(const HeadBackward& backward, float* partial, cudaStream_t stream) {
  if (backward.indices) return run_element<Element, true>(backward, partial, stream);
  return run_element<Element, false>(backward, partial, stream);
}

}  // namespace

bool takes_backward_sm90(const HeadBackward& backward) {
  if (!runs_here() || tuning::backward_tile_shape(backward).hd == 0) return false;
  if (!are_countable({backward.m, backward.hd, backward.e, backward.heads, backward.named_rows})) return false;
  constexpr int64_t kMostHeads = 1 << 20;  // segments are counted in an int
  if (backward.heads > kMostHeads) return false;
  if (backward.hd % 8 != 0 || backward.e % 8 != 0) return false;
  const auto takes_weight = [&] {
    return is_walkable(backward.weight, backward.hd, backward.weight_stride, backward.heads,
                       backward.weight_head_stride);
  };
  return is_walkable(backward.grad_output, backward.m, backward.grad_output_stride, backward.heads,
                     backward.grad_output_head_stride) &&
         is_walkable(backward.input, backward.named_rows, backward.input_stride, backward.heads,
                     backward.input_head_stride) &&
         (!backward.grad_input || takes_weight()) &&
         tuning::prefers_one_pass(backward, cut(backward), clusters_of(backward));
}

int64_t partial_of_backward_sm90(const HeadBackward& backward) {
  const int splits = cut(backward).splits;
  return splits > 1 ? splits * backward.heads * backward.hd * backward.e : 0;
}

void run_backward_sm90(const HeadBackward& backward, float* partial, cudaStream_t stream) {
  if (backward.is_bfloat16) return run_indices<cute::bfloat16_t>(backward, partial, stream);
  return run_indices<cute::half_t>(backward, partial, stream);
}

}  // namespace mhmatmul::cuda
