// The head-wise product of float32 on Hopper's own units, operands rounded to TF32. Without Tensor, like gemm_sm90.h.
#pragma once

#include "gemm_sm90.h"

namespace mhmatmul::cuda {

// Whether run_tf32_sm90 can take it on the current device (sizes, layouts, no indices) and is expected to be the faster
// one.
bool takes_tf32_sm90(HeadGemm& gemm);

// On the current device. Throws std::runtime_error with CUDA's own words.
void run_tf32_sm90(const HeadGemm& gemm, cudaStream_t stream);

}  // namespace mhmatmul::cuda
