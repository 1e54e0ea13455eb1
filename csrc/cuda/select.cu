// One kernel, one block per row.
//
// 1. The row is read, tile by tile; a row of one tile stays in shared memory as keys. Candidates (score >= top_p) are
//    counted, and their lowest and highest key found. What the row keeps, min(candidates, k), is known from here on.
// 2. Packed form: one thread publishes that count and adds up those of the rows before (look-back over one word a row,
//    rows in the order in which blocks start). Meanwhile the others go on.
// 3. Only where candidates outnumber k: the k-th highest key is found digit by digit, from the highest bit in which
//    candidates differ down, each pass a histogram of eight bits over those that agree with the digits found so far.
//    Counts are integers, so the order of the atomics is of no matter.
// 4. Positions are written in order. A thread owns consecutive keys of a tile; invariant before each tile: `above` and
//    `ties` count the keys over and equal to the rule's in the tiles before. One block-wide exclusive sum of both,
//    packed in one word, gives every kept score its place, and the first ties win.
#include "select.h"

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

namespace mhmatmul::cuda {
namespace {

constexpr int kThreads = 1024, kWarp = 32;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
static_assert(kThreads >= kDigits, "one thread clears one bin");

// Keys of a tile: as many as leave room for the rest within 48 KiB of shared memory.
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
// are taken off. Called by one warp: each lane adds up eight digits, the first the highest.
template <class Bits>
__device__ void find_digit(const unsigned int* histogram, int shift, int64_t& places, Bits& prefix) {
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
  prefix = static_cast<Bits>(prefix | static_cast<Bits>(static_cast<Bits>(digit) << shift));
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

template <class Format>
__global__ void __launch_bounds__(kThreads)
    select_kernel(Scores<Format> scores, Threshold<Format> top_p, int64_t k, Packed packed, Padded padded) {
  using Bits = typename Format::Bits;
  using BlockReduce = cub::BlockReduce<Summary<Format>, kThreads>;
  using BlockScan = cub::BlockScan<unsigned int, kThreads>;
  __shared__ union {
    typename BlockReduce::TempStorage reduce;
    typename BlockScan::TempStorage scan;
    unsigned int histogram[kDigits];
  } storage;
  __shared__ Bits tile_keys[kTile<Format>];
  __shared__ Summary<Format> summary;
  __shared__ int64_t row_shared, first_place, places;
  __shared__ Bits prefix;
  constexpr int kOwned = kItems<Format>;

  if (threadIdx.x == 0) row_shared = packed.words ? atomicAdd(packed.ticket, 1ull) : blockIdx.x;
  __syncthreads();
  const int64_t row = row_shared;
  const Bits* const data = scores.data + row * scores.row_stride;
  const bool is_staged = scores.s <= kTile<Format>;
  auto rule = SelectionRule<Format>::from_threshold(top_p.pointer ? *top_p.pointer : top_p.value);

  // Calls use(key, j) for every score of the row, neighbouring threads taking neighbouring scores; several
  // loads are under way at a time.
  const auto for_each_key = [&](const auto& use) {
    for (int64_t begin = threadIdx.x; begin < scores.s; begin += kTile<Format>) {
      Bits keys[kItems<Format>];
#pragma unroll
      for (int i = 0; i < kItems<Format>; ++i) {
        const int64_t j = begin + i * kThreads;
        if (j < scores.s) keys[i] = data[j * scores.stride];
      }
#pragma unroll
      for (int i = 0; i < kItems<Format>; ++i) {
        const int64_t j = begin + i * kThreads;
        if (j < scores.s) use(score_key<Format>(keys[i]), j);
      }
    }
  };
  // The same for a row whose keys are in shared memory.
  const auto for_each_staged_key = [&](const auto& use) {
    for (int64_t j = threadIdx.x; j < scores.s; j += kThreads) use(tile_keys[j], j);
  };

  Summary<Format> mine{0, static_cast<Bits>(~Bits{0}), 0};
  for_each_key([&](Bits key, int64_t j) {
    if (is_staged) tile_keys[j] = key;
    if (rule.admits(key)) mine = mine + Summary<Format>{1, key, key};
  });
  mine = BlockReduce(storage.reduce).Reduce(mine, Sum<Format>());
  if (threadIdx.x == 0) summary = mine;
  __syncthreads();
  const int64_t candidates = summary.candidates, kept = candidates < k ? candidates : k;

  if (threadIdx.x == kThreads - 1) {  // in the last warp: the first has the digits to look at
    if (packed.words) {
      first_place = look_back(packed.words, row, kept);
      packed.cu_seqlens[row] = static_cast<int32_t>(first_place);
      if (row + 1 == scores.b) {
        packed.cu_seqlens[scores.b] = static_cast<int32_t>(first_place + kept);
        *packed.total = first_place + kept;
      }
    } else {
      first_place = row * padded.capacity;
      padded.counts[row] = candidates < padded.count_limit ? candidates : padded.count_limit;
    }
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
    for (;;) {
      __syncthreads();
      if (threadIdx.x < kDigits) storage.histogram[threadIdx.x] = 0;
      __syncthreads();
      const auto count = [&](Bits key, int64_t) {
        if (rule.admits(key) && (key & found) == prefix)
          atomicAdd(&storage.histogram[(key >> shift) & (kDigits - 1)], 1u);
      };
      if (is_staged) {
        for_each_staged_key(count);
      } else {
        for_each_key(count);
      }
      __syncthreads();
      if (threadIdx.x < kWarp) find_digit(storage.histogram, shift, places, prefix);
      found = static_cast<Bits>(found | static_cast<Bits>(static_cast<Bits>(kDigits - 1) << shift));
      if (shift == 0) break;
      shift = shift > kDigitBits ? shift - kDigitBits : 0;
      // A last digit that overlaps the one before counts only keys that agree in the bits they share.
    }
    __syncthreads();
    rule.key = prefix;
    rule.ties = places;
  }
  if (kept == 0) rule = SelectionRule<Format>::nothing();
  __syncthreads();
  int64_t* const out = (packed.words ? packed.indices : padded.indices) + first_place;

  int64_t above = 0, ties = 0;
  for (int64_t tile = 0; tile < scores.s && kept > 0; tile += kTile<Format>) {
    if (!is_staged) {
      __syncthreads();  // the keys of the tile before have been used
      for (int i = threadIdx.x; i < kTile<Format> && tile + i < scores.s; i += kThreads)
        tile_keys[i] = score_key<Format>(data[(tile + i) * scores.stride]);
      __syncthreads();
    }
    const int64_t first = static_cast<int64_t>(threadIdx.x) * kOwned;
    unsigned int here = 0, before, total;
    for (int i = 0; i < kOwned && tile + first + i < scores.s; ++i) {
      const Bits key = tile_keys[first + i];
      here += (key > rule.key ? 1u : 0u) | (key == rule.key ? 1u << 16 : 0u);
    }
    BlockScan(storage.scan).ExclusiveSum(here, before, total);
    __syncthreads();  // the scan's storage is used again

    int64_t above_before = above + (before & 0xFFFFu), ties_before = ties + (before >> 16);
    for (int i = 0; i < kOwned && tile + first + i < scores.s; ++i) {
      const Bits key = tile_keys[first + i];
      const bool is_above = key > rule.key, is_tie = key == rule.key;
      if (is_above || (is_tie && ties_before < rule.ties))
        out[above_before + (ties_before < rule.ties ? ties_before : rule.ties)] = row * scores.s + tile + first + i;
      above_before += is_above;
      ties_before += is_tie;
    }
    above += total & 0xFFFFu;
    ties += total >> 16;
  }
  if (!packed.words)
    for (int64_t place = kept + threadIdx.x; place < padded.capacity; place += kThreads) out[place] = -1;
}

}  // namespace

template <class Format>
void select_packed(const Scores<Format>& scores, const Threshold<Format>& top_p, int64_t k, const Packed& packed,
                   cudaStream_t stream) {
  select_kernel<Format><<<static_cast<unsigned int>(scores.b), kThreads, 0, stream>>>(scores, top_p, k, packed, {});
}

template <class Format>
void select_padded(const Scores<Format>& scores, const Threshold<Format>& top_p, int64_t k, const Padded& padded,
                   cudaStream_t stream) {
  select_kernel<Format><<<static_cast<unsigned int>(scores.b), kThreads, 0, stream>>>(scores, top_p, k, {}, padded);
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
