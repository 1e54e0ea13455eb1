// Selection in one row: find the rule, then write positions by it. No sort; at most one nth_element over the
// survivors.
#pragma once

#include "../selection_rule.h"

#include <algorithm>
#include <functional>
#include <vector>

namespace mhmatmul::cpu {

// The rule for a row of s scores, `stride` elements apart: score >= top_p and among the k highest, k >= 0.
// `survivors` is scratch memory.
template <class Format>
SelectionRule<Format> find_rule(const typename Format::Bits* row, int64_t stride, int64_t s,
                                typename Format::Bits top_p, int64_t k, std::vector<typename Format::Bits>& survivors) {
  auto rule = SelectionRule<Format>::from_threshold(top_p);
  for (int64_t j = 0; j < s; ++j) rule.candidates += rule.admits(score_key<Format>(row[j * stride]));
  rule.count = std::min(rule.candidates, k);
  if (rule.candidates <= k) return rule;
  if (k == 0) return {SelectionRule<Format>::nothing().key, 0, 0, rule.candidates};

  survivors.clear();
  survivors.reserve(rule.candidates);
  for (int64_t j = 0; j < s; ++j) {
    const auto key = score_key<Format>(row[j * stride]);
    if (rule.admits(key)) survivors.push_back(key);
  }
  const auto kth = survivors.begin() + (k - 1);
  std::nth_element(survivors.begin(), kth, survivors.end(), std::greater<>());
  const int64_t above = std::count_if(survivors.begin(), kth, [&](auto key) { return key > *kth; });
  return {*kth, k - above, k, rule.candidates};
}

// Writes `first + j` for every kept position j of the row, ascending.
template <class Format>
void write_kept(const typename Format::Bits* row, int64_t stride, int64_t s, SelectionRule<Format> rule, int64_t first,
                int64_t* indices) {
  for (int64_t j = 0; j < s; ++j) {
    const auto key = score_key<Format>(row[j * stride]);
    if (!rule.admits(key)) continue;
    rule.ties -= key == rule.key;
    *indices++ = first + j;
  }
}

}  // namespace mhmatmul::cpu
