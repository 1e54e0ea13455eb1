// When the Hopper kernel is taken and with which tile: every number that was found by measuring, and how.
//
// Measured on an H100 80GB (132 SMs, a copy of 1 GiB at 2.99 TB/s), bfloat16, replays of a CUDA graph over operands
// that L2 does not hold; ours / cuBLAS in microseconds (floor = bytes at the copy's rate, or FLOP at torch.mm's):
//   heads of 128 -> 512, 1024 rows   71 / 73 (62)     heads of 512 -> 128, 1024 rows  75 / 71 (62)
//   heads of 128 -> 512, 4096 rows  262 / 268 (230)   heads of 512 -> 128, 4096 rows 264 / 250 (230)
//   10 heads 256 -> 256, 8192 rows   35 / 37 (28)     16 heads 256 -> 256, 4096 rows  28 / 31 (23)
//   12 heads 64 -> 64, 12608 rows    15 / 18 (13)     64 heads 64 -> 64, 8192 rows    54 / 54 (45)
//   16 heads 128 -> 128, 8192 rows   27 / 29 (23)     32 heads 128 -> 128, 8192 rows  54 / 55 (45)
//   32 heads 32 -> 32, 16384 rows    37 / 31 (22)     4 heads 512 -> 512, 8192 rows   40 / 34 (23)
//   one matrix of 4096              198 / 172 (170)   heads of 128 -> 512, 1 row      10 / 8.4 (5.7)
// with rows gathered by index in flight (cuBLAS would need a copy of the rows first, 128 MiB more to move):
//   32 heads 128 -> 128, 8192 of 65536 rows           54 (45), the dense product of as many rows 54
// What made the difference, in the order in which it was found:
//   - Two warpgroups that wait for stages out of turn take a barrier's round for the one before: wrong sums. Now they
//     take turns.
//   - Gathering with addresses computed for each piece and stage: 64 us instead of 54. One pointer a row, set per tile.
//   - Sixteen threads initialising barriers, each with its fence: 1.6 us a launch. One thread.
//   - Teams in neighbouring heads at the same rows, instead of runs of tiles wherever they fall: 280 -> 265 us at
//     128 -> 512. What is written at one time lies together.
//   - Evict-first stores, where C is larger than L2 keeps: 75 -> 71 us at 1024 rows. Else they do nothing.
//   - Launching before the kernel ahead has ended (programmatic dependent launch): about half a microsecond.
// In all of these, 22 shapes, cuBLAS (13.0) gave the very same bits.
// Tried and left:
//   - Padding a product whose sizes are no multiple of 8 for this kernel. Predicted from the copies' bytes: 1.2 to 1.4
//     times cuBLAS's speed. Found: 0.5 to 0.8; ATen's copies of odd rows run at a third of the memory's rate. Such
//     sizes cost cuBLAS 2.5 to 3 times the floor (4096 rows, 32 heads of 127 to 128: 58 us, of 128: 27 us).
//   - Fewer than 64 columns: from 32 down to 8 cuBLAS is at the floor, this kernel 4 us above it.
//   - The fastest of cuBLASLt's first 16 algorithms for what cuBLAS takes: within 1 % of the first one from 64 rows on
//     and, timed in a warm cache, worse for fewer (gemm_lt.cpp has the rule that came of it).
//
// ptxas 13.0: 168 registers at launch in each of the 32 kernels, no spills; 56 for the gathering threads were too few.
#pragma once

#include "gemm_sm90.h"

namespace mhmatmul::cuda::tuning {

constexpr int64_t kLongestHead = 256;           // longer ones are bound by what cuBLAS does better
constexpr int64_t kLongestGatheredHead = 512;   // here a copy of the rows costs more than what cuBLAS gains
constexpr int64_t kFewestColumns = 64;          // a tile has that many
constexpr int64_t kTilesPerSm = 4;              // fewer: filling and draining the pipeline is what is seen
constexpr int64_t kBytesCacheKeeps = 32 << 20;  // of C; L2 has 50 or 60 MiB

struct TileSize {
  int m, n;  // 128 x 64, 64 x 128, 128 x 128 or 64 x 256
};

inline TileSize tile_size(const HeadGemm& gemm) {
  if (gemm.n <= 64) return {128, 64};
  if (gemm.n > 128) return {64, 256};
  // Most rows of C name no row of A: nearly all the work is storing zeros, and larger tiles have fewer steps.
  return gemm.indices && gemm.a_rows < gemm.m ? TileSize{128, 128} : TileSize{64, 128};
}

inline bool prefers_sm90(const HeadGemm& gemm, int multiprocessors) {
  if (gemm.indices) return gemm.k <= kLongestGatheredHead;
  const auto tile = tile_size(gemm);
  const int64_t tiles = gemm.batch * ((gemm.m + tile.m - 1) / tile.m) * ((gemm.n + tile.n - 1) / tile.n);
  // Narrow tiles lose 1 % to cuBLAS where C is larger than L2 keeps, and win 16 % where it is not.
  constexpr int64_t kElementSize = 2;
  const bool is_narrow_and_large = tile.n == 64 && kElementSize * gemm.m * gemm.n * gemm.batch > kBytesCacheKeeps;
  return gemm.k <= kLongestHead && gemm.n >= kFewestColumns && tiles >= kTilesPerSm * multiprocessors &&
         !is_narrow_and_large;
}

}  // namespace mhmatmul::cuda::tuning
