// One kernel, one block per row; or a cluster of up to eight, where a row is longer than a tile and the device has
// them: then each block has a share of the row's tiles, and tells the others what it counted through shared memory.
//
// 1. The row is read, tile by tile, each thread the same few consecutive scores of every tile; a block's only tile
// stays
//    in registers as keys. Candidates (score >= top_p) are counted, and their lowest and highest key found. What the
//    row keeps, min(candidates, k), is known from here on.
// 2. Packed form: one thread publishes that count and adds up those of the rows before (look-back over one word a row,
//    rows in the order in which blocks start). Meanwhile the others go on.
// 3. Only where candidates outnumber k: the k-th highest key is found digit by digit, from the highest bit in which
//    candidates differ down, each pass a histogram of eight bits over those that agree with the digits found so far, in
//    copies, so that lanes with the same digit seldom meet; until all that agree have a place. Counts are integers: the
//    order of the atomics is of no matter.
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

constexpr int kThreads = 1024, kWarp = 32;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kCopies = 8;      // of the histogram
constexpr int kMostBlocks = 8;  // of a cluster
static_assert(kThreads >= kDigits, "one thread adds up the copies of one bin");

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

// The kept tokens of all rows before `row`, which keeps `count`. The rows before have started: they wait for nobody.
__device__ int64_t look_back(unsigned long long* words, int64_t row, int64_t count) {
  atomicExch(words + row, (row == 0 ? kSum : kOwn) | static_cast<unsigned long long>(count));
  unsigned long long before = 0;
  for (int64_t r = row - 1; r >= 0; --r) {
    unsigned long long word = 0;
    while (word == 0) word = read_word(words + r);
    before += word & kValue;
    if (word >= kSum) break;
  }
  atomicExch(words + row, kSum | (before + static_cast<unsigned long long>(count)));
  return static_cast<int64_t>(before);
}

// Of a histogram: the digit that the places-th highest key has, added to `prefix` at `shift`; the higher ones' places
// are taken off. `all_stay`: as many keys have that digit as there are places left. Called by one warp: each lane adds
// up eight digits, the first the highest.
template <class Bits>
__device__ void find_digit(const unsigned int* histogram, int shift, int64_t& places, Bits& prefix, bool& all_stay) {
  constexpr int kPerLane = kDigits / kWarp;
  const int lane = static_cast<int>(threadIdx.x), highest = kDigits - 1 - lane * kPerLane;
  const int64_t wanted = places;
  int64_t mine = 0;
  for (int i = 0; i < kPerLane; ++i) mine += histogram[highest - i];
  int64_t up_to_me = mine;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t other = __shfl_up_sync(~0u, up_to_me, offset);
    if (lane >= offset) up_to_me += other;
  }
  __syncwarp();  // every lane has read `places`
  int64_t before = up_to_me - mine;
  if (before >= wanted || up_to_me < wanted) return;  // true for all lanes but one
  int digit = highest;
  while (before + histogram[digit] < wanted) before += histogram[digit--];
  places = wanted - before;
  all_stay = histogram[digit] == places;
  prefix = static_cast<Bits>(prefix | static_cast<Bits>(static_cast<Bits>(digit) << shift));
}

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
};

template <class Format>
struct Sum {
  __device__ Summary<Format> operator()(const Summary<Format>& a, const Summary<Format>& b) const { return a + b; }
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
  using BlockReduce = cub::BlockReduce<Summary<Format>, kThreads>;
  using BlockScan = cub::BlockScan<unsigned int, kThreads>;
  using BlockSum = cub::BlockReduce<unsigned long long, kThreads>;
  using Row = Team<clustered>;
  constexpr int kMost = clustered ? kMostBlocks : 1;
  __shared__ union {
    typename BlockReduce::TempStorage reduce;
    typename BlockSum::TempStorage sum;
    typename BlockScan::TempStorage scan;
    unsigned int histogram[kDigits * kCopies];
  } storage;
  __shared__ unsigned int digits[kDigits], own_digits[2][kDigits];  // of the row; of the block, in every other pass
  __shared__ Summary<Format> summaries[kMost];                      // of the row's blocks
  __shared__ unsigned long long counts[kMost];                      // keys above the rule's, and equal to it << 32
  __shared__ int64_t row_shared, first_place, places;
  __shared__ Bits prefix;
  __shared__ bool all_stay;
  constexpr int kOwned = kItems<Format>;

#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // what waits for this selection may come up meanwhile: gemm_sm90.cuh does
  cudaGridDependencySynchronize();
#endif
  const int rank = Row::rank(), blocks = Row::size();
  if (clustered) Row::sync();  // all have come, so that their shared memory may be written
  if (rank == 0 && threadIdx.x == 0) {
    const int64_t own = packed.words ? atomicAdd(packed.ticket, 1ull) : blockIdx.x / blocks;
    for (int other = 0; other < blocks; ++other) *Row::of(&row_shared, other) = own;
  }
  Row::sync();
  const int64_t row = row_shared;
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
  mine = BlockReduce(storage.reduce).Reduce(mine, Sum<Format>());
  if (threadIdx.x == 0)
    for (int other = 0; other < blocks; ++other) Row::of(summaries, other)[rank] = mine;
  Row::sync();
  if (clustered) {
    if (threadIdx.x == 0)
      for (int other = 1; other < blocks; ++other) summaries[0] = summaries[0] + summaries[other];
    __syncthreads();
  }
  const Summary<Format>& summary = summaries[0];
  const int64_t candidates = summary.candidates, kept = candidates < k ? candidates : k;

