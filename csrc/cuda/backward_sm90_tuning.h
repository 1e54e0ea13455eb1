// When both gradients are made in one pass on Hopper and with which tile: every number that was found by measuring, and
// how.
//
// Predicted for heads of 128 -> 512: reading grad_output once instead of twice saves 40 % of the bytes, 1.67 times the
// speed of two products at the same share of the floor; of the tensor cores' time half is used, of shared memory's nine
// tenths.
//
// Measured on an H100 80GB, bfloat16, replays of a CUDA graph over operands that L2 does not hold; one pass / two
// bmm(out=) in microseconds (floor: bytes at 3 TB/s), tiles of 64 rows per cluster, ratio:
//   128 heads 128 -> 512    4096 rows  330 / 485 (280)  124   1.47      256 rows   43 / 48 (28)    7.8   1.13
//                           1024 rows  100 / 139 (78)    31   1.39       64 rows   27 / 24 (15)    1.9   0.89
//    32 heads 128 -> 256    4096 rows   60 / 80 (46)     16   1.34     1024 rows   25 / 20 (13)    3.9   0.80
//    16 heads 256 -> 256    4096 rows   50 / 59 (35)     16   1.18     1024 rows   24 / 16 (10)    3.9   0.66
//    10 heads 256 -> 256    4096 rows   37 / 40 (22)     10   1.07    16384 rows  102 / 132 (85)    39   1.30
//    16 heads 128 -> 128    4096 rows   26 / 30 (17)    7.8   1.17     1024 rows   13 / 11 (5)     1.9   0.82
//     4 heads 128 -> 128   16384 rows   30 / 40 (17)    7.8   1.36     4096 rows   17 / 14 (4)     1.9   0.81
//     1 head  128 -> 512   16384 rows   36 / 24 (9)     3.9   0.68     4096 rows   28 / 13 (2)       1   0.46
//    64 heads  64 -> 64     4096 rows   39 / 56 (34)     31   1.43       64 rows  3.8 / 6.1 (0.9)  0.5   1.59
//    12 heads  64 -> 64    16384 rows   31 / 52 (25)     23   1.69      256 rows  4.6 / 5.3 (0.5)  0.4   1.16
// Gathered, the rows of input by cp.async: 4 to 15 % slower, and it replaces copies of both operands.
// On an H200, since stages are let go of at once: 128 heads 128 -> 512, 4096 rows 228 / 358 (198), 1024 rows 71 / 101
// (55).
//
// What was learnt:
//   - A warpgroup of four may have more registers than the kernel is launched with (128), one instruction may not: sums
//     of 256 columns are made by two instructions of 128.
//   - setmaxnreg needs the warpgroups' ways not to meet again; so each of them leaves by itself.
//   - A box of one row lands in a swizzled stage where it belongs, since the swizzle is the address's own. Rows that
//     count for nothing come as zeros from beyond the last row, one by one where they are scattered (three times slower
//     when every fifth is), all at once where 64 of them follow one another.
//   - A stage that is held until the next tile has come leaves one of two to load. Let go of at once: 354 -> 254 us,
//     gathered, at 128 -> 512 with 4096 rows on an H200; nothing where there are three stages or more.
//   - Splits of a head go down its rows side by side, not one run each: 2 to 4 % (64 -> 64, 128 -> 128).
//   - The weight's gradient alone, H200, 12 heads of 64, 12608 rows: 14.6 us, cuBLAS 20.0; 32 heads of 32, 16384
//   rows: 21.6
//     and 29.8; 64 heads of 64, 8192 rows: 36.0 and 33.4. Gathered, it copies nothing.
//   - The same graph of 128 -> 512 at 4096 rows takes 222 us in a cool H200, 250 us in one that has just worked.
//   - Sums of few rows cost more than the rows: weight in, grad_weight out, and twice through memory when split.
//
// ptxas 13.0: 128 registers at launch, 168 with one summing warpgroup; 44 bytes spilled by one kernel of each dtype.
#pragma once

#include "backward_sm90.h"
#include "backward_walk.h"

namespace mhmatmul::cuda::tuning {

constexpr double kFewestTilesPerCluster = 6;  // fewer: two products are faster; gathered, they would need copies
constexpr int64_t kNarrow = 64;               // heads that narrow are always faster in one pass
// The weight's gradient alone: cuBLAS is at the floor, or as near, where it has a head for every third block or more.
constexpr int64_t kClustersPerHeadAlone = 3;
// What a segment costs besides its rows, filling and draining, in tiles of 64 rows.
constexpr double kTilesPerSegment = 3;

// What a block holds: inputs of a head, outputs; and blocks of a cluster. hd 0: there is no tile for it.
struct BackwardTileShape {
  int hd, e, cluster;
};

inline BackwardTileShape backward_tile_shape(const HeadBackward& backward) {
  const int64_t hd = backward.hd, e = backward.e;
  if (hd <= kNarrow && e <= kNarrow) return {64, 64, 1};
  if (hd <= kNarrow || e <= kNarrow) return {};
  if (hd <= 128 && e <= 128) return {128, 128, 1};
  if (hd <= 128 && e <= 256) return {128, 256, 1};
  if (hd <= 256 && e <= 256) return {128, 256, 2};
  if (hd <= 128 && e <= 512) return {64, 512, 2};
  return {};
}

inline bool prefers_one_pass(const HeadBackward& backward, const sm90::BackwardCut& cut, int clusters) {
  if (backward.indices) return true;
  const bool is_narrow = backward.hd <= kNarrow && backward.e <= kNarrow;
  if (!backward.grad_input) return is_narrow && kClustersPerHeadAlone * backward.heads <= clusters;
  if (is_narrow) return true;
  const auto tiles = static_cast<double>(int64_t{cut.heads} * cut.hd_groups * cut.row_tiles);
  return tiles >= kFewestTilesPerCluster * clusters;
}

}  // namespace mhmatmul::cuda::tuning
