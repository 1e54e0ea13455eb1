// Which block of the Hopper kernel works on which tiles, and in which order. Neither Tensor nor CUDA: a test walks it
// on the host.
#pragma once

#include "../host_device.h"

#include <algorithm>
#include <cstdint>

namespace mhmatmul::cuda::sm90 {

constexpr int kDepth = 64;  // elements along k that are brought together

// How the work is cut into tiles and shared out, decided on the host.
struct Cut {
  int m_blocks, n_blocks, k_blocks, heads;
  // Of one piece of B, a group has the tiles at rows first, first + step, ...: all that are left, when groups take the
  // rows in turn (step > 1), else `run` of them. Blocks take groups in turn.
  int blocks, step, run;
  int a_stages, b_stages, c_tiles;
  bool b_stays;

  MHMATMUL_HOST_DEVICE int64_t pieces() const { return int64_t{heads} * n_blocks; }
  int64_t groups() const { return pieces() * (step > 1 ? std::min(step, m_blocks) : (m_blocks + run - 1) / run); }
  // Those of the block that has most of them, and its tiles.
  int64_t most_groups() const { return (groups() + blocks - 1) / blocks; }
  int64_t most_tiles() const { return step > 1 ? (m_blocks + step - 1) / step : most_groups() * run; }
};

// What is read and written at one time shall lie together in memory: blocks side by side are at the same rows, in
// neighbouring heads, and all of them go down the rows side by side. A block that stays with its piece of B brings it
// once. Where there are more pieces than multiprocessors, or too many of these would have none, groups are runs of
// rows, of the length that shares them out most evenly. Bringing another piece costs as much as `tiles_per_piece`;
// staying is worth it if it takes no longer than runs, `staying` times its own tiles counted.
inline void share_out(Cut& cut, int multiprocessors, double tiles_per_piece, double staying) {
  const int64_t pieces = cut.pieces();
  const auto share = [](int64_t whole, int64_t parts) { return (whole + parts - 1) / parts; };
  const double even = static_cast<double>(pieces) * cut.m_blocks / multiprocessors;  // tiles of each
  double least = 0;
  constexpr int kMostRuns = 64;
  for (int runs = 1; runs <= std::min(kMostRuns, cut.m_blocks); ++runs) {
    const int64_t run = share(cut.m_blocks, runs);
    const double cost_of_run = static_cast<double>(run) + tiles_per_piece;
    if (runs > 1 && even * cost_of_run >= least * static_cast<double>(run)) break;  // nor are shorter ones better
    const double cost = static_cast<double>(share(pieces * share(cut.m_blocks, run), multiprocessors)) * cost_of_run;
    if (runs > 1 && cost >= least) continue;
    least = cost;
    cut.run = static_cast<int>(run);
  }
  cut.step = 1;
  cut.blocks = static_cast<int>(std::min<int64_t>(pieces * share(cut.m_blocks, cut.run), multiprocessors));

  const auto teams = static_cast<int>(std::min<int64_t>(multiprocessors / pieces, cut.m_blocks));
  if (teams > 1 && staying * static_cast<double>(share(cut.m_blocks, teams)) <= least) {
    cut.step = teams;
    cut.run = 1;
    cut.blocks = static_cast<int>(teams * pieces);
  }
}

// The tiles of one block, in order.
class Walk {
 public:
  // `m_blocks`: how many of the cut's there are.
  MHMATMUL_HOST_DEVICE Walk(const Cut& cut, int m_blocks, int block) : cut_(cut), m_blocks_(m_blocks), group_(block) {
    locate();
  }

  MHMATMUL_HOST_DEVICE bool at_end() const { return left_ < 0; }
  MHMATMUL_HOST_DEVICE bool is_first_of_group() const { return is_first_; }
  // Tiles of the group after this one.
  MHMATMUL_HOST_DEVICE int left_in_group() const { return left_; }
  MHMATMUL_HOST_DEVICE void next() {
    is_first_ = false;
    m_block += cut_.step;
    if (--left_ >= 0) return;
    group_ += cut_.blocks;
    locate();
  }

 private:
  MHMATMUL_HOST_DEVICE void locate() {
    const int64_t pieces = cut_.pieces(), first = group_ / pieces * cut_.run;
    const bool in_turn = cut_.step > 1;
    if (first >= (in_turn && cut_.step < m_blocks_ ? cut_.step : m_blocks_)) {
      left_ = -1;
      return;
    }
    const auto piece = static_cast<int>(group_ % pieces);
    is_first_ = true;
    head = piece / cut_.n_blocks;
    n_block = piece % cut_.n_blocks;
    m_block = static_cast<int>(first);
    const int rest = m_blocks_ - m_block;
    left_ = ((in_turn || rest < cut_.run ? rest : cut_.run) - 1) / cut_.step;
  }

  const Cut& cut_;
  int m_blocks_;
  int64_t group_;
  int left_ = -1;
  bool is_first_ = false;

 public:
  int n_block = 0, head = 0, m_block = 0;
};

// How tiles are dealt where no piece of B is kept: a team of blocks has as many side by side, one each, and teams take
// such groups in turn.
struct Deal {
  int m_blocks, n_blocks, heads;
  int team;    // divides n_blocks
  int blocks;  // a multiple of it
  int groups;
  bool heads_before_rows;  // the next group is of the same rows in the next head, else of the next rows

  int teams() const { return blocks / team; }
  // Those of the block that has most of them.
  int most_tiles() const { return (groups + teams() - 1) / teams(); }
};

// False: there are more groups than blocks can count.
inline bool deal_out(Deal& deal, int multiprocessors) {
  deal.team = deal.n_blocks % 2 == 0 && multiprocessors > 1 ? 2 : 1;
  const int64_t across = deal.n_blocks / deal.team, groups = deal.heads * across * deal.m_blocks;
  const int teams = static_cast<int>(std::min<int64_t>(groups, multiprocessors / deal.team));
  deal.groups = static_cast<int>(groups);
  deal.blocks = teams * deal.team;
  return groups <= INT32_MAX - teams;
}

// The tiles of one block, in order.
class DealtWalk {
 public:
  MHMATMUL_HOST_DEVICE DealtWalk(const Deal& deal, int block)
      : deal_(deal), member_(block % deal.team), group_(block / deal.team) {
    locate();
  }

  MHMATMUL_HOST_DEVICE bool at_end() const { return group_ >= deal_.groups; }
  MHMATMUL_HOST_DEVICE void next() {
    group_ += deal_.blocks / deal_.team;
    locate();
  }

 private:
  MHMATMUL_HOST_DEVICE void locate() {
    const int across = deal_.n_blocks / deal_.team, inner = deal_.heads_before_rows ? deal_.heads : deal_.m_blocks;
    const int rest = group_ / across;
    n_block = group_ % across * deal_.team + member_;
    (deal_.heads_before_rows ? head : m_block) = rest % inner;
    (deal_.heads_before_rows ? m_block : head) = rest / inner;
  }

  const Deal& deal_;
  int member_, group_;

 public:
  int n_block = 0, head = 0, m_block = 0;
};

}  // namespace mhmatmul::cuda::sm90
