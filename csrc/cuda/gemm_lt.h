// Batched GEMM over cuBLASLt, which offers several algorithms for each problem.
#pragma once

#include "gemm.h"

#include <cublasLt.h>

namespace mhmatmul::cuda {

struct LtOptions {
  cudaStream_t stream;
  bool allows_tf32;  // for float32
  bool times;        // take the fastest of the first algorithms offered, not the first
};

// The product, plus bias_i [n] of each i where `bias` is not null, on the current device. Half types are summed in
// float32 throughout and rounded once. An algorithm is found once for each problem, in timing once for each power of
// two of its rows, and remembered; while a graph is captured nothing is timed. Returns false, having done nothing,
// where cuBLASLt offers none. Throws std::runtime_error with cuBLAS's own words.
bool run_lt(cublasLtHandle_t handle, const BatchedGemm& gemm, const void* bias, int64_t bias_batch_stride,
            const LtOptions& options);

}  // namespace mhmatmul::cuda
