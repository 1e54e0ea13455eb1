#include "head_gemm.h"

#include "gemm.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDADataType.h>
#include <ATen/ops/empty.h>

namespace mhmatmul::cuda {
namespace {

// The matrices tensor[.., batch, ..] of rows along `row` and columns along `column`, as they lie in memory;
// `tensor` is replaced by a contiguous copy where cuBLAS cannot read it in place.
Operand operand(Tensor& tensor, int64_t batch, int64_t row, int64_t column) {
  const auto readable = [&](int64_t outer, int64_t inner) {
    const bool inner_is_dense = tensor.stride(inner) == 1 || tensor.size(inner) == 1;
    const bool outer_fits = tensor.stride(outer) >= tensor.size(inner) || tensor.size(outer) == 1;
    return inner_is_dense && outer_fits;
  };
  const auto read = [&](int64_t outer, int64_t inner, bool transposed) {
    const int64_t ld = std::max<int64_t>({1, tensor.stride(outer), tensor.size(inner)});
    return Operand{tensor.const_data_ptr(), ld, tensor.stride(batch), transposed};
  };
  if (readable(row, column)) return read(row, column, false);
  if (readable(column, row)) return read(column, row, true);
  tensor = tensor.contiguous();
  return read(row, column, false);
}

}  // namespace

void forward(const Tensor& rows, const Tensor& weight, const OptionalTensor& bias, const Tensor& output) {
  if (output.numel() == 0) return;
  if (bias) output.copy_(bias->expand_as(output));
  if (weight.size(1) == 0) {
    if (!bias) output.zero_();
    return;
  }
  Tensor a = rows, b = weight;
  BatchedGemm gemm{};
  gemm.m = rows.size(0);
  gemm.n = weight.size(2);
  gemm.k = weight.size(1);
  gemm.batch = weight.size(0);
  gemm.a = operand(a, /*batch=*/1, /*row=*/0, /*column=*/2);
  gemm.b = operand(b, /*batch=*/0, /*row=*/1, /*column=*/2);
  gemm.c = output.mutable_data_ptr();
  gemm.ldc = std::max(output.stride(0), gemm.n);
  gemm.c_batch_stride = output.stride(1);
  gemm.operand_type = at::cuda::ScalarTypeToCudaDataType(rows.scalar_type());
  gemm.c_type = at::cuda::ScalarTypeToCudaDataType(output.scalar_type());
  gemm.accumulates = bias.has_value();
  run(at::cuda::getCurrentCUDABlasHandle(), gemm);
}

Tensor wgrad(const Tensor& grad_output, const Tensor& rows) {
  Tensor output = at::empty({rows.size(1), rows.size(2), grad_output.size(2)}, rows.options());
  if (output.numel() == 0) return output;
  if (rows.size(0) == 0) return output.zero_();
  Tensor a = rows, b = grad_output;
  BatchedGemm gemm{};
  gemm.m = rows.size(2);
  gemm.n = grad_output.size(2);
  gemm.k = rows.size(0);
  gemm.batch = rows.size(1);
  gemm.a = operand(a, /*batch=*/1, /*row=*/2, /*column=*/0);
  gemm.b = operand(b, /*batch=*/1, /*row=*/0, /*column=*/2);
  gemm.c = output.mutable_data_ptr();
  gemm.ldc = gemm.n;
  gemm.c_batch_stride = gemm.m * gemm.n;
  gemm.operand_type = gemm.c_type = at::cuda::ScalarTypeToCudaDataType(rows.scalar_type());
  run(at::cuda::getCurrentCUDABlasHandle(), gemm);
  return output;
}

}  // namespace mhmatmul::cuda
