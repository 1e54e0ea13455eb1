// When a product of float32, rounded to TF32, is taken by a Hopper kernel and with which tile: every number that was
// found by measuring, and how.
//
// Measured on H200s, replays of a CUDA graph over operands that L2 does not hold; ours / cuBLAS 13.0 in microseconds
// (floor: the bytes at 4.2 TB/s or FLOP at 413 TFLOP/s). B held, in one run:
//   64 heads 64 -> 64, 8192 rows     69 / 88 (64)     128 heads 128 -> 512, 1024 rows  103 / 113 (87)
//   32 heads 32 -> 32, 16384 rows    35 / 49 (32)     128 heads 128 -> 512, 4096 rows  374 / 417 (326)
//   12 heads 64 -> 64, 12608 rows    20 / 26 (18)     128 heads 128 -> 512, 256 rows    34 / 46 (28)
//   16 heads 128 -> 128, 8192 rows   35 / 48 (32)     32 heads 128 -> 128, 1024 rows    11 / 14 (8)
// B streamed, in another:
//   10 heads 256 -> 256, 8192 rows   53 / 66 (40)     4 heads 512 -> 512, 8192 rows     60 / 66 (42)
//   16 heads 256 -> 256, 4096 rows   42 / 49 (33)     16 heads 512 -> 512, 4096 rows   116 / 119 (83)
//   16 heads 128 -> 128, 8192 rows   38 / 48 (32)     8 heads 1024 -> 1024, 4096 rows  211 / 246 (166)
// Results are as far from exact as cuBLAS's, to three digits.
//
// What seems to bound them: power. In a kernel with the matrix units in TF32 at work the clock was read, after 3 to
// 1000 calls on end: 1.1 to 1.66 GHz where 1.98 are allowed. So what is moved and what is multiplied add up rather than
// hide one another. At 512 -> 512, 45 us are left of 60 without stores, at 256 -> 256, 31 of 52; dealing the stores out
// over time, or through shared memory, gains nothing.
//
// The rules for held weights come from 4789 products drawn by lot, by cuBLAS and with two or three widths of tiles or,
// for heads of up to 32, the one that there is: heads of 16 to 128, 8 to 4096 columns, 1 to 128 heads, 1 to 16384 rows,
// a third with B transposed (benchmarks/results/2026-11-28-h200-tf32-held.csv). In 675 of them heads begin within a
// sector of C: 1.16 with the best width where cuBLAS's time is 1, and 1.24 where the floor is 15 us or more, so cuBLAS
// has those. Of the others (geometric means):
//   the best width, always                                0.842
//   the best width, or cuBLAS where it is faster          0.830
//   the rules below                                       0.856
//   those 3052 that the rules take                        0.811 (43 are over 5 % slower)
// Of 2525 drawn afterwards (2026-11-28-h200-tf32-held-again.csv) the rules take 1780, in 0.826 (0.56 to 1.18) of
// cuBLAS's time, 24 of them over 5 % slower. The estimate is the least squares fit to half of the 4114, 12 % off in the
// root mean square. In these lists, and in the first table above, C had a hint to L2, which makes no difference (see
// below) and is gone. Older: 839 with C through shared memory (2026-11-28-h200-tf32-tiles.csv).
//
// Those for streamed weights come from 3870 products: heads of 132 to 2048, 16 to 4096 columns, 1 to 128 heads, 64 to
// 16384 rows, a quarter with B transposed (benchmarks/results/2026-11-28-h200-tf32-streamed.csv, when columns or rows
// that do not fill a tile were still written with a branch around each, and all heads of the same rows were together
// for up to 256 columns, whatever B takes). The estimates are least squares fits to those with whole tiles of columns,
// ours 9 % off, cuBLAS's 14. 1530 others, drawn afterwards, B not transposed
// (2026-11-28-h200-tf32-streamed-again.csv). In both lists, and in the second table above, A was first to be evicted
// from L2 where nobody would read it again, which gains nothing (see below) and is gone:
//   always                                                1.10
//   where it is faster                                    0.948
//   the rules below                                       0.968
//   those 402 that the rules take                         0.883 (0.46 to 1.10; 4 are over 5 % slower)
// Of up to 128 columns 29 of 104 would be over 5 % slower, so none is taken. With B transposed, which cuBLAS need not
// turn, rules as good would gain 1 %.
//
// What made the difference where B is held, microseconds of 128 -> 512 with 1024 and with 4096 rows, and of 256 -> 256
// with 4096, which was held then; predicted was 0.85 of the floor:
//   - Warpgroups in step, meeting once a tile, two tiles' sums in turn, one thread that stores: 115, 397, 51.
//   - Each 128 bytes of a row stored by a thread of its own: 118, 418, 52. Of these were left, with a 16th or 32nd of
//     the multiplications, 107, 404, 43; without stores 101, 333, 44; with neither, nor A, 36, 121, 16.
//   - A thread that brings, one that stores, no meeting, B through A's stages: 109, 395, 48.
//   - Pairs that bring A for one another, in another run: 113 where 112 without, 403 where 401, 45 where 48.
//   - Two columns side by side for each thread, eight bytes read and written at a time: 111 -> 108, 397 -> 402, 45 ->
//     41; with all banks busy when B is turned, too: 108, 398.
//   - C from registers, without the pass through shared memory, whose room is A's now: 107 -> 103, 393 -> 377.
//     Predicted: 2 to 5 % there and at 32 -> 32; found 4 %, and 6 % at 32 -> 32, 4 % at 128 -> 128, 5 % at 64 -> 64. It
//     has to go past L1: else 110, 399, and 13 % longer in 1780 products. Whether it is first to be evicted from L2
//     makes no difference. Columns of 3070 in 48464 products were wrong at first: the copy engine wrote over B while
//     threads still read it, since their loads wait behind stores, and telling that a stage is free does not wait for
//     loads. A fence does; 0 of 101356 since.
// Tried and left there: clusters of four (1.9 times as long as two at 256 -> 512: multiprocessors are not in fours),
// warpgroups that multiply in turn (1 % faster to 4 % slower), two tiles of C in shared memory instead of three (up to
// 5 % slower), A and B not rounded by the copy engine (as fast; the matrix unit cuts what it is given, which was 2.5
// times as far from exact in an earlier kernel), sums of the next tile begun before those of the last are written
// (nothing at 256 -> 256). Heads of 193 to 256 held by two warpgroups, in tiles of 64 x 128 or 32 x 128: 53 -> 51 us
// with 8192 rows of 10 heads, 79 -> 65 with 4096 of 16, 256 -> 512, but rules with estimates like those below would
// gain 1 % on average over the streamed ones (2026-11-28-h200-tf32-held-256.csv).
//
// Where B is streamed, microseconds of 512 -> 512, of 256 -> 256 with 8192 rows of 10 heads and with 4096 of 16.
// Predicted from the FLOP and one tile's stores: 52 to 58, 46 to 50, 38 to 42; found 59 to 60, 50 to 53, 41 to 42.
//   - Four stages, three, two: 60, 66, 93; 52, 56, 75; 44, 47, 61.
//   - No branch around each write: 64 -> 60, 54 -> 53, 45 -> 42.
//   - C past L1, and first to be evicted from L2, which makes no difference: 63 -> 60, 59 -> 52, 47 -> 44.
//   - Pairs: 65 -> 64, 57 -> 55, 50 -> 47 (with the lag below).
//   - All heads of the same rows together, where B is little: nothing, 54 -> 52, 44 -> 42. Where it is not, 16 heads of
//     512 -> 512: 118 -> 130.
// Tried and left there: C through shared memory and the copy engine, beside three stages (as long as three without);
// sixteen bytes at a time, after threads have exchanged columns (with a branch around each, 60 -> 67); one warpgroup
// three stages behind the other (1 us slower); half of the blocks half a tile behind (0.5 to 4 us slower); A to be
// evicted first (53 -> 51 at 256 -> 256 in one run, 51 -> 52 in another), B last (nothing); tiles of 128 rows (84, 64,
// 56, with that lag).
//
// ptxas 13.0: 96 registers at launch where B is held, 168 where it is streamed, no spills.
#pragma once

