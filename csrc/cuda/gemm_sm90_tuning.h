// When the Hopper kernel is taken and with which tile: every number that was found by measuring, and how.
//
// The rules come from products drawn by lot, since those that were made for the sizes of models were wrong between
// them: 1719 products at multiples of 8, heads of 48 to 512, 40 to 4096 columns, 1 to 256 heads, 256 to 16384 rows,
// each with all tiles and with cuBLAS, whose time is 1 here (geometric means, H200, bfloat16):
//   the rules before                                      1.023
//   the best tile, or cuBLAS where it is faster           0.921
//   the rules below                                       0.942
//   the same for 1406 other products, drawn afterwards    0.947 (7 % of them are over 5 % slower)
// Gathered rows, 453 products: 0.74 of index_select and bmm. Loose sizes, 593: 0.75 of bmm(out=). These times were not
// kept; benchmarks/gpu_random.py draws others.
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
// Measured on such H200s; ours with the tile that is chosen / cuBLAS 13.0 in microseconds (floor: the bytes at 4.2 TB/s
// or FLOP at 794 to 798 TFLOP/s), in several runs:
//   heads of 128 -> 512, 1024 rows   51 / 59 (44)     heads of 512 -> 128, 1024 rows  47 / 51 (44)
//   heads of 128 -> 512, 4096 rows  193 / 232 (163)   heads of 512 -> 128, 4096 rows 165 / 184 (163)
//   16 heads 256 -> 256, 4096 rows   20 / 24 (16)     4 heads 512 -> 512, 8192 rows   29 / 32 (22)
//   12 heads 64 -> 64, 12608 rows    12 / 14 (9)      16 heads 512 -> 512, 8192 rows 117 / 134 (87)*
//   64 heads 64 -> 64, 8192 rows     38 / 42 (32)     32 heads 32 -> 32, 16384 rows   19 / 25 (16)
//   32 heads 128 -> 128, 8192 rows   37 / 42 (32)     64 heads 16 -> 16, 8192 rows    10 / 22 (8)
//   32 heads 384 -> 128, 8192 rows   67 / 76 (64)     16 heads 192 -> 192, 4096 rows  17 / 19 (12)
//   32 heads 128 -> 128, 1024 rows  7.3 / 8.0 (4.2)   16 heads 256 -> 256, 1024 rows 8.2 / 8.8 (4.5)
// where every tile has a block of its own, from the start:
//   32 heads 128 -> 128, 256 rows   3.3 / 4.4 (1.2)   16 heads 256 -> 256, 256 rows  3.7 / 4.7 (1.5)
//   32 heads 256 -> 256, 1 row      2.7 / 3.9 (1.0)   1 head 512 -> 4096, 64 rows    3.2 / 4.4 (1.1)
//   128 heads 128 -> 512, 1 row     5.2 / 6.5 (4.0)   128 heads 512 -> 128, 64 rows  7.9 / 9.1 (6.5)
// with rows gathered by index in flight (cuBLAS would need a copy of the rows first, 128 MiB more to move):
//   32 heads 128 -> 128, 8192 of 65536 rows           38 (32)
// *: 107 / 115 in another run, with operands in L2.
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
//   - C through shared memory and the copy engine where rows of A or C are no multiples of 32 bytes, since parts of a
//     sector that are written apart cost more than their bytes. Predicted: 2 to 9 % at heads of up to 128. Found:
//     nothing where rows are such multiples; else, at 4096 rows of 32 heads, 24.9 -> 21.2 us at 128 -> 120, 156 -> 143
//     at 128 -> 1000, 20.9 -> 20.1 at 120 -> 128. With three stages of A, so that blocks remain together, 20.4 and 116;
//     gathered, 120 -> 120, 57 -> 45. Over 256 inputs little or nothing.
//   - Tiles of 64 x 192: at 136 to 192 and at 264 to 384 columns the tile before took 9 to 20 % longer than the best,
//     which is mostly this one.
//   - Long heads taken from cuBLAS again, now that C goes from registers: 134 -> 117 us at 16 heads of 512 -> 512, 143
//     -> 92 at 448 -> 448, 66 -> 56 at 4 heads of 512 -> 2048. With two pieces of B for each block, 64 heads: 152, and
//     129 are cuBLAS's.
//   - C past L1 from tiles of 64 columns. Predicted: 1 to 5 % wherever C goes from registers. Found, in two runs each:
//     37.9 -> 36.3 us at 64 heads of 64 -> 64, 19.0 -> 18.7 at 32 -> 32, nothing where tiles are wider, 1 to 2 % slower
//     there with gathered rows, and the backward kernel's gradients past L1 3 to 7 % slower.
//   - One wave of 7 or 8 blocks a multiprocessor: each asks for half of k at first. Predicted: the next kernel's blocks
//     come up beside them, 5 to 10 %. They have no registers for that; found all the same, 128 heads of 128 -> 512:
//     6.06 -> 5.91 us with 1 row, 9.17 -> 8.42 with 64. With 6 blocks or fewer, or longer heads: 6 to 26 % slower.
//   - A grid of three dimensions in place of two divisions before the first load of a small product. Predicted: 0.1 of
//     7.5 us behind a small kernel of PyTorch's, that included. Found: 0.1 to 0.15 (7.59 -> 7.50, 10.16 -> 10.02 with 1
//     and 64 rows at 128 -> 512, 7.55 -> 7.39 with 1 at 512 -> 128), next to nothing behind kernels of ours.
//   - An eighth to a quarter of a small product's B asked for in L2 before a kernel of ours has ended, 128 heads: at
//     128 -> 512 5.95 -> 5.76 us with 1 row, 6.53 -> 6.31 with 16, 8.4 to 8.8 -> 7.9 with 64, 6.85 -> 5.75 with 1 and a
//     transposed B; at 512 -> 128 5.85 -> 5.63, 6.65 -> 6.40, 8.35 -> 7.96. All of B, 7.1 to 7.5 where 5.95 were: it
//     passes L2 twice, which I think is not much faster than memory. The last of k, predicted to gain more than the
//     first, since it would have come by then: 6.1, and 9.2 with 64 rows.
//   - In place of that, B itself into shared memory before a kernel of ours has ended, where that writes other memory,
//     and the next kernel let up once the one before has ended instead of at once. Predicted: 5.85 -> 5.0 us at 128 ->
//     512 with 1 row. Found, in one run, 128 heads: 5.75 -> 5.05 with 1 row, 6.34 -> 5.61 with 16, 6.99 -> 6.48 with
//     32, 7.86 -> 7.90 with 64, 5.73 -> 5.85 with 1 and a transposed B. At 512 -> 128 less: 5.61 -> 5.57 with 1 row,
//     5.99 -> 5.99 with 8, 6.81 -> 6.63 with 24, 7.22 -> 6.92 with 32, 7.98 -> 7.77 with 64, since blocks of the next
//     kernel found no room; with room made for as many of them or, from 9 rows on, for one: 5.19, 5.51, 6.21, 6.43;
//     with 64 rows there is room for half of k alone, 8.69. Where k is 128, room made 3.09 us into 3.41 (32 heads of
//     128 -> 128, 256 rows).
//   - No more stages of A than it takes: 49.1 -> 48.2 us at 512 -> 128, 5 instead of 6, 21.0 -> 20.4 at 256 -> 256, 8
//     instead of 12; more in flight only keep C waiting.
// In 22 shapes cuBLAS gave the very same bits.
// Tried and left:
//   - C from registers to be evicted first: 0.7 % faster to 1.7 % slower, where tiles through shared memory gained 5 %.
//   - Padding a product whose sizes are no multiple of 8 for this kernel. Predicted from the copies' bytes: 1.2 to 1.4
//     times cuBLAS's speed. Found: 0.5 to 0.8; ATen's copies of odd rows run at a third of the memory's rate. Such
//     sizes cost cuBLAS 2.5 to 3 times the floor (4096 rows, 32 heads of 127 to 128: 58 us, of 128: 27 us, H100).
//   - Stages of A of 64 rows in tiles of 128, to let go of them sooner: 1 % faster at 512 -> 128, 10 % slower at
//     512 -> 512.
//   - Small products: writing C without the copy engine (6.0 -> 6.1 us with 1 row, 9.4 -> 14.8 with 64); A and B by
//     cp.async, which needs no tensor map (predicted: 0.3 to 0.6 us faster; found: 0.1 to 0.3 slower, 1.4 at 512 ->
//     4096 with 64 rows, 0.7 faster at 128 -> 512 with 1 and a transposed B, which asking for it in L2 gains as well);
//     C's tensor map asked for at the start (nothing); asking for B in L2 behind kernels of others, which do not let it
//     begin (9.0 -> 9.4 to 9.7), or by threads, 128 bytes each (5.95 -> 5.77 at 128 -> 512, 5.8 -> 6.2 at 512 -> 128).
//     Where B comes early, at 128 -> 512 with 1 row, where 5.05 to 5.10 us are: blocks of four pieces of columns, 5.43,
//     or of a tile of 256 columns, 5.29; the part of B that finds no room asked for in L2, 6.40; two warpgroups to a
//     block, their barriers numbered at run time, for which ptxas reserves all 16, 5.8 and, of one warpgroup, 7.04.
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
// ptxas 13.0: 168 registers at launch in the persistent kernels, 122 where they hold B, 58 to 90 in those of one wave,
// no spills (8 bytes with gathered rows in tiles of 64 x 256, which are not built); 56 for the gathering threads were
// too few, 120 for those that move elements.
#pragma once

