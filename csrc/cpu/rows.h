// Rows by index, and adding them up. -1 names no row: it adds nothing. Indices have been checked.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace mhmatmul::cpu {

// to[indices[r], c] += from[r, c] for columns c in [begin, end), rows in ascending order: the sum of repeated
// rows has one order, however the columns are shared out.
template <class T>
void add_rows(const T* from, const int64_t* indices, int64_t t, int64_t begin, int64_t end, int64_t width, T* to) {
  for (int64_t r = 0; r < t; ++r) {
    if (indices[r] < 0) continue;
    const T* const source = from + r * width;
    T* const target = to + indices[r] * width;
    for (int64_t c = begin; c < end; ++c) target[c] += source[c];
  }
}

// Where each of m rows finds itself among t indices, -1 where nowhere; nullopt when one of them is there twice.
inline std::optional<std::vector<int64_t>> inverse(const int64_t* indices, int64_t t, int64_t m) {
  std::vector<int64_t> places(m, -1);
  for (int64_t r = 0; r < t; ++r) {
    if (indices[r] < 0) continue;
    if (places[indices[r]] >= 0) return std::nullopt;
    places[indices[r]] = r;
  }
  return places;
}

}  // namespace mhmatmul::cpu
