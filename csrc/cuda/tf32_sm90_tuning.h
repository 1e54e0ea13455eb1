// When a product of float32, rounded to TF32, is taken by the Hopper kernel and with which tile: every number that was
// found by measuring, and how.
//
// Predicted: the share of the floor that bfloat16's kernels have, 0.85, where cuBLAS is at 0.64 to 0.77; found 0.74 to
// 0.88. Measured on H200s, replays of a CUDA graph over operands that L2 does not hold; ours / cuBLAS 13.0 in
// microseconds (floor: the bytes at 4.2 TB/s or FLOP at 413 TFLOP/s), in one run:
//   64 heads 64 -> 64, 8192 rows     73 / 89 (64)     128 heads 128 -> 512, 1024 rows  111 / 114 (87)
//   32 heads 32 -> 32, 16384 rows    38 / 50 (32)     128 heads 128 -> 512, 4096 rows  397 / 424 (326)
//   12 heads 64 -> 64, 12608 rows    21 / 25 (18)     10 heads 256 -> 256, 8192 rows    53 / 67 (40)
//   16 heads 128 -> 128, 8192 rows   37 / 48 (32)     16 heads 256 -> 256, 4096 rows    44 / 50 (33)
//   16 heads 64 -> 256, 8192 rows    50 / 64 (40)     32 heads 128 -> 128, 1024 rows    12 / 14 (8)
// Results are as far from exact as cuBLAS's, to three digits.
//
// The rules come from 839 products drawn by lot, each with all widths of tiles and by cuBLAS: heads of 16 to 256, 8 to
// 4096 columns, 1 to 128 heads, 1 to 16384 rows, a third with B transposed; cuBLAS's time is 1 (geometric means):
//   the best width, always                                1.20
//   the best width, or cuBLAS where it is faster          0.949
//   the rules below                                       0.973
//   those 170 that the rules take                         0.874 (9 are over 5 % slower)
// Their times are benchmarks/results/2026-11-28-h200-tf32-tiles.csv: three widths of tiles, of 256 columns only where
// heads are of 128 at most; the width that has room for all columns; the same without warpgroups in turn, which the
// others had (see below).
// 300 others, by benchmarks/gpu_random.py: 1.05 times the speed at multiples of 8, 3 of 218 over 5 % slower; 1.19 the
// 63 of them that are taken; of any sizes none is taken. The estimate is the least squares fit to the 839, 14 % off in
// the root mean square.
//
// What made the difference, microseconds of 128 -> 512 with 1024 and with 4096 rows, and of 256 -> 256 with 4096:
//   - Warpgroups in step, meeting once a tile, two tiles' sums in turn, one thread that stores: 115, 397, 51.
//   - Each 128 bytes of a row stored by a thread of its own: 118, 418, 52. Of these were left, with a 16th or 32nd of
//     the multiplications, 107, 404, 43; without stores 101, 333, 44; with neither, nor A, 36, 121, 16.
//   - A thread that brings, one that stores, no meeting, B through A's stages: 109, 395, 48.
//   - Pairs that bring A for one another, in another run: 113 where 112 without, 403 where 401, 45 where 48. So only
//     where B is long.
// Tried and left: clusters of four (1.9 times as long as two at 256 -> 512; multiprocessors do not come in fours),
// warpgroups that multiply in turn (1 % faster to 4 % slower), two tiles of C instead of three (up to 5 % slower), A
// and B not rounded by the copy engine (as fast; the matrix unit cuts what it is given, which was 2.5 times as far from
// exact in an earlier kernel). That one turned B in shared memory: 138 us at 1024 rows of 128 -> 512, 72 at 256 -> 256.
//
// ptxas 13.0: 96 registers at launch, 168 where B is long, no spills.
#pragma once

#include "gemm_sm90_tuning.h"

namespace mhmatmul::cuda::tuning {

// Of B a block keeps [k, 64 * units] in the registers of `groups` warpgroups, each 64 columns for 32 rows at a time.
struct Tf32Size {
  static constexpr int kRows = 32, kColumns = 64;
  int k, units, groups;

