// Launchers of the selection kernels. No Tensor: pointers and strides in elements, on the stream given.
#pragma once

#include "../selection_rule.h"

#include <cuda_runtime.h>

namespace mhmatmul::cuda {

template <class Format>
struct Scores {
  const typename Format::Bits* data;
  int64_t b, s;  // rows, scores per row; s < 2^32
  int64_t row_stride, stride;
};

// The threshold's bits: `*pointer` on the device when that is given, else `value`.
template <class Format>
struct Threshold {
  typename Format::Bits value;
  const typename Format::Bits* pointer;
};

// Where select_packed writes: positions of all rows without gaps, each row's first place, and how many there are.
struct Packed {
  int64_t* indices;     // as many places as rows can keep
  int32_t* cu_seqlens;  // [b + 1]
  int64_t* total;       // one word, which may be the host's: written as soon as it is known
  // What rows tell one another, zeros before a selection and after it: their counts [b], how many of them have started
  // (null: all work at once), how many have added up the counts before theirs.
  unsigned long long *counts, *started, *added_up;
};

// Where select_padded writes: a row's positions from row * capacity on, padded with -1, and min(candidates,
// count_limit) for each row.
struct Padded {
  int64_t* indices;
  int64_t* counts;
  int64_t capacity, count_limit;
};

// Each row's positions (row * s + j) with score >= top_p and among the k highest, ascending.
template <class Format>
void select_packed(const Scores<Format>& scores, const Threshold<Format>& top_p, int64_t k, const Packed& packed,
                   cudaStream_t stream);
template <class Format>
void select_padded(const Scores<Format>& scores, const Threshold<Format>& top_p, int64_t k, const Padded& padded,
                   cudaStream_t stream);

}  // namespace mhmatmul::cuda
