// Rows put back by index, and the gradients of that. Sums are taken in T's wider type `Sum` and rounded once; every sum
// has one order, whatever the number of threads. -1 names no row; indices have been checked. Rows lie `d` apart.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

namespace mhmatmul::cpu {

// The places r of each row j among indices, ascending: order[starts[j]] up to order[starts[j + 1]].
struct PlacesByRow {
  std::vector<int64_t> starts, order;

  PlacesByRow(const int64_t* indices, int64_t t, int64_t m) : starts(m + 1, 0) {
    for (int64_t r = 0; r < t; ++r)
      if (indices[r] >= 0) ++starts[indices[r] + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    order.resize(starts[m]);
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t r = 0; r < t; ++r)
      if (indices[r] >= 0) order[next[indices[r]]++] = r;
  }
};

// to[j] = base[j] + the sum of gates[r] * updates[r] over the places r of j, for rows j in [begin, end); no gates: 1.
template <class T, class Sum>
void combine_rows(const T* base, const T* updates, const T* gates, const PlacesByRow& places, int64_t begin,
                  int64_t end, int64_t d, T* to) {
  std::vector<Sum> sums(d);
  for (int64_t j = begin; j < end; ++j) {
    const T* const source = base + j * d;
    T* const target = to + j * d;
    if (places.starts[j] == places.starts[j + 1]) {
      std::copy_n(source, d, target);
      continue;
    }
    std::copy_n(source, d, sums.begin());
    for (int64_t p = places.starts[j]; p < places.starts[j + 1]; ++p) {
      const int64_t r = places.order[p];
      const T* const update = updates + r * d;
      const Sum gate = gates ? static_cast<Sum>(gates[r]) : Sum(1);
      for (int64_t c = 0; c < d; ++c) sums[c] += gate * static_cast<Sum>(update[c]);
    }
    for (int64_t c = 0; c < d; ++c) target[c] = static_cast<T>(sums[c]);
  }
}

// to[r] = gates[r] * from[indices[r]], zeros for -1, for places r in [begin, end); no gates: 1.
template <class T, class Sum>
void scale_rows(const T* from, const int64_t* indices, const T* gates, int64_t begin, int64_t end, int64_t d, T* to) {
  for (int64_t r = begin; r < end; ++r) {
    T* const target = to + r * d;
    if (indices[r] < 0) {
      std::fill_n(target, d, T(0));
      continue;
    }
    const T* const source = from + indices[r] * d;
    const Sum gate = gates ? static_cast<Sum>(gates[r]) : Sum(1);
    for (int64_t c = 0; c < d; ++c) target[c] = static_cast<T>(gate * static_cast<Sum>(source[c]));
  }
}

// to[r] = from[indices[r]] . updates[r], zero for -1, for places r in [begin, end).
template <class T, class Sum>
void dot_rows(const T* from, const int64_t* indices, const T* updates, int64_t begin, int64_t end, int64_t d, T* to) {
  constexpr int64_t kLanes = 16;  // partial sums side by side: they vectorise, and err less than one long sum
  for (int64_t r = begin; r < end; ++r) {
    std::array<Sum, kLanes> lanes{};
    if (indices[r] >= 0) {
      const T *const a = from + indices[r] * d, *const b = updates + r * d;
      int64_t c = 0;
      for (; c + kLanes <= d; c += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          lanes[lane] += static_cast<Sum>(a[c + lane]) * static_cast<Sum>(b[c + lane]);
      for (; c < d; ++c) lanes[c % kLanes] += static_cast<Sum>(a[c]) * static_cast<Sum>(b[c]);
    }
    to[r] = static_cast<T>(std::accumulate(lanes.begin(), lanes.end(), Sum(0)));
  }
}

}  // namespace mhmatmul::cpu
