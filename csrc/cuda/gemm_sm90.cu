#include "gemm_sm90.h"

#include "gemm_sm90.cuh"
#include "gemm_sm90_tuning.h"
#include "held_sm90.cuh"
#include "one_wave_sm90.cuh"
#include "sm90_host.h"

#include <algorithm>
#include <optional>

namespace mhmatmul::cuda {
namespace {

using namespace sm90;

tuning::Sizes sizes_of(const HeadGemm& gemm) { return {gemm.m, gemm.n, gemm.k, gemm.batch, gemm.indices != nullptr}; }

// Whether rows of `width` elements of each head begin or end within what memory moves at a time.
bool splits_sectors(const void* data, int64_t width, int64_t stride, int64_t head_stride) {
  constexpr int64_t kSector = 32;
  return reinterpret_cast<uintptr_t>(data) % kSector != 0 ||
         (width | stride | head_stride) * kElementSize % kSector != 0;
}

// `rows` of `width` elements of each head, if they are said to be loose or the copy engine cannot take them.
Loose loose(const void* data, int64_t rows, int64_t width, int64_t heads, int64_t stride, int64_t head_stride,
            bool is_loose = false) {
  if (!is_loose && is_walkable(data, rows, stride, heads, head_stride)) return {};
  const auto* const elements = static_cast<const uint16_t*>(data);
  const bool in_words = reinterpret_cast<uintptr_t>(data) % sizeof(uint32_t) == 0 && width % 2 == 0 &&
                        stride % 2 == 0 && head_stride % 2 == 0;
  return {const_cast<uint16_t*>(elements), stride, head_stride, in_words};
}

LooseOperands loose_of(const HeadGemm& gemm) {
  const int64_t b_rows = gemm.b.transposed ? gemm.n : gemm.k, b_width = gemm.b.transposed ? gemm.k : gemm.n;
  const bool is_c_in_pieces = gemm.n % 8 == 0;  // of 16 bytes, as threads write it
  return {loose(gemm.a, gemm.a_rows, gemm.k, gemm.batch, gemm.a_stride, gemm.a_batch_stride),
          loose(gemm.b.data, b_rows, b_width, gemm.batch, gemm.b.ld, gemm.b.batch_stride),
          loose(gemm.c, gemm.m, gemm.n, gemm.batch, gemm.c_stride, gemm.c_batch_stride, !is_c_in_pieces)};
}

template <class Tile>
Cut cut(const HeadGemm& gemm, int multiprocessors) {
  constexpr tuning::TileSize kSize{Tile::kM, Tile::kN};
  const tuning::Sizes sizes = sizes_of(gemm);
  Cut cut = tuning::cut_of(sizes, kSize, multiprocessors);
  const bool a_splits = splits_sectors(gemm.a, gemm.k, gemm.a_stride, gemm.a_batch_stride);
  const bool c_splits = splits_sectors(gemm.c, gemm.n, gemm.c_stride, gemm.c_batch_stride);
  // B stays where A keeps two stages; the warpgroups share a tile of C where A would else have too little.
  constexpr int kBytes = kSharedBytes - kFixedBytes;
  const auto room_for_a = [&] { return kBytes - cut.c_tiles * Tile::kCBytes - cut.b_stages * Tile::kBBytes; };
  cut.b_stages = cut.k_blocks;
  const bool through_tiles =
      Tile::kLoose ? loose_of(gemm).c.data != nullptr : tuning::prefers_tiles_of_c(sizes, a_splits, c_splits);
  cut.c_tiles = through_tiles ? 2 : 0;
  if (cut.c_tiles > 0 && room_for_a() < tuning::kLeastBytesOfA) cut.c_tiles = 1;
  cut.b_stays = cut.k_blocks <= kMaxStages && room_for_a() >= 2 * Tile::kABytes;
  if (!cut.b_stays) {
    cut.a_stages = cut.b_stages =
        std::min(kMaxStages, (kBytes - cut.c_tiles * Tile::kCBytes) / (Tile::kABytes + Tile::kBBytes));
    return cut;
  }
  if (cut.step == 1 && cut.pieces() > cut.blocks) {
    // The next piece of B comes while this one is used, or several where each has but one tile, as far as A keeps what
    // it needs.
    const int spare = std::max(0, room_for_a() - tuning::kLeastBytesOfA) / Tile::kBBytes;
    const int wanted = cut.m_blocks == 1 ? kMaxStages : 2 * cut.k_blocks;
    cut.b_stages = std::min({kMaxStages, wanted, cut.k_blocks + spare});
  }
  const int most = tuning::most_stages_of_a(kSize, sizes, !Tile::kLoose && c_splits);
  cut.a_stages = std::min(most, room_for_a() / Tile::kABytes);
  return cut;
}

// From the first to the last of `rows` of `width` elements of each head.
Span span_of(const void* data, int64_t rows, int64_t width, int64_t heads, int64_t stride, int64_t head_stride) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const int64_t elements = (rows - 1) * stride + (heads - 1) * head_stride + width;
  return {begin, begin + static_cast<uintptr_t>(elements * kElementSize)};
}
Span span_of_b(const HeadGemm& gemm) {
  const auto& b = gemm.b;
  return b.transposed ? span_of(b.data, gemm.n, gemm.k, gemm.batch, b.ld, b.batch_stride)
                      : span_of(b.data, gemm.k, gemm.n, gemm.batch, b.ld, b.batch_stride);
}
Span span_of_c(const HeadGemm& gemm) {
  return span_of(gemm.c, gemm.m, gemm.n, gemm.batch, gemm.c_stride, gemm.c_batch_stride);
}

// `rows` of A come at a time.
template <class Tile>
Params params_of(const HeadGemm& gemm, const Cut& cut, int rows) {
  Params params{};
  params.cut = cut;
  params.rows = gemm.a;
  params.c_rows = gemm.c;
  params.indices = gemm.indices;
  params.a_stride = gemm.a_stride;
  params.a_batch_stride = gemm.a_batch_stride;
  params.a_rows = gemm.a_rows;
  params.c_stride = gemm.c_stride;
  params.c_batch_stride = gemm.c_batch_stride;
  params.rows_given = gemm.rows_given;
  params.bias = gemm.bias;
  params.bias_batch_stride = gemm.bias_batch_stride;
  params.m = static_cast<int>(gemm.m);
  params.n = static_cast<int>(gemm.n);
  params.k = static_cast<int>(gemm.k);
  params.c_leaves_cache = gemm.m * gemm.n * gemm.batch * kElementSize > tuning::kBytesCacheKeeps;
  params.loose = loose_of(gemm);
  if (!Tile::kGathers && !params.loose.a.data)
    params.a = tensor_map(gemm.a, {gemm.k, gemm.batch, gemm.m, gemm.a_batch_stride, gemm.a_stride, kDepth, 1, rows},
                          gemm.is_bfloat16);
  if (!params.loose.b.data)
    params.b = tensor_map(gemm.b.data,
                          Tile::kTransposed ? Layout{gemm.k, gemm.n, gemm.batch, gemm.b.ld, gemm.b.batch_stride, kDepth,
                                                     Tile::kBoxRowsOfB, 1}
                                            : Layout{gemm.n / Tile::kHeads, gemm.k, gemm.batch, gemm.b.ld,
                                                     gemm.b.batch_stride, std::min(kDepth, Tile::kHeadN), kDepth, 1},
                          gemm.is_bfloat16);
  if (!params.loose.c.data)
    params.c = tensor_map(gemm.c, {gemm.n, gemm.batch, gemm.m, gemm.c_batch_stride, gemm.c_stride, kDepth, 1, Tile::kM},
                          gemm.is_bfloat16);
  return params;
}

template <class Tile>
void launch(const HeadGemm& gemm, cudaStream_t stream) {
  const Cut own = cut<Tile>(gemm, multiprocessors_here());
  const int bytes =
      kFixedBytes + own.a_stages * Tile::kABytes + own.b_stages * Tile::kBBytes + own.c_tiles * Tile::kCBytes;
  sm90::launch<head_gemm_kernel<Tile>>(dim3(own.blocks), kThreads, bytes, /*cluster=*/1, stream,
                                       params_of<Tile>(gemm, own, Tile::kM));
}

// A product of as many blocks as work at once, all of them.
struct OneWave {
  Cut cut;
  int rows, each, bytes;  // each: how many blocks a multiprocessor has at most

