// Selection in one row: the scores are read once. No sort; at most one nth_element over the survivors.
#pragma once

#include "../selection_rule.h"

#include <algorithm>
#include <functional>
#include <vector>

namespace mhmatmul::cpu {

struct RowSelection {
  std::vector<int64_t> kept;  // positions, ascending, plus `first`
  int64_t candidates = 0;     // how many scores reach the threshold
};

// Memory for select_row, used again from row to row.
template <class Format>
struct SelectionScratch {
  std::vector<int64_t> positions;
  std::vector<typename Format::Bits> keys, ranked;
};

// Of a row of s scores, `stride` elements apart: those with score >= top_p that are among the k highest, k >= 0.
template <class Format>
RowSelection select_row(const typename Format::Bits* row, int64_t stride, int64_t s, typename Format::Bits top_p,
                        int64_t k, int64_t first, SelectionScratch<Format>& scratch) {
  auto rule = SelectionRule<Format>::from_threshold(top_p);
  auto& [positions, keys, ranked] = scratch;
  positions.resize(s);
  keys.resize(s);
  int64_t count = 0;
  for (int64_t j = 0; j < s; ++j) {  // no branch: which scores survive is anybody's guess
    const auto key = score_key<Format>(row[j * stride]);
    positions[count] = first + j;
    keys[count] = key;
    count += rule.admits(key);
  }
  if (count <= k) return {{positions.begin(), positions.begin() + count}, count};
  if (k == 0) return {{}, count};

  ranked.assign(keys.begin(), keys.begin() + count);
  const auto kth = ranked.begin() + (k - 1);
  std::nth_element(ranked.begin(), kth, ranked.end(), std::greater<>());
  rule.key = *kth;
  rule.ties = k - std::count_if(ranked.begin(), kth, [&](auto key) { return key > *kth; });
  RowSelection selection{std::vector<int64_t>(k), count};
  auto next = selection.kept.begin();
  for (int64_t i = 0; i < count; ++i) {
    if (!rule.admits(keys[i])) continue;
    rule.ties -= keys[i] == rule.key;
    *next++ = positions[i];
  }
  return selection;
}

}  // namespace mhmatmul::cpu
