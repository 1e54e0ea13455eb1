// One kernel, one block per row; or a cluster of up to eight, where a row is longer than a tile and the device has
// them: then each block has a share of the row's tiles, and tells the others what it counted through shared memory.
//
// 1. The row is read, tile by tile, each thread the same few consecutive scores of every tile; a block's only tile
//    stays in registers as keys. Candidates (score >= top_p) are counted, and their lowest and highest key found. What
//    the row keeps, min(candidates, k), is known from here on.
// 2. Packed form: one warp publishes that count and adds up those of the rows before (look-back over one word a row, 32
//    at a time, rows in the order in which blocks start, unless there is room for all). That of the last row tells the
//    host how many there are. The last to have added up clears the words, at the end, where nobody waits for it.
// 3. Only where candidates outnumber k: the k-th highest key is found digit by digit, from the highest bit in which
//    candidates differ down, each pass a histogram of ten bits over those that agree with the digits found so far, in
//    copies, so that lanes with the same digit seldom meet; until all that agree have a place. Each thread has a digit,
//    and one of them finds the key's. Counts are integers: the order of the atomics is of no matter.
// 4. Positions are written in order. Invariant before each tile: `above` and `ties` count the keys over and equal to
//    the rule's in the tiles before. One block-wide exclusive sum of both, packed in one word, gives every kept score
//    its place, and the first ties win.
#include "select.h"
#include "sm90_host.h"

#include <cooperative_groups.h>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include <algorithm>

namespace mhmatmul::cuda {
namespace {

// Of 8 rows of 8192 float32 scores, 1024 kept, replays on an H200: digits of 8 bits, the key's looked for by one warp,
// 8.9 us; of 10 bits, one for each thread, 7.4 (predicted: 7.6, one pass less). The last 256 keys compared with one
// another instead of more digits: 0.5 us slower. Packed it took 2.1 us longer, as a profiler sees it, while one thread
// added up, row by row, and waited until the host's word had left the device; 0.8 with a warp that waits for nothing.
// With a product, call after call: 49.7 -> 47.7 us; 47.2 without a ticket for each row (predicted: 47).
constexpr int kThreads = 1024, kWarp = 32;
constexpr int kDigitBits = 10;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kMostBlocks = 8;  // of a cluster
static_assert(kThreads == kDigits, "each thread has one digit");
static_assert(kThreads == kWarp * kWarp, "each lane has one warp");

// Keys of a tile that one thread owns.
template <class Format>
constexpr int kItems = sizeof(typename Format::Bits) == 8 ? 4 : 8;
template <class Format>
constexpr int kTile = kThreads * kItems<Format>;
static_assert(kTile<Float32> < 1 << 16, "a tile's counts are packed in 16 bits each");

// A row's word in the look-back: nothing yet, its own count, or the sum up to and including it.
constexpr unsigned long long kOwn = 1ull << 62, kSum = 2ull << 62, kValue = kOwn - 1;

__device__ unsigned long long read_word(const unsigned long long* word) {
  return *static_cast<const volatile unsigned long long*>(word);
}

// The kept tokens of all rows before `row` of b, which keeps `count`. Called by a warp. The rows before have started:
// they wait for nobody.
__device__ int64_t look_back(unsigned long long* words, int64_t row, int64_t b, int64_t count, int lane) {
  if (lane == 0) atomicExch(words + row, (row == 0 ? kSum : kOwn) | static_cast<unsigned long long>(count));
  unsigned long long before = 0;
  for (int64_t nearest = row - 1; nearest >= 0; nearest -= kWarp) {
    unsigned long long word = nearest < lane ? kSum : 0;  // nothing before the first row
    while (word == 0) word = read_word(words + nearest - lane);
    const unsigned int sums = __ballot_sync(~0u, word >= kSum);
    unsigned long long part = lane < __ffs(sums) || sums == 0 ? word & kValue : 0;  // up to the nearest sum
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) part += __shfl_xor_sync(~0u, part, lanes);
    before += part;
    if (sums != 0) break;
  }
  const bool is_read = row + kWarp < b;  // by a row that looks back further than its own warp reaches
  if (lane == 0 && is_read) atomicExch(words + row, kSum | (before + static_cast<unsigned long long>(count)));
  return static_cast<int64_t>(before);
}

// A digit's count, in copies.
struct alignas(sizeof(uint4)) Bin {
  static constexpr int kCopies = 4;
  unsigned int copies[kCopies];

