// When the Hopper kernel is taken and with which tile: every number that was found by measuring, and how.
//
// Where blocks shall work is a matter of memory alone, so it was looked for with a kernel that only copies tiles, no
// mathematics, on an H200 (132 SMs), bfloat16, replays of a CUDA graph over operands that L2 does not hold; of the
// floor that a copy of 1 GiB gives, heads of 128 -> 128, 8192 rows of 32 heads:
//   each block down its own run of rows                                    0.80
//   blocks side by side at the same rows, in neighbouring heads             0.85 to 0.89
//   the same, but neighbours at neighbouring rows of one head               0.81
//   the same, tiles wherever they fall on all 132, B never kept             0.93
//   boxes of 8 rows, so that what lies together is written together         0.57
//   cudaMemcpyAsync of as many bytes                                        0.95
// So blocks go down the rows side by side (tile_walk.h). Predicted from it: 1.06 to 1.1 times the speed before.
//
// Measured on that H200; ours with the tile that is chosen / cuBLAS 13.0 in microseconds (floor: the bytes at 4.25 TB/s
// or FLOP at 794 TFLOP/s; 128 -> 512 in another run, at 4.15 and 766):
//   heads of 128 -> 512, 1024 rows   51 / 59 (44)     heads of 512 -> 128, 1024 rows  47 / 51 (44)
//   heads of 128 -> 512, 4096 rows  193 / 232 (166)   heads of 512 -> 128, 4096 rows 165 / 184 (163)
//   16 heads 256 -> 256, 4096 rows   20 / 24 (16)     4 heads 512 -> 512, 8192 rows   28 / 32 (21)
//   12 heads 64 -> 64, 12608 rows    11 / 14 (9)      16 heads 512 -> 512, 8192 rows 115 / 109 (87)*
//   64 heads 64 -> 64, 8192 rows     38 / 42 (32)     32 heads 32 -> 32, 16384 rows   19 / 25 (16)
//   32 heads 128 -> 128, 8192 rows   37 / 42 (32)     64 heads 16 -> 16, 8192 rows    10 / 22 (8)
//   32 heads 384 -> 128, 8192 rows   67 / 76 (64)     16 heads 192 -> 192, 4096 rows  17 / 19 (12)
//   32 heads 128 -> 128, 1024 rows  7.3 / 8.0 (4.2)   16 heads 256 -> 256, 1024 rows 8.2 / 8.8 (4.5)
// where every tile has a block of its own, from the start:
//   32 heads 128 -> 128, 256 rows   3.3 / 4.4 (1.2)   16 heads 256 -> 256, 256 rows  3.7 / 4.7 (1.5)
//   32 heads 256 -> 256, 1 row      2.7 / 3.9 (1.0)   1 head 512 -> 4096, 64 rows    3.2 / 4.4 (1.1)
//   128 heads 128 -> 512, 1 row     6.0 / 6.5 (4.0)   128 heads 512 -> 128, 64 rows  8.4 / 9.6 (6.4)
// with rows gathered by index in flight (cuBLAS would need a copy of the rows first, 128 MiB more to move):
//   32 heads 128 -> 128, 8192 of 65536 rows           38 (32)
// *: before C went from registers, and so may be slower than it need be; the rule below has not been looked at since.
// What made the difference, in the order in which it was found:
//   - Two warpgroups that wait for stages out of turn take a barrier's round for the one before: wrong sums. Now they
//     take turns.
//   - Gathering with addresses computed for each piece and stage: 64 us instead of 54 (H100). One pointer a row, set
//     per tile.
//   - Gathering with L2 asked for 256 bytes at a time instead of 128: 40.3 -> 39.7 us.
//   - Sixteen threads initialising barriers, each with its fence: 1.6 us a launch. One thread.
//   - Evict-first stores, where C is larger than L2 keeps: 75 -> 71 us at 128 -> 512, 1024 rows (H100). Evict-first
//     loads of A cost 1 to 9 %.
//   - Launching before the kernel ahead has ended (programmatic dependent launch): about half a microsecond.
//   - Blocks side by side at the same rows, and 128 x 128 where 64 x 128 was: 21 -> 18.4 us at 16 heads of 128.
//   - One tile of C for both warpgroups, where else A had a tile's worth of stages or less: 228 -> 165 us at
//     512 -> 128, 4096 rows; 54 -> 31 at 512 -> 512.
//   - Two or four narrow heads to a tile: 26 -> 19 us at 32 -> 32.
//   - Tiles of 32 rows, by all of 512 columns, made transposed from a B that stays in registers: predicted from copying
//     such tiles, at 0.93 of the floor, 54 -> 48 us at 128 -> 512, 1024 rows, and 195 -> 176 at 4096. Found: 50.6 and
//     193.5. With each warpgroup waiting for its sums before it multiplies on, 53 and 193; storing its columns for
//     itself, 56 and 202.
//   - One wave of small blocks, evenly dealt: 7.2 us with three blocks on some multiprocessors and one on others,
//     5.9 with two on each (128 heads of 512 -> 128, 1 row). Reading B alone takes 5.2 to 5.6.
//   - C straight from registers, 64 bytes of a row at a time, where tiles in shared memory waited for the copy engine:
//     the matrix units had waited for A (512 -> 512 with 4, 3, 2 stages of A: 31, 37, 52 us), which has their room now.
//     Predicted 31 -> 27 us there. Found, in one run: 30.7 -> 28.7; 20.6 -> 20.0 and 25.0 -> 24.4 at 256 -> 256 with
//     4096 and 8192 rows, 11.8 -> 11.4 at 64 -> 64, 39.3 -> 38.3 with gathered rows; but 18.2 -> 18.6 with 16 heads of
//     128, and 73.0 -> 73.9 at 256 -> 256 with 16384 rows. Between two runs, at 4096 rows of 32 heads, inputs or
//     outputs of 34 to 130: 6 to 15 % faster where A is loose, 11 % faster to 5 % slower where C is, 1 % faster to 9 %
//     slower at multiples of 8. With a branch between one exchange of words and the next it was slower than through
//     shared memory: 12.5 us at 64 -> 64.
//   - No more stages of A than it takes: 49.1 -> 48.2 us at 512 -> 128, 5 instead of 6, 21.0 -> 20.4 at 256 -> 256, 8
//     instead of 12; more in flight only keep C waiting.
// In 22 shapes cuBLAS gave the very same bits.
// Tried and left:
//   - Padding a product whose sizes are no multiple of 8 for this kernel. Predicted from the copies' bytes: 1.2 to 1.4
//     times cuBLAS's speed. Found: 0.5 to 0.8; ATen's copies of odd rows run at a third of the memory's rate. Such
//     sizes cost cuBLAS 2.5 to 3 times the floor (4096 rows, 32 heads of 127 to 128: 58 us, of 128: 27 us, H100).
//   - Stages of A of 64 rows in tiles of 128, to let go of them sooner: 1 % faster at 512 -> 128, 10 % slower at
//     512 -> 512.
//   - Small products: writing C without the copy engine (6.0 -> 6.1 us with 1 row, 9.4 -> 14.8 with 64), or asking for
//     B in L2 before the kernel ahead has ended (6.0 -> 7.0; where B is small it gains a tenth).
//   - The fastest of cuBLASLt's first 16 algorithms for what cuBLAS takes: within 1 % of the first one from 64 rows on
//     and, timed in a warm cache, worse for fewer.
//   - For 128 -> 512 with tiles of 64 x 256, which reach 0.83 of the floor: two blocks side by side in a cluster that
//     bring A for one another, or boxes of 32 and 16 rows: 0 to 1 %. The same cluster at 256 -> 256 and 512 -> 512:
//     nothing.
//   - Tiles of 32 rows by all columns at 256 -> 256: 0 to 4 % slower at 4096 and 8192 rows, 4 % faster at 16384. Of 16
//     rows: 20 to 40 % slower everywhere.
//   - Rows of C stored one by one, a kilobyte each: 194 -> 238 us at 128 -> 512, 4096 rows. Boxes of 16 rows instead of
//     32: 211, of 8: 324, since one thread hands over all of them.
//   - Rows gathered by the copy engine, a box for each: as fast as cp.async at best (41.1 to 41.5 us, 40.5 to 41.1),
//     and half as fast with a branch around it.
//   - Rows that are no multiples of 16 bytes as boxes that begin anywhere in longer rows: the copy engine wants the
//     address at which a box begins to be such a multiple, too.
//   - Blocks with the same piece of B in clusters of two, which bring it for one another: 0.5 to 3.6 us slower in eight
//     shapes, 1 % faster in one, 256 -> 256 with 16384 rows. Predicted: 1.3 us faster at 256 -> 256.
//   - Asking for the rows of 2, 4 or 8 tiles in L2 while B comes: the same (32 -> 32, 2 tiles) to 25 us slower
//     (512 -> 128, 1024 rows, 8 tiles); it is one engine that asks.
//   - Tiles wherever they fall on all multiprocessors, B brought for each, or for each two or four: 2 to 48 % slower.
//   - C through the stages by which its A came, which waits for it then: predicted faster than one tile of C for both
//     warpgroups at 512 -> 512, found 32 -> 38 us.
//   - Asking for A in L2 a tile ahead, by one block of those that read it: the same at 512 -> 512, 3 to 21 % slower
//     elsewhere.
//   - TF32, B turned by threads for the matrix unit, which wants it along k: faster than cuBLAS only where heads are
//     short (40 us for 48 at 32 -> 32, 22.5 for 25 at 64 -> 64; 138 for 114 at 128 -> 512, 72 for 65 at 256 -> 256),
//     and 2.5 times as far from exact, since the matrix unit cuts what nobody has rounded.
//
// A copy of as many bytes (Tensor.copy_), measured alike, is not at the floor either: 0.91 at 256 -> 256, 4096 rows,
// 0.90 at 128 -> 128, 8192 rows of 16 heads, 0.84 at 64 -> 64, 12608 rows, 0.91 at 32 -> 32, 0.975 at 128 -> 512, 1024
// rows.
//
// Loose operands (loose_sm90.cuh). Measured at 4096 rows of 32 heads; ours / cuBLAS in microseconds (floor):
//   in words     36 -> 128   17 / 40 (10)     100 -> 100  28 / 41 (13)
//                128 -> 66   20 / 37 (12)     256 -> 250  49 / 105 (33)
//   in elements  65 -> 128   36 / 42 (12)     127 -> 127  48 / 55 (16)
// Rows moved by words that are funnel-shifted where they are odd: 166 us at 127 -> 128, where 54 are cuBLAS's, since
// each load waited for the one before. What made the difference: all loads of a stage on their way at once, which takes
// 64 registers; addresses made anew for each tile, where the compiler would keep, and spill, them: 89 -> 43 us at 127
// -> 128, 36 -> 25 at 126 -> 128; cp.async for words, which needs no registers. More registers than the block was
// launched with cannot be had: warpgroups that ask for them wait for ever.
//
// ptxas 13.0: 168 registers at launch in the persistent kernels, 122 where they hold B, 58 and 90 in those of one wave,
// no spills; 56 for the gathering threads were too few, 120 for those that move elements.
#pragma once

