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

// Each row's rule for score >= top_p and among the k highest, and min(candidates, count_limit) into
// counts[row].
template <class Format>
void find_rules(const Scores<Format>& scores, const Threshold<Format>& top_p, int64_t k, int64_t count_limit,
                SelectionRule<Format>* rules, int64_t* counts, cudaStream_t stream);

// Each row's kept positions (row * s + j), ascending: from starts[row] on; or, without `starts`, from row *
// capacity on and padded with -1 to `capacity` places.
template <class Format>
void write_kept(const Scores<Format>& scores, const SelectionRule<Format>* rules, const int64_t* starts,
                int64_t capacity, int64_t* indices, cudaStream_t stream);

}  // namespace mhmatmul::cuda
