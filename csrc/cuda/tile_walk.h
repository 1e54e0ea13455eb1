// Which block of the Hopper kernel works on which tiles, and in which order. Neither Tensor nor CUDA: a test walks it
// on the host.
#pragma once

#include "../host_device.h"

#include <algorithm>
#include <cstdint>

namespace mhmatmul::cuda::sm90 {

// How the work is cut into tiles and shared out, decided on the host.
struct Cut {
  int m_blocks, n_blocks, k_blocks, heads;
  int lanes, teams;  // blocks: lane l of a team takes the columns' blocks l, l + lanes, ...; teams share heads and rows
  int a_stages, b_stages;
  bool b_stays;
};

// As many blocks as there are multiprocessors, or as there is work for.
inline void share_out(Cut& cut, int multiprocessors) {
  cut.lanes = std::min(cut.n_blocks, multiprocessors);
  cut.teams =
      static_cast<int>(std::min<int64_t>(std::max(1, multiprocessors / cut.lanes), int64_t{cut.heads} * cut.m_blocks));
}

// The tiles of one block, in order. A group is what shares a piece of B: one head's tiles for one block of columns.
//
// Heads are dealt to the teams one by one, and each team goes down all rows of its head: teams side by side are in
// neighbouring heads at the same rows, so what is read and written at one time lies together in memory. The heads left
// over are cut into as many runs of tiles as there are teams.
class Walk {
 public:
  // `m_blocks`: how many of the cut's there are.
  MHMATMUL_HOST_DEVICE Walk(const Cut& cut, int m_blocks, int block)
      : cut_(cut),
        m_blocks_(m_blocks),
        team_(block / cut.lanes),
        whole_(int64_t{cut.heads / cut.teams} * m_blocks),
        n_block(block % cut.lanes) {
    const int64_t rest = int64_t{cut.heads % cut.teams} * m_blocks;
    run_begin_ = rest * team_ / cut.teams;
    end_ = whole_ + rest * (team_ + 1) / cut.teams - run_begin_;
    if (end_ == 0) {
      n_block = cut.n_blocks;
    } else {
      locate();
    }
  }

  MHMATMUL_HOST_DEVICE bool at_end() const { return n_block >= cut_.n_blocks; }
  MHMATMUL_HOST_DEVICE bool is_first_of_group() const { return m_block == 0 || at_ == whole_; }
  // Tiles of the group after this one.
  MHMATMUL_HOST_DEVICE int64_t left_in_group() const {
    const int64_t of_head = m_blocks_ - 1 - m_block, of_all = end_ - 1 - at_;
    return of_head < of_all ? of_head : of_all;
  }
  MHMATMUL_HOST_DEVICE void next() {
    ++at_;
    ++m_block;
    if (at_ == end_) {
      at_ = 0;
      n_block += cut_.lanes;
    } else if (m_block < m_blocks_) {
      return;
    }
    locate();
  }

 private:
  MHMATMUL_HOST_DEVICE void locate() {
    if (at_ < whole_) {
      head = team_ + static_cast<int>(at_ / m_blocks_) * cut_.teams;
      m_block = static_cast<int>(at_ % m_blocks_);
    } else {
      const int64_t in_rest = run_begin_ + at_ - whole_;
      head = cut_.heads - cut_.heads % cut_.teams + static_cast<int>(in_rest / m_blocks_);
      m_block = static_cast<int>(in_rest % m_blocks_);
    }
  }

  const Cut& cut_;
  int m_blocks_, team_;
  int64_t whole_;            // tiles of the heads that the team has whole
  int64_t run_begin_, end_;  // first tile of its run among the heads left over; tiles of whole heads and run
  int64_t at_ = 0;

 public:
  int n_block, head = 0, m_block = 0;
};

}  // namespace mhmatmul::cuda::sm90