#include "gemm_sm90.h"

namespace mhmatmul::cuda::tuning {

constexpr int64_t kLongestHead = 512;           // B of longer ones leaves no room for A
constexpr int64_t kFewestColumns = 40;          // of a tile's 64: cuBLAS is 3 to 14 % faster at 8 to 32 of 128 inputs
constexpr int kLeastBytesOfA = 48 << 10;        // in shared memory, under way or waiting, before B takes more
constexpr int64_t kBytesCacheKeeps = 32 << 20;  // of C; L2 has 50 or 60 MiB

// For share_out: chosen by hand, not by measuring.
constexpr double kTilesPerPiece = 0.5, kStaying = 0.9;

struct TileSize {
  int m, n;  // 128 x 64, 64 x 128, 128 x 128 or 64 x 256
};

// How many tiles of 8192 elements of C there are, the smallest.
inline double smallest_tiles(const HeadGemm& gemm) {
  const auto of = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
  return static_cast<double>(gemm.batch * (gemm.n <= 64 ? of(gemm.m, 128) : of(gemm.m, 64) * of(gemm.n, 128)));
}

inline TileSize tile_size(const HeadGemm& gemm, int multiprocessors) {
  constexpr double kFew = 3.5, kMany = 14;  // of each multiprocessor
  const double tiles = smallest_tiles(gemm) / multiprocessors;
  if (gemm.n <= 64) return {128, 64};
  if (tiles < kFew) return {64, 128};
  if (gemm.n > 128 && gemm.k <= 256 && tiles >= kMany && !gemm.indices) return {64, 256};
  return {128, 128};
}

// Of A, 64 along k, under way or waiting. Measured at heads of 64, 128, 256 and 512.
inline int most_stages_of_a(const TileSize& tile) { return tile.m == 64 ? 8 : (tile.n == 64 ? 6 : 5); }

// Whether a block shall hold a head's B in registers (held_sm90.cuh). Measured at 128 -> 512; how much less it may be
// was chosen by hand: so much that no more than half of k and a quarter of n are for nothing.
inline bool prefers_held(const HeadGemm& gemm) {
  return !gemm.indices && gemm.k > 64 && gemm.k <= 128 && gemm.n > 384 && gemm.n <= 512;
}

// Whether the matrix units take longer than the memory.
inline bool is_bound_by_flop(const HeadGemm& gemm) {
  constexpr double kFlopPerByte = 187;
  const auto k = static_cast<double>(gemm.k), n = static_cast<double>(gemm.n);
  return k * n > kFlopPerByte * (k + n);
}

// Where the copy engine cannot take an operand: cuBLAS is slower there, too, but for few rows, and where elements are
// brought one by one for a product that the matrix units bound.
inline bool prefers_loose(const HeadGemm& gemm, bool in_words, int multiprocessors) {
  constexpr double kFewInWords = 1.9, kFewInElements = 7.5;
  if (gemm.k > kLongestHead || (!in_words && is_bound_by_flop(gemm))) return false;
  return smallest_tiles(gemm) >= (in_words ? kFewInWords : kFewInElements) * multiprocessors;
}

inline bool prefers_sm90(const HeadGemm& gemm, int multiprocessors) {
  if (gemm.k > kLongestHead) return false;
  if (gemm.indices) return true;  // a copy of the rows costs more than what cuBLAS gains
  if (gemm.n < kFewestColumns) return false;
  // Filling and draining the pipeline is what is seen where there are fewer tiles, the sooner the longer heads are.
  constexpr double kDepthOfTile = 72;
  const double tiles = smallest_tiles(gemm) / multiprocessors;
  if (tiles * kDepthOfTile < static_cast<double>(gemm.k)) return false;
  if (!is_bound_by_flop(gemm)) return true;
  // Else cuBLAS, but for few heads with many rows.
  constexpr double kManyTiles = 15;
  constexpr int64_t kPiecesOfFewHeads = 16;  // of B, 128 columns each
  return gemm.batch * ((gemm.n + 127) / 128) <= kPiecesOfFewHeads && tiles >= kManyTiles;
}

}  // namespace mhmatmul::cuda::tuning
