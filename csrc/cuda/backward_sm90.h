// The gradients of the head-wise product on Hopper, both in one pass over grad_output or the weight's alone. Without
// Tensor, like gemm_sm90.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mhmatmul::cuda {

// Half types, sums in float32, rounded once. Strides in elements, between rows and between heads.
struct HeadBackward {
  int64_t m, hd, e, heads;
  const void* grad_output;  // [m, heads, e], e side by side
  int64_t grad_output_stride, grad_output_head_stride;
  // [m, heads, hd], hd side by side; given indices, [named_rows, heads, hd], of which row indices[r] is meant by row r.
  const void* input;
  int64_t input_stride, input_head_stride;
  const void* weight;  // [heads, hd, e], e side by side; null without grad_input
  int64_t weight_stride, weight_head_stride;
  // [m] or null; those outside [0, named_rows) name rows that count for nothing, the others are distinct if grad_input
  // is wanted.
  const int64_t* indices;
  int64_t named_rows;  // m without indices
  void* grad_input;    // as input, contiguous; rows that no index names are left as they are. Null: it is not wanted
  void* grad_weight;   // [heads, hd, e], contiguous
  bool is_bfloat16;
};

// Whether run_backward_sm90 can take it on the current device (alignment, sizes) and is expected to be faster than
// products of their own.
bool takes_backward_sm90(const HeadBackward& backward);

// How many float32 it needs to put sums of rows down; they need not be kept.
int64_t partial_of_backward_sm90(const HeadBackward& backward);

// On the current device. Throws std::runtime_error with CUDA's own words.
void run_backward_sm90(const HeadBackward& backward, float* partial, cudaStream_t stream);

}  // namespace mhmatmul::cuda