  constexpr int m() const { return kRows * groups / units; }
  constexpr int n() const { return kColumns * units; }
  // Of a tile of A and of C, and of a piece of B.
  constexpr int64_t bytes_of_a() const { return int64_t{4} * m() * k; }
  constexpr int64_t bytes_of_c() const { return int64_t{4} * m() * n(); }
  constexpr int64_t bytes_of_b() const { return int64_t{4} * k * n(); }
};

constexpr Tf32Size kTf32Sizes[] = {{32, 1, 4},  {64, 1, 4},  {64, 2, 4},  {64, 4, 4},
                                   {128, 1, 4}, {128, 2, 4}, {128, 4, 4}, {256, 2, 2}};

inline sm90::Cut cut_of(const Sizes& sizes, const Tf32Size& tile, int multiprocessors) {
  sm90::Cut cut = not_shared_out(sizes, {tile.m(), tile.n()});
  const auto tiles_per_piece =
      static_cast<double>(tile.bytes_of_b()) / static_cast<double>(tile.bytes_of_a() + tile.bytes_of_c());
  share_out(cut, multiprocessors, tiles_per_piece, kStaying);
  return cut;
}

// In microseconds, on an H200.
inline double estimate(const Sizes& sizes, const Tf32Size& tile, int multiprocessors) {
  const sm90::Cut cut = cut_of(sizes, tile, multiprocessors);
  const auto useful = [](int64_t size, int64_t blocks, int block) {
    return static_cast<double>(size) / static_cast<double>(blocks * block);
  };
  const double rows = useful(sizes.m, cut.m_blocks, tile.m()), columns = useful(sizes.n, cut.n_blocks, tile.n());
  const auto bytes = [](int64_t bytes) { return 1e-3 * static_cast<double>(bytes); };
  const double of_tile = 0.433 +
                         rows * (0.0152 * bytes(tile.bytes_of_a()) + 0.011 * columns * bytes(tile.bytes_of_c())) +
                         0.111e-6 * tile.m() * tile.n() * tile.k;
  const double of_piece = 1.18 + 0.05 * bytes(tile.bytes_of_b());
  return 2.46 + static_cast<double>(cut.most_tiles()) * of_tile + static_cast<double>(cut.most_groups()) * of_piece;
}

// The tile with which the kernel takes a product; none where cuBLAS is the faster one.
inline std::optional<Tf32Size> preferred_tf32(const Sizes& sizes, bool b_is_transposed, int multiprocessors) {
  constexpr int64_t kLongest = 256;
  if (sizes.k > kLongest || sizes.gathers) return std::nullopt;
  // Long heads are worth it where little of a tile is for nothing; cuBLAS needs not turn a transposed B.
  if (sizes.k > 128 && (b_is_transposed || sizes.k <= 192 || sizes.n < 128)) return std::nullopt;
  std::optional<Tf32Size> best;
  double least = 0;
  for (const Tf32Size& tile : kTf32Sizes) {
    if (tile.k < sizes.k) continue;
    const double own = estimate(sizes, tile, multiprocessors);
    if (best && own >= least) continue;
    best = tile;
    least = own;
  }
  // What cuBLAS was found to take, in microseconds.
  constexpr double kBytesPerSecond = 4.2e12, kFlopPerSecond = 413e12, kTimesFloor = 1.55, kOnTop = 2;
  const auto m = static_cast<double>(sizes.m), n = static_cast<double>(sizes.n), k = static_cast<double>(sizes.k);
  const double heads = static_cast<double>(sizes.heads), elements = heads * (m * k + k * n + m * n);
  const double floor = 1e6 * std::max(4 * elements / kBytesPerSecond, 2 * heads * m * n * k / kFlopPerSecond);
  return least < kTimesFloor * floor + kOnTop ? best : std::nullopt;
}

}  // namespace mhmatmul::cuda::tuning
