// Moving rows by index. -1 names no row: it reads as zeros and adds nothing. Indices have been checked.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mhmatmul::cpu {

// to[r, :] = from[indices[r], :] for r in [begin, end); rows of `width` elements, `from_stride` apart in
// `from`.
template <class T>
void gather_rows(const T* from, int64_t from_stride, const int64_t* indices, int64_t begin, int64_t end, int64_t width,
                 T* to) {
  for (int64_t r = begin; r < end; ++r) {
    T* const row = to + r * width;
    if (indices[r] < 0) {
      std::fill(row, row + width, T(0));
    } else {
      std::copy_n(from + indices[r] * from_stride, width, row);
    }
  }
}

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

}  // namespace mhmatmul::cpu