  dim3 grid() const { return dim3(cut.n_blocks, cut.heads, cut.m_blocks); }
};

// Of a block, where a multiprocessor shall have no more than `most`: shared memory that nobody needs keeps others away.
template <class Tile>
int bytes_of_block(const OneWave& wave, int most) {
  const int least = kSharedOfMultiprocessor / (most + 1) - kSharedReserved + kSharedAlignment / 4;
  return std::max(bytes_of_one_wave<Tile>(wave.cut.b_stages, wave.rows), least);
}

template <class Tile>
std::optional<OneWave> one_wave(const HeadGemm& gemm, int multiprocessors) {
  if (gemm.indices || gemm.k > kMostDepths * kDepth) return std::nullopt;
  const auto share = [](int64_t whole, int64_t parts) { return (whole + parts - 1) / parts; };
  const int64_t m_blocks = share(gemm.m, kOneWaveRows), n_blocks = share(gemm.n, Tile::kN);
  const int64_t most = int64_t{kMostBlocks<Tile>} * multiprocessors;
  if (m_blocks > most || n_blocks > most || gemm.batch > most || m_blocks * n_blocks * gemm.batch > most)
    return std::nullopt;
  OneWave wave{};
  wave.cut.m_blocks = static_cast<int>(m_blocks);
  wave.cut.n_blocks = static_cast<int>(n_blocks);
  wave.cut.k_blocks = static_cast<int>(share(gemm.k, kDepth));
  wave.cut.heads = static_cast<int>(gemm.batch);
  wave.rows = static_cast<int>(std::min<int64_t>(kOneWaveRows, share(gemm.m, 8) * 8));
  wave.each = static_cast<int>(share(m_blocks * n_blocks * gemm.batch, multiprocessors));
  wave.cut.b_stages = tuning::stages_of_one_wave(wave.cut.k_blocks, wave.each);
  wave.bytes = bytes_of_block<Tile>(wave, wave.each);
  if (wave.each * (wave.bytes + kSharedReserved) > kSharedOfMultiprocessor) return std::nullopt;
  return wave;
}

// Makes room beside blocks of the kernel ahead, taken to be as large: for all on a multiprocessor, or for one.
template <class Tile>
void make_room_beside(OneWave& wave) {
  const int fixed = bytes_of_one_wave<Tile>(0, wave.rows), of_stage = bytes_of_one_wave<Tile>(1, wave.rows) - fixed;
  for (const int most : {2 * wave.each, wave.each + 1}) {
    const int room = kSharedOfMultiprocessor / most - kSharedReserved - fixed;
    const int stages = std::min(wave.cut.k_blocks, room / of_stage);
    if (!tuning::are_enough_beside(stages, wave.cut.k_blocks)) continue;
    wave.cut.b_stages = stages;
    wave.bytes = bytes_of_block<Tile>(wave, most);
    return;
  }
}

template <class Element, bool transposed>
using Narrow = Tile<Element, kOneWaveRows, 64, false, transposed>;
template <class Element, bool transposed>
using Wide = Tile<Element, kOneWaveRows, 128, false, transposed>;

bool is_one_wave(const HeadGemm& gemm, int multiprocessors) {
  using Element = cute::half_t;  // of the same size
  return one_wave<Narrow<Element, false>>(gemm, multiprocessors) ||
         one_wave<Wide<Element, false>>(gemm, multiprocessors);
}

template <class Tile>
bool launch_one_wave(const HeadGemm& gemm, cudaStream_t stream) {
  auto wave = one_wave<Tile>(gemm, multiprocessors_here());
  if (!wave) return false;
  const LastCaptured before = last_captured(stream);
  const bool b_is_early = may_read_early(before, span_of_b(gemm));
  if (b_is_early) make_room_beside<Tile>(*wave);
  launch_behind<one_wave_kernel<Tile>>(before, span_of_c(gemm), wave->grid(), kGroup, wave->bytes, /*cluster=*/1,
                                       stream, params_of<Tile>(gemm, wave->cut, wave->rows), wave->rows, b_is_early);
  return true;
}

// Where it is preferred and each block has one group of tiles.
template <class Tile>
bool launch_held(const HeadGemm& gemm, cudaStream_t stream) {
  if (!tuning::prefers_held(sizes_of(gemm))) return false;
  const Cut cut = tuning::cut_of(sizes_of(gemm), {Tile::kM, Tile::kN}, multiprocessors_here());
  if (cut.groups() != cut.blocks) return false;
  sm90::launch<held_kernel<Tile>>(dim3(cut.blocks), Tile::kThreads, Tile::kBytes, /*cluster=*/1, stream,
                                  params_of<Tile>(gemm, cut, Tile::kM));
  return true;
}

template <class Element, bool transposed>
bool launch_one_wave(const HeadGemm& gemm, cudaStream_t stream) {
  return launch_one_wave<Narrow<Element, transposed>>(gemm, stream) ||
         launch_one_wave<Wide<Element, transposed>>(gemm, stream);
}

// How many heads a tile of 64 columns of A and of C holds: 1, or as many as lie side by side in all operands.
int heads_of_tile(const HeadGemm& gemm) {
  const bool is_packed = gemm.k == gemm.n && (gemm.k == 32 || gemm.k == 16) && !gemm.b.transposed &&
                         gemm.a_batch_stride == gemm.k && gemm.c_batch_stride == gemm.n &&
                         gemm.b.batch_stride == gemm.k * gemm.b.ld && (!gemm.bias || gemm.bias_batch_stride == gemm.n);
  const int heads = is_packed ? static_cast<int>(kDepth / gemm.k) : 1;
  return gemm.batch % heads == 0 ? heads : 1;
}

// The product as the kernel sees it: packed heads are one of 64 columns.
HeadGemm packed(const HeadGemm& gemm) {
  const int heads = heads_of_tile(gemm);
  HeadGemm together = gemm;
  together.batch /= heads;
  together.k *= heads;
  together.n *= heads;
  for (int64_t* stride :
       {&together.a_batch_stride, &together.c_batch_stride, &together.b.batch_stride, &together.bias_batch_stride})
    *stride *= heads;
  return together;
}

template <class Element, int heads>
void launch_packed(const HeadGemm& gemm, cudaStream_t stream) {
  if (gemm.indices) return launch<Tile<Element, 128, kDepth, true, false, heads>>(gemm, stream);
  return launch<Tile<Element, 128, kDepth, false, false, heads>>(gemm, stream);
}

template <class Element, int m, int n>
void launch_tile(const HeadGemm& gemm, cudaStream_t stream) {
  if constexpr (n < 256) {  // tuning::tile_of_gathered is never wider
    if (gemm.indices && gemm.b.transposed) return launch<Tile<Element, m, n, true, true>>(gemm, stream);
    if (gemm.indices) return launch<Tile<Element, m, n, true, false>>(gemm, stream);
  }
  if (gemm.b.transposed) return launch<Tile<Element, m, n, false, true>>(gemm, stream);
  return launch<Tile<Element, m, n, false, false>>(gemm, stream);
}

template <class Element, bool transposed>
void launch_loose(const HeadGemm& gemm, cudaStream_t stream) {
  if (gemm.n <= kDepth) return launch<Tile<Element, 128, kDepth, false, transposed, 1, true>>(gemm, stream);
  return launch<Tile<Element, 128, 128, false, transposed, 1, true>>(gemm, stream);
}

template <class Element, bool transposed>
bool launch_one_wave_or_held(const HeadGemm& gemm, cudaStream_t stream) {
  return launch_one_wave<Element, transposed>(gemm, stream) || launch_held<HeldTile<Element, transposed>>(gemm, stream);
}

template <class Element>
void launch_element(const HeadGemm& whole, cudaStream_t stream) {
  if (loose_of(whole).any())
    return whole.b.transposed ? launch_loose<Element, true>(whole, stream)
                              : launch_loose<Element, false>(whole, stream);
  if (whole.b.transposed ? launch_one_wave_or_held<Element, true>(whole, stream)
                         : launch_one_wave_or_held<Element, false>(whole, stream))
    return;
  const int heads = heads_of_tile(whole);
  const HeadGemm gemm = packed(whole);
  if (heads == 2) return launch_packed<Element, 2>(gemm, stream);
  if (heads == 4) return launch_packed<Element, 4>(gemm, stream);
  if (gemm.tile_n == 64) return launch_tile<Element, 128, 64>(gemm, stream);
  if (gemm.tile_n == 256) return launch_tile<Element, 64, 256>(gemm, stream);
  if (gemm.tile_n == 192) return launch_tile<Element, 64, 192>(gemm, stream);
  if (gemm.tile_m == 64) return launch_tile<Element, 64, 128>(gemm, stream);
  return launch_tile<Element, 128, 128>(gemm, stream);
}

}  // namespace

bool takes_sm90(HeadGemm& gemm) {
  if (!runs_here()) return false;
  if (!are_countable({gemm.m, gemm.n, gemm.k, gemm.batch, gemm.a_rows})) return false;
  const int multiprocessors = multiprocessors_here();
  const LooseOperands loose = loose_of(gemm);
  if (loose.any())
    return !gemm.indices && tuning::prefers_loose(sizes_of(gemm), loose.a.in_elements(), multiprocessors);
  if (gemm.indices && gemm.k % (kAlignment / kElementSize) != 0) return false;  // copied in whole 16 bytes
  if (is_one_wave(gemm, multiprocessors)) return true;
  const auto tile = tuning::preferred_tile(sizes_of(packed(gemm)), multiprocessors);
  if (!tile) return false;
  gemm.tile_m = tile->m;
  gemm.tile_n = tile->n;
  return true;
}

void run_sm90(const HeadGemm& gemm, cudaStream_t stream) {
  if (gemm.is_bfloat16) return launch_element<cute::bfloat16_t>(gemm, stream);
  return launch_element<cute::half_t>(gemm, stream);
}

}  // namespace mhmatmul::cuda