  if (rank == 0 && threadIdx.x == kThreads - 1) {  // in the last warp: the first has the digits to look at
    int64_t first = row * padded.capacity;
    if (packed.words) {
      first = look_back(packed.words, row, kept);
      packed.cu_seqlens[row] = static_cast<int32_t>(first);
      if (row + 1 == scores.b) {
        packed.cu_seqlens[scores.b] = static_cast<int32_t>(first + kept);
        *packed.total = first + kept;
      }
    } else {
      padded.counts[row] = candidates < padded.count_limit ? candidates : padded.count_limit;
    }
    for (int other = 0; other < blocks; ++other) *Row::of(&first_place, other) = first;
  }

  if (candidates > kept && kept > 0) {
    const Bits differing = summary.lowest ^ summary.highest;
    int shift = (differing == 0 ? 0 : 64 - __clzll(static_cast<long long>(differing))) - kDigitBits;
    if (shift < 0) shift = 0;
    // The bits above the first digit are those of every candidate.
    Bits found = shift + kDigitBits >= Format::kBits ? Bits{0} : static_cast<Bits>(~0ull << (shift + kDigitBits));
    if (threadIdx.x == 0) {
      places = kept;
      prefix = summary.highest & found;
    }
    __syncthreads();
    for (int pass = 0;; pass ^= 1) {
      for (int i = threadIdx.x; i < kDigits * kCopies; i += kThreads) storage.histogram[i] = 0;
      __syncthreads();
      for_each_tile([&](int64_t) {
#pragma unroll
        for (const Bits key : keys)
          if (rule.admits(key) && (key & found) == prefix)
            atomicAdd(&storage.histogram[((key >> shift) & (kDigits - 1)) * kCopies + threadIdx.x % kCopies], 1u);
      });
      __syncthreads();
      if (threadIdx.x < kDigits) {
        unsigned int sum = 0;
        for (int copy = 0; copy < kCopies; ++copy) sum += storage.histogram[threadIdx.x * kCopies + copy];
        (clustered ? own_digits[pass] : digits)[threadIdx.x] = sum;
      }
      Row::sync();
      if (clustered) {
        if (threadIdx.x < kDigits) {
          unsigned int sum = 0;
          for (int other = 0; other < blocks; ++other) sum += Row::of(own_digits[pass], other)[threadIdx.x];
          digits[threadIdx.x] = sum;
        }
        __syncthreads();
      }
      if (threadIdx.x < kWarp) find_digit(digits, shift, places, prefix, all_stay);
      __syncthreads();
      if (all_stay || shift == 0) break;
      found = static_cast<Bits>(found | static_cast<Bits>(static_cast<Bits>(kDigits - 1) << shift));
      shift = shift > kDigitBits ? shift - kDigitBits : 0;
      // A last digit that overlaps the one before counts only keys that agree in the bits they share.
    }
    // Where all stay that share the digits found, the digits to come need not be.
    rule.key = prefix > summary.lowest ? prefix : summary.lowest;
    rule.ties = all_stay ? kNoLimit : places;
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
    __syncthreads();  // the storage was the histogram's
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
  int64_t* const out = (packed.words ? packed.indices : padded.indices) + first_place;

  for_each_tile([&](int64_t tile) {
    if (kept == 0) return;  // the same for the whole block
    unsigned int here = 0, before, total;
#pragma unroll
    for (const Bits key : keys) here += (key > rule.key ? 1u : 0u) | (key == rule.key ? 1u << 16 : 0u);
    BlockScan(storage.scan).ExclusiveSum(here, before, total);
    __syncthreads();  // the scan's storage is used again

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
  if (!packed.words)
    for (int64_t place = kept + rank * kThreads + threadIdx.x; place < padded.capacity; place += blocks * kThreads)
      out[place] = -1;
}

// Whether device and code are Hopper's or later: what a driver makes of older code has neither clusters nor launches
// that begin before the kernel ahead has ended.
template <class Format>
bool is_hopper() {
  constexpr int kHopper = 90;
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, select_kernel<Format, true>) == cudaSuccess &&
         attributes.ptxVersion >= kHopper && attributes.binaryVersion >= kHopper;
}

// How many blocks share a row: as many as the row has tiles and a cluster has blocks, while all rows find room at once.
// Clusters that wait for one another are slower than blocks alone (H200, 32768 float32 scores, 4 blocks and 1: 64 rows
// 42 and 32 us, 8 rows 16 and 27 us; of 131072, 8 rows 29 and 109 us).
template <class Format>
int64_t blocks_of_row(const Scores<Format>& scores) {
  int device = 0, multiprocessors = 0;
  const int64_t tiles = (scores.s + kTile<Format> - 1) / kTile<Format>;
  if (tiles <= 1 || cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return std::max<int64_t>(1, std::min({int64_t{kMostBlocks}, tiles, multiprocessors / scores.b}));
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
  sm90::launch(blocks > 1 ? select_kernel<Format, true> : select_kernel<Format, false>, dim3(rows * blocks), kThreads,
               /*bytes=*/0, blocks, stream, scores, top_p, k, packed, padded);
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