#include "gemm_sm90_tuning.h"

namespace mhmatmul::cuda::tuning {

// A tile of C, and how much of k is brought together.
struct Tf32Size {
  int m, n, k;

  // Of a tile of A and of C, and of a piece of B.
  constexpr int64_t bytes_of_a() const { return int64_t{4} * m * k; }
  constexpr int64_t bytes_of_c() const { return int64_t{4} * m * n; }
  constexpr int64_t bytes_of_b() const { return int64_t{4} * k * n; }
};

// Where B is held, all of k.
constexpr Tf32Size kTf32Held[] = {{128, 64, 32},  {128, 64, 64},  {64, 128, 64}, {32, 256, 64},
                                  {128, 64, 128}, {64, 128, 128}, {32, 256, 128}};
constexpr Tf32Size kTf32Streamed{256, 128, 32};

// What L2 writes as a whole: where rows of C begin within one, threads write half of each.
constexpr int64_t kSectorBytes = 32;

inline sm90::Cut cut_of(const Sizes& sizes, const Tf32Size& tile, int multiprocessors) {
  sm90::Cut cut = not_shared_out(sizes, {tile.m, tile.n});
  const auto tiles_per_piece =
      static_cast<double>(tile.bytes_of_b()) / static_cast<double>(tile.bytes_of_a() + tile.bytes_of_c());
  share_out(cut, multiprocessors, tiles_per_piece, kStaying);
  return cut;
}

// What one must move and multiply, in microseconds of an H200's memory and of its matrix units.
struct Work {
  double moving, moving_b, moving_c, multiplying;