  __device__ unsigned int count() const { return copies[0] + copies[1] + copies[2] + copies[3]; }
};

// The keys of `kItems` scores from place `first` on; those beyond the row are NaN's, which nothing admits.
template <class Format>
__device__ void load_keys(const Scores<Format>& scores, const typename Format::Bits* row, int64_t first,
                          typename Format::Bits (&keys)[kItems<Format>]) {
  constexpr int kOwned = kItems<Format>;
  using Bits = typename Format::Bits;
  constexpr int kWords = kOwned * sizeof(Bits) / sizeof(uint4);
  if (scores.stride == 1 && reinterpret_cast<uintptr_t>(row) % sizeof(uint4) == 0 && first + kOwned <= scores.s) {
    union {
      uint4 words[kWords];
      Bits bits[kOwned];
    } loaded;
#pragma unroll
    for (int i = 0; i < kWords; ++i) loaded.words[i] = reinterpret_cast<const uint4*>(row + first)[i];
#pragma unroll
    for (int i = 0; i < kOwned; ++i) keys[i] = score_key<Format>(loaded.bits[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kOwned; ++i)
    keys[i] = first + i < scores.s ? score_key<Format>(row[(first + i) * scores.stride]) : Bits{0};
}

template <class Format>
struct Summary {
  unsigned int candidates;
  typename Format::Bits lowest, highest;  // candidate key

  __device__ Summary operator+(const Summary& other) const {
    return {candidates + other.candidates, lowest < other.lowest ? lowest : other.lowest,
            highest > other.highest ? highest : other.highest};
  }

  // All lanes' together, in each of them.
  __device__ Summary over_warp() const {
    Summary all = *this;
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const auto other = [&](auto value) { return static_cast<decltype(value)>(__shfl_xor_sync(~0u, value, lanes)); };
      all = all + Summary{other(all.candidates), other(all.lowest), other(all.highest)};
    }
    return all;
  }
};

// The blocks of a row.
template <bool clustered>
struct Team {
  static __device__ int rank() { return 0; }
  static __device__ int size() { return 1; }
  static __device__ void sync() { __syncthreads(); }
  template <class Value>
  static __device__ Value* of(Value* own, int) {
    return own;
  }
};

#if __CUDA_ARCH__ >= 900
template <>
struct Team<true> {
  static __device__ int rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
  static __device__ int size() { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
  static __device__ void sync() { cooperative_groups::this_cluster().sync(); }
  // What another block has in the place of `own`, in its shared memory.
  template <class Value>
  static __device__ Value* of(Value* own, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(own, rank);
  }
};
#endif

template <class Format, bool clustered>
__global__ void __launch_bounds__(kThreads)
    select_kernel(Scores<Format> scores, Threshold<Format> top_p, int64_t k, Packed packed, Padded padded) {
  using Bits = typename Format::Bits;
  using BlockScan = cub::BlockScan<unsigned int, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  using BlockSum = cub::BlockReduce<unsigned long long, kThreads>;
  using Row = Team<clustered>;
  constexpr int kMost = clustered ? kMostBlocks : 1;
  __shared__ union {
    typename BlockSum::TempStorage sum;
    typename BlockScan::TempStorage scan;
  } storage;
  __shared__ Bin histogram[2][kDigits];                            // in every other pass
  __shared__ unsigned int own_digits[2][clustered ? kDigits : 1];  // of the block, likewise
  __shared__ Summary<Format> of_warps[kThreads / kWarp], of_blocks[kMost];
  __shared__ unsigned long long counts[kMost];  // keys above the rule's, and equal to it << 32
  __shared__ int64_t row_shared, first_place, places;
  __shared__ Bits prefix;
  __shared__ bool all_stay;
  constexpr int kOwned = kItems<Format>;

#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // what waits for this selection may come up meanwhile: gemm_sm90.cuh does
  cudaGridDependencySynchronize();
#endif
  const int rank = Row::rank(), blocks = Row::size();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned int digit = kDigits - 1 - threadIdx.x;  // this thread's: the first has the highest
  histogram[0][digit] = {};
  if (clustered) Row::sync();  // all have come, so that their shared memory may be written
  int64_t row = blockIdx.x / blocks;
  if (packed.started) {
    if (rank == 0 && threadIdx.x == 0) {
      const auto own = static_cast<int64_t>(atomicAdd(packed.started, 1ull));
      for (int other = 0; other < blocks; ++other) *Row::of(&row_shared, other) = own;
    }
    Row::sync();
    row = row_shared;
  }
  const Bits* const data = scores.data + row * scores.row_stride;
  auto rule = SelectionRule<Format>::from_threshold(top_p.pointer ? *top_p.pointer : top_p.value);

  Bits keys[kOwned];
  const int64_t my_first = int64_t{threadIdx.x} * kOwned;
  // The block's share: scores [begin, end).
  const int64_t tiles = (scores.s + kTile<Format> - 1) / kTile<Format>, share = (tiles + blocks - 1) / blocks;
  const int64_t begin = rank * share * kTile<Format>;
  const int64_t end = begin + share * kTile<Format> < scores.s ? begin + share * kTile<Format> : scores.s;
  const bool stays = share == 1;
  if (stays && begin < end) load_keys(scores, data, begin + my_first, keys);
  // Calls use(tile) for every tile, its keys in `keys`.
  const auto for_each_tile = [&](const auto& use) {
    for (int64_t tile = begin; tile < end; tile += kTile<Format>) {
      if (!stays) load_keys(scores, data, tile + my_first, keys);
      use(tile);
    }
  };

  Summary<Format> mine{0, static_cast<Bits>(~Bits{0}), 0};
  for_each_tile([&](int64_t) {
#pragma unroll
    for (const Bits key : keys)
      if (rule.admits(key)) mine = mine + Summary<Format>{1, key, key};
  });
  mine = mine.over_warp();
  if (lane == 0) of_warps[warp] = mine;
  __syncthreads();
  Summary<Format> summary = of_warps[lane].over_warp();
  if (clustered) {
    if (threadIdx.x == 0)
      for (int other = 0; other < blocks; ++other) Row::of(of_blocks, other)[rank] = summary;
    Row::sync();
    summary = of_blocks[0];
    for (int other = 1; other < blocks; ++other) summary = summary + of_blocks[other];
  }
  const int64_t candidates = summary.candidates, kept = candidates < k ? candidates : k;

  const auto adds_up = [&] { return rank == 0 && threadIdx.x >= kThreads - kWarp; };  // the last warp
  if (adds_up()) {
    const int64_t first = packed.counts ? look_back(packed.counts, row, scores.b, kept, lane) : row * padded.capacity;
    if (lane == 0) {
      for (int other = 0; other < blocks; ++other) *Row::of(&first_place, other) = first;
      if (!packed.counts) {
        padded.counts[row] = candidates < padded.count_limit ? candidates : padded.count_limit;
      } else {
        packed.cu_seqlens[row] = static_cast<int32_t>(first);
        if (row + 1 == scores.b) {
          packed.cu_seqlens[scores.b] = static_cast<int32_t>(first + kept);
          *static_cast<volatile int64_t*>(packed.total) = first + kept;  // the host may be waiting for it
        }
      }
    }
  }

  if (candidates > kept && kept > 0) {
    const Bits differing = summary.lowest ^ summary.highest;
    int shift = (differing == 0 ? 0 : 64 - __clzll(static_cast<long long>(differing))) - kDigitBits;
    if (shift < 0) shift = 0;
    // The bits above the first digit are those of every candidate.
    Bits found = shift + kDigitBits >= Format::kBits ? Bits{0} : static_cast<Bits>(~0ull << (shift + kDigitBits));
    Bits agreed = summary.highest & found;
    int64_t wanted = kept;
    for (int pass = 0;; pass ^= 1) {
      for_each_tile([&](int64_t) {
#pragma unroll
        for (const Bits key : keys)
          if (rule.admits(key) && (key & found) == agreed)
            atomicAdd(&histogram[pass][(key >> shift) & (kDigits - 1)].copies[threadIdx.x % Bin::kCopies], 1u);
      });
      __syncthreads();
      unsigned int count = histogram[pass][digit].count(), higher;
      histogram[pass ^ 1][digit] = {};
      if (clustered) {
        own_digits[pass][digit] = count;
        Row::sync();
        count = 0;
        for (int other = 0; other < blocks; ++other) count += Row::of(own_digits[pass], other)[digit];
      }
      BlockScan(storage.scan).ExclusiveSum(count, higher);
      if (higher < wanted && wanted <= int64_t{higher} + count) {  // true for one thread
        places = wanted - higher;
        all_stay = count == places;
        prefix = static_cast<Bits>(agreed | static_cast<Bits>(static_cast<Bits>(digit) << shift));
      }
      __syncthreads();
      wanted = places;
      agreed = prefix;
      if (all_stay || shift == 0) break;
      found = static_cast<Bits>(found | static_cast<Bits>(static_cast<Bits>(kDigits - 1) << shift));
      shift = shift > kDigitBits ? shift - kDigitBits : 0;
      // A last digit that overlaps the one before counts only keys that agree in the bits they share.
    }
    // Where all stay that share the digits found, the digits to come need not be.
    rule.key = agreed > summary.lowest ? agreed : summary.lowest;
    rule.ties = all_stay ? kNoLimit : wanted;
  }
  if (kept == 0) rule = SelectionRule<Format>::nothing();
  const auto tell = [&](Bits key) { return (key > rule.key ? 1ull : 0ull) | (key == rule.key ? 1ull << 32 : 0ull); };
  int64_t above = 0, ties = 0;
  if (clustered) {
    unsigned long long own = 0;
    for_each_tile([&](int64_t) {
#pragma unroll
      for (const Bits key : keys) own += tell(key);
    });
    own = BlockSum(storage.sum).Sum(own);
    if (threadIdx.x == 0)
      for (int other = 0; other < blocks; ++other) Row::of(counts, other)[rank] = own;
    Row::sync();  // from here on nobody reads or writes what is another's
    for (int other = 0; other < rank; ++other) {
      above += static_cast<int64_t>(counts[other] & 0xFFFFFFFFu);
      ties += static_cast<int64_t>(counts[other] >> 32);
    }
  }
  __syncthreads();
  int64_t* const out = (packed.counts ? packed.indices : padded.indices) + first_place;
  unsigned long long added_up = 0;  // rows, before this one
  if (packed.counts && adds_up() && lane == 0) {
    __threadfence();
    added_up = atomicAdd(packed.added_up, 1ull);
  }

  for_each_tile([&](int64_t tile) {
    if (kept == 0) return;  // the same for the whole block
    unsigned int here = 0, before, total;
#pragma unroll
    for (const Bits key : keys) here += (key > rule.key ? 1u : 0u) | (key == rule.key ? 1u << 16 : 0u);
    BlockScan(storage.scan).ExclusiveSum(here, before, total);
    if (!stays) __syncthreads();  // the scan's storage is used again

    int64_t above_before = above + (before & 0xFFFFu), ties_before = ties + (before >> 16);
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const bool is_above = keys[i] > rule.key, is_tie = keys[i] == rule.key;
      if (is_above || (is_tie && ties_before < rule.ties))
        out[above_before + (ties_before < rule.ties ? ties_before : rule.ties)] = row * scores.s + tile + my_first + i;
      above_before += is_above;
      ties_before += is_tie;
    }
    above += total & 0xFFFFu;
    ties += total >> 16;
  });
  if (!packed.counts) {
    for (int64_t place = kept + rank * kThreads + threadIdx.x; place < padded.capacity; place += blocks * kThreads)
      out[place] = -1;
  } else if (adds_up() && __shfl_sync(~0u, added_up, 0) + 1 == static_cast<unsigned long long>(scores.b)) {
    for (int64_t i = lane; i < scores.b; i += kWarp) packed.counts[i] = 0;
    if (lane == 0) *packed.added_up = 0;
    if (lane == 0 && packed.started) *packed.started = 0;
  }
}

// Whether device and code are Hopper's or later: what a driver makes of older code has neither clusters nor launches
// that begin before the kernel ahead has ended.
template <class Format>
bool is_hopper() {
  return sm90::of_this_device([](int) {
    constexpr int kHopper = 90;
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, select_kernel<Format, true>) == cudaSuccess &&
           attributes.ptxVersion >= kHopper && attributes.binaryVersion >= kHopper;
  });
}

// How many blocks share a row: as many as the row has tiles and a cluster has blocks, while all rows find room at once.
// Clusters that wait for one another are slower than blocks alone (H200, 32768 float32 scores, 4 blocks and 1: 64 rows
// 42 and 32 us, 8 rows 16 and 27 us; of 131072, 8 rows 29 and 109 us).
template <class Format>
int64_t blocks_of_row(const Scores<Format>& scores) {
  const int64_t tiles = (scores.s + kTile<Format> - 1) / kTile<Format>;
  if (tiles <= 1) return 1;
  return std::max<int64_t>(1, std::min({int64_t{kMostBlocks}, tiles, sm90::multiprocessors_here() / scores.b}));
}

// On Hopper the launch may begin before the kernel ahead has ended: 10.8 -> 10.3 us for 8 rows of 8192 (H200).
template <class Format>
void launch(const Scores<Format>& scores, const Threshold<Format>& top_p, int64_t k, const Packed& packed,
            const Padded& padded, cudaStream_t stream) {
  const auto rows = static_cast<unsigned int>(scores.b);
  if (!is_hopper<Format>()) {
    select_kernel<Format, false><<<rows, kThreads, 0, stream>>>(scores, top_p, k, packed, padded);
    return;
  }
  const auto blocks = static_cast<int>(blocks_of_row(scores));
  Packed to = packed;
  if (scores.b * blocks <= sm90::multiprocessors_here()) to.started = nullptr;  // all rows work at once
  const auto start = [&](auto clustered) {
    sm90::launch<select_kernel<Format, decltype(clustered)::value>>(dim3(rows * blocks), kThreads, /*bytes=*/0, blocks,
                                                                    stream, scores, top_p, k, to, padded);
  };
  blocks > 1 ? start(std::true_type{}) : start(std::false_type{});
}

}  // namespace

template <class Format>
void select_packed(const Scores<Format>& scores, const Threshold<Format>& top_p, int64_t k, const Packed& packed,
                   cudaStream_t stream) {
  launch(scores, top_p, k, packed, {}, stream);
}

template <class Format>
void select_padded(const Scores<Format>& scores, const Threshold<Format>& top_p, int64_t k, const Padded& padded,
                   cudaStream_t stream) {
  launch(scores, top_p, k, {}, padded, stream);
}

#define INSTANTIATE(Format)                                                                                    \
  template void select_packed<Format>(const Scores<Format>&, const Threshold<Format>&, int64_t, const Packed&, \
                                      cudaStream_t);                                                           \
  template void select_padded<Format>(const Scores<Format>&, const Threshold<Format>&, int64_t, const Padded&, \
                                      cudaStream_t)
INSTANTIATE(Float64);
INSTANTIATE(Float32);
INSTANTIATE(Float16);
INSTANTIATE(BFloat16);
#undef INSTANTIATE

}  // namespace mhmatmul::cuda
