#include "gemm.h"

#include <stdexcept>
#include <string>

namespace mhmatmul::cuda {
namespace {

void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string(call) + ": " + cublasGetStatusString(status));
}

// Forbids sums in half precision while it lives, whatever mode the handle came in.
class FullPrecisionSums {
 public:
  explicit FullPrecisionSums(cublasHandle_t handle) : handle_(handle) {
    check(cublasGetMathMode(handle_, &mode_), "cublasGetMathMode");
    check(
        cublasSetMathMode(handle_, static_cast<cublasMath_t>(mode_ | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)),
        "cublasSetMathMode");
  }
  ~FullPrecisionSums() { cublasSetMathMode(handle_, mode_); }
  FullPrecisionSums(const FullPrecisionSums&) = delete;
  FullPrecisionSums& operator=(const FullPrecisionSums&) = delete;

 private:
  cublasHandle_t handle_;
  cublasMath_t mode_ = CUBLAS_DEFAULT_MATH;
};

}  // namespace

void run(cublasHandle_t handle, const BatchedGemm& gemm) {
  const FullPrecisionSums full_precision(handle);
  const bool is_double = gemm.operand_type == CUDA_R_64F;
  const double one_double = 1, beta_double = gemm.accumulates;
  const float one_float = 1, beta_float = gemm.accumulates;
  const void* const one = is_double ? static_cast<const void*>(&one_double) : &one_float;
  const void* const beta = is_double ? static_cast<const void*>(&beta_double) : &beta_float;
  const auto operation = [](const Operand& operand) { return operand.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };

  // cuBLAS is column-major: there C^T = B^T A^T, and a row-major matrix is read as its transpose without
  // moving it.
  check(cublasGemmStridedBatchedEx_64(handle, operation(gemm.b), operation(gemm.a), gemm.n, gemm.m, gemm.k, one,
                                      gemm.b.data, gemm.operand_type, gemm.b.ld, gemm.b.batch_stride, gemm.a.data,
                                      gemm.operand_type, gemm.a.ld, gemm.a.batch_stride, beta, gemm.c, gemm.c_type,
                                      gemm.ldc, gemm.c_batch_stride, gemm.batch,
                                      is_double ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "cublasGemmStridedBatchedEx");
}

}  // namespace mhmatmul::cuda
