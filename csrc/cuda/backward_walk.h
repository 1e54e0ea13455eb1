// Which cluster of the Hopper kernel for both gradients works on which rows of which head. Neither Tensor nor CUDA: a
// test walks it on the host.
#pragma once

#include "../host_device.h"

#include <algorithm>
#include <cstdint>

namespace mhmatmul::cuda::sm90 {

struct BackwardCut {
  int heads, hd_groups;   // clusters that a head needs for all of its inputs
  int row_tiles, splits;  // tiles of rows, and the parts that they are dealt to in turn
  int teams;              // clusters
  MHMATMUL_HOST_DEVICE int segments() const { return heads * hd_groups * splits; }
};

// Rows of one head: tiles begin, begin + step, ... of all.
struct Segment {
  int head, hd_group, split, begin, step;

  // Segments side by side are of neighbouring heads and the same rows, and splits of one head go down its rows side by
  // side: what is read at one time lies together.
  MHMATMUL_HOST_DEVICE Segment(const BackwardCut& cut, int segment)
      : head(segment / cut.hd_groups % cut.heads),
        hd_group(segment % cut.hd_groups),
        split(segment / cut.hd_groups / cut.heads),
        begin(split),
        step(cut.splits) {}
};

// As many splits as cost least in rounds of tiles: one that nobody shares costs nothing more, others are written and
// added up.
inline void choose_splits(BackwardCut& cut, double tiles_per_segment, double tiles_per_partial) {
  constexpr int kMostSplits = 64;
  double best = 0;
  for (int splits = 1; splits <= std::min(kMostSplits, cut.row_tiles); ++splits) {
    const int64_t segments = int64_t{cut.heads} * cut.hd_groups * splits;
    const auto rounds = static_cast<double>((segments + cut.teams - 1) / cut.teams);
    const double tiles = static_cast<double>((cut.row_tiles + splits - 1) / splits);
    const double cost = rounds * (tiles + tiles_per_segment + (splits > 1 ? tiles_per_partial : 0));
    if (splits == 1 || cost < best) {
      best = cost;
      cut.splits = splits;
    }
  }
}

}  // namespace mhmatmul::cuda::sm90
