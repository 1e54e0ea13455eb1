// Batched GEMM over cuBLAS, row-major and without Tensor: C_i = A_i B_i, or C_i += A_i B_i, for i in [0,
// batch).
#pragma once

#include <cublas_v2.h>

#include <cstdint>

namespace mhmatmul::cuda {

// One operand: rows `ld` elements apart, matrices `batch_stride` apart; transposed: what lies in memory is
// the operand's transpose.
struct Operand {
  const void* data;
  int64_t ld, batch_stride;
  bool transposed;
};

struct BatchedGemm {
  int64_t m, n, k, batch;  // A [m, k], B [k, n], C [m, n]
  Operand a, b;
  void* c;
  int64_t ldc, c_batch_stride;
  cudaDataType_t operand_type, c_type;  // c_type: the operands' or float32
  bool accumulates;                     // add to C instead of overwriting it
};

// On the handle's stream. Half types are summed in float32 throughout and rounded at the store; float32
// follows the handle's math mode. m, n and batch are positive. Throws std::runtime_error with cuBLAS's own
// words.
void run(cublasHandle_t handle, const BatchedGemm& gemm);

}  // namespace mhmatmul::cuda
