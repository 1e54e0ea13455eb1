// The head-wise product on Hopper's own units: the library's kernel for heads so short that moving the output is the
// work. Without Tensor, like gemm.h, of which it is the special case.
#pragma once

#include "gemm.h"

#include <cuda_runtime.h>

namespace mhmatmul::cuda {

// C_i = A_i B_i + bias_i for i in [0, batch), half types (float32 for tf32_sm90.h), sums in float32 in one order for
// all rows, rounded once.
struct HeadGemm {
  int64_t m, n, k, batch;
  const void* a;                     // [a_rows, k] of each i, k side by side
  int64_t a_stride, a_batch_stride;  // between rows, between matrices
  const int64_t* indices;            // [m] or null: A's row r is row indices[r], zeros outside [0, a_rows)
  int64_t a_rows;
  const int32_t* rows_given;  // null, or on the device, with indices: only so many of the m rows are there
  Operand b;
  const void* bias;  // [n] of each i, side by side, or null; a row outside [0, a_rows) has none
  int64_t bias_batch_stride;
  void* c;  // [m, n] of each i, n side by side
  int64_t c_stride, c_batch_stride;
  bool is_bfloat16;
  int tile_m, tile_n, tile_k;  // chosen by who takes it; tile_k for tf32_sm90.h alone
};

// Whether run_sm90 can take it on the current device (sizes, layouts) and is expected to be the faster one.
bool takes_sm90(HeadGemm& gemm);

// On the current device. Throws std::runtime_error with CUDA's own words.
void run_sm90(const HeadGemm& gemm, cudaStream_t stream);

}  // namespace mhmatmul::cuda