#include "tile_walk.h"

#include <algorithm>
#include <optional>

namespace mhmatmul::cuda::tuning {

// What of a product decides: A [m, k] by B [k, n] for each head, and whether A's rows are gathered.
struct Sizes {
  int64_t m, n, k, heads;
  bool gathers;
};

constexpr int64_t kLongestHead = 512;           // B of longer ones leaves no room for A
constexpr int64_t kFewestColumns = 40;          // of a tile's 64: cuBLAS is 3 to 14 % faster at 8 to 32 of 128 inputs
constexpr int kLeastBytesOfA = 48 << 10;        // in shared memory, under way or waiting, before B takes more
constexpr int64_t kBytesCacheKeeps = 32 << 20;  // of C; L2 has 50 or 60 MiB

// For share_out: chosen by hand, not by measuring.
constexpr double kTilesPerPiece = 0.5, kStaying = 0.9;

struct TileSize {
  int m, n;
};

// The first of those that cost the same.
constexpr TileSize kTileSizes[] = {{128, 128}, {64, 256}, {64, 192}, {128, 64}, {64, 128}};

// The longest heads whose piece of B leaves A what it needs.
inline int64_t longest_head(const TileSize& tile) { return tile.n == 256 ? 320 : (tile.n == 192 ? 448 : kLongestHead); }

inline sm90::Cut not_shared_out(const Sizes& sizes, const TileSize& tile) {
  const auto blocks = [](int64_t size, int block) { return static_cast<int>((size + block - 1) / block); };
  sm90::Cut cut{};
  cut.m_blocks = blocks(sizes.m, tile.m);
  cut.n_blocks = blocks(sizes.n, tile.n);
  cut.k_blocks = blocks(sizes.k, sm90::kDepth);
  cut.heads = static_cast<int>(sizes.heads);
  return cut;
}

inline sm90::Cut cut_of(const Sizes& sizes, const TileSize& tile, int multiprocessors) {
  sm90::Cut cut = not_shared_out(sizes, tile);
  share_out(cut, multiprocessors, kTilesPerPiece, kStaying);
  return cut;
}

// What keeps the busiest block: a row of a tile costs as much as its columns and these, 64 along k of a piece of B as
// much as so many rows of it.
inline double cost(const sm90::Cut& cut, const TileSize& tile) {
  constexpr double kColumnsOfRow = 128, kRowsOfPiece = 48;
  return static_cast<double>(cut.most_tiles()) * tile.m * (tile.n + kColumnsOfRow) +
         static_cast<double>(cut.most_groups()) * cut.k_blocks * tile.n * kRowsOfPiece;
}

// Rows cost more that are gathered: 64 x 256 has no registers for them, and 64 x 128 brings them twice as often.
inline TileSize tile_of_gathered(const Sizes& sizes) {
  if (sizes.n <= 64) return {128, 64};
  const TileSize wide{64, 192};
  return sizes.n > 128 && sizes.n <= wide.n && sizes.k <= longest_head(wide) ? wide : TileSize{128, 128};
}

inline TileSize cheapest_tile(const Sizes& sizes, int multiprocessors) {
  TileSize best{};
  double least = 0;
  for (const TileSize& tile : kTileSizes) {
    if (sizes.k > longest_head(tile)) continue;
    const double own = cost(cut_of(sizes, tile, multiprocessors), tile);
    if (best.m > 0 && own >= least) continue;
    best = tile;
    least = own;
  }
  return best;
}

// Whether C goes through shared memory and by the copy engine: where rows begin or end within a sector of memory, that
// is 32 bytes, it writes less of them in parts.
inline bool prefers_tiles_of_c(const Sizes& sizes, bool a_splits_sectors, bool c_splits_sectors) {
  return (a_splits_sectors || c_splits_sectors) && sizes.k <= 256;
}

// Of A, 64 along k, under way or waiting. Measured at heads of 64, 128, 256 and 512. The fewer, the closer together
// blocks remain, and the parts of a sector that two of them write.
inline int most_stages_of_a(const TileSize& tile, const Sizes& sizes, bool c_splits_sectors) {
  if (c_splits_sectors && sizes.k <= 128) return 3;
  return tile.m == 64 ? 8 : (tile.n == 64 ? 6 : 5);
}

// Of a small product's k, in 64s, what each of `blocks` blocks on a multiprocessor asks for at once.
inline int stages_of_one_wave(int k_blocks, int blocks) {
  constexpr int kMany = 7;
  return k_blocks == 2 && blocks >= kMany ? 1 : k_blocks;
}

// Whether stages for so much of a small product's k, in 64s, are enough where B comes early and blocks of two kernels
// share a multiprocessor. Measured at 2, 4 and 8.
inline bool are_enough_beside(int stages, int k_blocks) { return k_blocks > 2 && 4 * stages >= 3 * k_blocks; }

// Whether a block shall hold a head's B in registers (held_sm90.cuh). Measured at 128 -> 512; how much less it may be
// was chosen by hand: so much that no more than half of k and a quarter of n are for nothing.
inline bool prefers_held(const Sizes& sizes) {
  return !sizes.gathers && sizes.k > 64 && sizes.k <= 128 && sizes.n > 384 && sizes.n <= 512;
}

// How long the matrix units take, of what the memory takes: longer where it is more than 1.
inline double flop_share(const Sizes& sizes) {
  constexpr double kFlopPerByte = 187;
  const auto k = static_cast<double>(sizes.k), n = static_cast<double>(sizes.n);
  return k * n / (k + n) / kFlopPerByte;
}

// How many tiles of 8192 elements of C each multiprocessor would have, the smallest there are.
inline double smallest_tiles(const Sizes& sizes, int multiprocessors) {
  const auto of = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
  const int64_t tiles = sizes.n <= 64 ? of(sizes.m, 128) : of(sizes.m, 64) * of(sizes.n, 128);
  return static_cast<double>(sizes.heads * tiles) / multiprocessors;
}

// Where the copy engine cannot take an operand: cuBLAS is slower there, too, but for few rows, and where elements of A
// are brought one by one for few columns (0.66 to 0.85 of its speed at 19 to 31) or a product that the matrix units
// bound.
inline bool prefers_loose(const Sizes& sizes, bool a_in_elements, int multiprocessors) {
  constexpr double kFew = 1.9, kFewInElements = 7.5;
  if (sizes.k > kLongestHead) return false;
  if (a_in_elements && (sizes.n < kFewestColumns || flop_share(sizes) > 1)) return false;
  return smallest_tiles(sizes, multiprocessors) >= (a_in_elements ? kFewInElements : kFew);
}

// The tile with which the persistent kernel takes a product; none where cuBLAS is the faster one.
inline std::optional<TileSize> preferred_tile(const Sizes& sizes, int multiprocessors) {
  if (sizes.k > kLongestHead) return std::nullopt;
  if (sizes.gathers) return tile_of_gathered(sizes);  // a copy of the rows costs more than what cuBLAS gains
  if (sizes.n < kFewestColumns) return std::nullopt;
  // Filling and draining the pipeline is what is seen where there are fewer tiles, the sooner the longer heads are.
  constexpr double kDepthOfTile = 72;
  if (smallest_tiles(sizes, multiprocessors) * kDepthOfTile < static_cast<double>(sizes.k)) return std::nullopt;
  // A block that turns to another piece of B waits for it, the longer the longer heads are.
  const TileSize tile = cheapest_tile(sizes, multiprocessors);
  const sm90::Cut cut = cut_of(sizes, tile, multiprocessors);
  constexpr int64_t kShortHead = 256, kFewGroups = 3;
  constexpr double kLittleFlop = 0.4, kLeastUseful = 0.75;  // of what the matrix units do
  const double done = static_cast<double>(cut.most_tiles()) * tile.m * tile.n * multiprocessors;
  const bool is_faster =
      sizes.k <= kShortHead
          ? cut.most_groups() <= kFewGroups || flop_share(sizes) <= kLittleFlop
          : cut.most_groups() == 1 && static_cast<double>(sizes.m * sizes.n * sizes.heads) > kLeastUseful * done;
  return is_faster ? std::optional(tile) : std::nullopt;
}

}  // namespace mhmatmul::cuda::tuning
