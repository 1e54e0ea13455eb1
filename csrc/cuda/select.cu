// One block per row, both kernels.
//
// find_rules reads the row once to count the scores that reach the threshold. Only where they outnumber k
// does it go on: the k-th highest key is found digit by digit from the top, each pass a histogram of the next
// eight bits over the candidates that agree with the digits found so far. Counts are integers, so the order
// of the atomics is of no matter.
//
// write_kept walks the row in tiles of one score per thread. Invariant before each tile: `above` and `ties`
// count the scores over and equal to the rule's key in the tiles before. A block-wide exclusive sum of both,
// packed in one word, gives every kept score its place, so positions come out ascending and the first ties
// win.
#include "select.h"

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

namespace mhmatmul::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
static_assert(kThreads >= kDigits, "one thread clears one bin");
static_assert(kThreads < 1 << 16, "a tile's counts are packed in 16 bits each");

template <class Format>
__global__ void __launch_bounds__(kThreads)
    find_rules_kernel(Scores<Format> scores, Threshold<Format> top_p, int64_t k, int64_t count_limit,
                      SelectionRule<Format>* rules, int64_t* counts) {
  using Bits = typename Format::Bits;
  using BlockReduce = cub::BlockReduce<unsigned int, kThreads>;
  __shared__ typename BlockReduce::TempStorage reduce_storage;
  __shared__ unsigned int histogram[kDigits];
  __shared__ int64_t candidates, places;
  __shared__ Bits prefix;

  const int64_t row = blockIdx.x;
  const Bits* const data = scores.data + row * scores.row_stride;
  const auto threshold = SelectionRule<Format>::from_threshold(top_p.pointer ? *top_p.pointer : top_p.value);

  unsigned int mine = 0;
  for (int64_t j = threadIdx.x; j < scores.s; j += kThreads)
    mine += threshold.admits(score_key<Format>(data[j * scores.stride]));
  const unsigned int total = BlockReduce(reduce_storage).Sum(mine);
  if (threadIdx.x == 0) {
    candidates = total;
    places = k;
    prefix = 0;
  }
  __syncthreads();

  auto rule = threshold;
  rule.candidates = candidates;
  rule.count = candidates < k ? candidates : k;
  if (k == 0) {
    rule = SelectionRule<Format>::nothing();
    rule.candidates = candidates;
  } else if (candidates > k) {
    Bits found = 0;  // mask of the digits known so far
    for (int shift = Format::kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
      if (threadIdx.x < kDigits) histogram[threadIdx.x] = 0;
      __syncthreads();
      for (int64_t j = threadIdx.x; j < scores.s; j += kThreads) {
        const Bits key = score_key<Format>(data[j * scores.stride]);
        if (threshold.admits(key) && (key & found) == prefix) atomicAdd(&histogram[(key >> shift) & (kDigits - 1)], 1u);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int digit = kDigits - 1;
        while (histogram[digit] < places) places -= histogram[digit--];
        prefix = static_cast<Bits>(prefix | static_cast<Bits>(static_cast<Bits>(digit) << shift));
      }
      __syncthreads();
      found = static_cast<Bits>(found | static_cast<Bits>(static_cast<Bits>(kDigits - 1) << shift));
    }
    rule.key = prefix;
    rule.ties = places;
  }
  if (threadIdx.x == 0) {
    rules[row] = rule;
    counts[row] = candidates < count_limit ? candidates : count_limit;
  }
}

template <class Format>
__global__ void __launch_bounds__(kThreads)
    write_kept_kernel(Scores<Format> scores, const SelectionRule<Format>* rules, const int64_t* starts,
                      int64_t capacity, int64_t* indices) {
  using Bits = typename Format::Bits;
  using BlockScan = cub::BlockScan<unsigned int, kThreads>;
  __shared__ typename BlockScan::TempStorage scan_storage;

  const int64_t row = blockIdx.x;
  const Bits* const data = scores.data + row * scores.row_stride;
  const SelectionRule<Format> rule = rules[row];
  int64_t* const out = indices + (starts ? starts[row] : row * capacity);

  int64_t above = 0, ties = 0;
  for (int64_t tile = 0; tile < scores.s && rule.count > 0; tile += kThreads) {
    const int64_t j = tile + threadIdx.x;
    const Bits key = j < scores.s ? score_key<Format>(data[j * scores.stride]) : Bits{0};
    const bool is_above = key > rule.key, is_tie = key == rule.key;
    unsigned int before, total;
    BlockScan(scan_storage).ExclusiveSum((is_above ? 1u : 0u) | (is_tie ? 1u << 16 : 0u), before, total);
    __syncthreads();  // the scan's storage is used again

    const int64_t ties_before = ties + (before >> 16);
    if (is_above || (is_tie && ties_before < rule.ties)) {
      const int64_t place = above + (before & 0xFFFFu) + (ties_before < rule.ties ? ties_before : rule.ties);
      out[place] = row * scores.s + j;
    }
    above += total & 0xFFFFu;
    ties += total >> 16;
  }
  if (starts == nullptr)
    for (int64_t place = rule.count + threadIdx.x; place < capacity; place += kThreads) out[place] = -1;
}

}  // namespace

template <class Format>
void find_rules(const Scores<Format>& scores, const Threshold<Format>& top_p, int64_t k, int64_t count_limit,
                SelectionRule<Format>* rules, int64_t* counts, cudaStream_t stream) {
  find_rules_kernel<Format>
      <<<static_cast<unsigned int>(scores.b), kThreads, 0, stream>>>(scores, top_p, k, count_limit, rules, counts);
}

template <class Format>
void write_kept(const Scores<Format>& scores, const SelectionRule<Format>* rules, const int64_t* starts,
                int64_t capacity, int64_t* indices, cudaStream_t stream) {
  write_kept_kernel<Format>
      <<<static_cast<unsigned int>(scores.b), kThreads, 0, stream>>>(scores, rules, starts, capacity, indices);
}

#define INSTANTIATE(Format)                                                                                      \
  template void find_rules<Format>(const Scores<Format>&, const Threshold<Format>&, int64_t, int64_t,            \
                                   SelectionRule<Format>*, int64_t*, cudaStream_t);                              \
  template void write_kept<Format>(const Scores<Format>&, const SelectionRule<Format>*, const int64_t*, int64_t, \
                                   int64_t*, cudaStream_t)
INSTANTIATE(Float64);
INSTANTIATE(Float32);
INSTANTIATE(Float16);
INSTANTIATE(BFloat16);
#undef INSTANTIATE

}  // namespace mhmatmul::cuda