  explicit Work(const Sizes& sizes) {
    constexpr double kBytes = 4.2e6, kFlop = 413e6;  // in a microsecond
    const auto m = static_cast<double>(sizes.m), n = static_cast<double>(sizes.n), k = static_cast<double>(sizes.k);
    const auto heads = static_cast<double>(sizes.heads);
    moving = 4 * heads * (m * k + k * n + m * n) / kBytes;
    moving_b = 4 * heads * k * n / kBytes;
    moving_c = 4 * heads * m * n / kBytes;
    multiplying = 2 * heads * m * n * k / kFlop;
  }
};

// None: there are too many tiles to be counted.
inline std::optional<sm90::Deal> deal_of(const Sizes& sizes, int multiprocessors) {
  const sm90::Cut cut = not_shared_out(sizes, {kTf32Streamed.m, kTf32Streamed.n});
  sm90::Deal deal{};
  deal.m_blocks = cut.m_blocks;
  deal.n_blocks = cut.n_blocks;
  deal.heads = cut.heads;
  if (!deal_out(deal, multiprocessors)) return std::nullopt;
  // What is read and written at one time lies together in memory where all heads of the same rows are next to one
  // another, but then B of all heads is read again and again.
  constexpr double kLittle = 2;  // microseconds: 8 MiB
  deal.heads_before_rows = deal.n_blocks == deal.team && Work(sizes).moving_b <= kLittle;
  return deal;
}

// Lines of L2 with columns of C of two heads, which no block writes as a whole.
constexpr bool heads_share_lines(const Sizes& sizes) { return sizes.n % 32 != 0; }

// Estimates are in such microseconds.
inline double estimate_held(const Sizes& sizes, const Tf32Size& tile, int multiprocessors) {
  const sm90::Cut cut = cut_of(sizes, tile, multiprocessors);
  const auto useful = [](int64_t size, int64_t blocks, int block) {
    return static_cast<double>(size) / static_cast<double>(blocks * block);
  };
  const double rows = useful(sizes.m, cut.m_blocks, tile.m), columns = useful(sizes.n, cut.n_blocks, tile.n);
  const auto bytes = [](int64_t bytes) { return 1e-3 * static_cast<double>(bytes); };
  const double of_c = heads_share_lines(sizes) ? 0.031 : 0.0183;
  const double of_tile = 0.28 + rows * (0.0172 * bytes(tile.bytes_of_a()) + of_c * columns * bytes(tile.bytes_of_c())) +
                         0.111e-6 * tile.m * tile.n * tile.k;
  const double of_piece = 0.34 + 0.0255 * bytes(tile.bytes_of_b());
  return 2.1 + static_cast<double>(cut.most_tiles()) * of_tile + static_cast<double>(cut.most_groups()) * of_piece;
}

inline double estimate_streamed(const Sizes& sizes, const sm90::Deal& deal, int multiprocessors) {
  const auto k_blocks = static_cast<double>((sizes.k + 63) / 64 * 2);
  const double busy = static_cast<double>(deal.blocks) / multiprocessors;
  return 4.1 + deal.most_tiles() * (0.9 + 1.4 * busy + 0.52 * k_blocks) + 0.51 * Work(sizes).moving;
}

inline std::optional<Tf32Size> preferred_held(const Sizes& sizes, int multiprocessors) {
  const Work work(sizes);
  constexpr int64_t kFewestRows = 128;
  constexpr double kMostOfSharedLines = 32;  // microseconds: 128 MiB; of more, lines leave L2 half written
  if (sizes.m < kFewestRows || (heads_share_lines(sizes) && work.moving_c > kMostOfSharedLines)) return std::nullopt;
  std::optional<Tf32Size> best;
  double least = 0;
  for (const Tf32Size& tile : kTf32Held) {
    if (tile.k < sizes.k) continue;
    const double own = estimate_held(sizes, tile, multiprocessors);
    if (best && own >= least) continue;
    best = tile;
    least = own;
  }
  const double of_cublas = 3.4 + 1.38 * std::max(work.moving, work.multiplying);
  return best && least < of_cublas ? best : std::nullopt;
}

inline std::optional<Tf32Size> preferred_streamed(const Sizes& sizes, int multiprocessors) {
  if (sizes.n <= kTf32Streamed.n) return std::nullopt;  // A would be brought for few columns
  const auto deal = deal_of(sizes, multiprocessors);
  if (!deal) return std::nullopt;
  const Work work(sizes);
  const double of_cublas = 5.85 + 0.91 * work.moving + 0.86 * work.multiplying - 0.19 * work.moving_b;
  return estimate_streamed(sizes, *deal, multiprocessors) < of_cublas ? std::optional(kTf32Streamed) : std::nullopt;
}

// The tile with which a kernel takes a product; none where cuBLAS is the faster one.
inline std::optional<Tf32Size> preferred_tf32(const Sizes& sizes, bool b_is_transposed, int multiprocessors) {
  constexpr int64_t kLongestHeld = 128, kLongest = 2048;
  if (sizes.gathers || sizes.k > kLongest) return std::nullopt;
  if (sizes.k <= kLongestHeld) return preferred_held(sizes, multiprocessors);
  return b_is_transposed ? std::nullopt : preferred_streamed(sizes, multiprocessors);  // cuBLAS need not turn it
}

}  // namespace mhmatmul::cuda::tuning
