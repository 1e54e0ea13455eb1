#include "../checks.h"
#include "head_gemm.h"
#include "rows.h"

#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

namespace mhmatmul {
namespace {

// [m, nh, x] as rows of nh * x elements, a row's elements together.
Tensor as_rows(const Tensor& tensor) {
  const Tensor rows = tensor.reshape({tensor.size(0), tensor.size(1) * tensor.size(2)});
  return rows.size(1) <= 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

// The rows that indices name, [t, nh, hd].
Tensor gather(const Tensor& input, const Tensor& indices) {
  const Tensor from = as_rows(input);
  Tensor rows = at::empty({indices.size(0), input.size(1), input.size(2)}, input.options());
  cuda::gather_rows(from.const_data_ptr(), from.stride(0), indices.const_data_ptr<int64_t>(), indices.size(0),
                    input.size(0), from.size(1), from.element_size(), rows.mutable_data_ptr(),
                    at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return rows;
}

// A copy of rows [t, nh, x] with zeros where the index names none of the m rows.
Tensor masked(const Tensor& rows, const Tensor& indices, int64_t m) {
  const Tensor from = as_rows(rows);
  Tensor to = at::empty(rows.sizes(), rows.options());
  cuda::mask_rows(from.const_data_ptr(), from.stride(0), indices.const_data_ptr<int64_t>(), indices.size(0), m,
                  from.size(1), from.element_size(), to.mutable_data_ptr(), from.size(1),
                  at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return to;
}

cuda::Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return cuda::Dtype::kFloat64;
    case at::kFloat:
      return cuda::Dtype::kFloat32;
    case at::kHalf:
      return cuda::Dtype::kFloat16;
    case at::kBFloat16:
      return cuda::Dtype::kBFloat16;
    default:
      TORCH_INTERNAL_ASSERT(false, "gather_head_matmul: an operand of dtype ", tensor.scalar_type(),
                            " passed the checks");
  }
}

Tensor dgrad(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, int64_t m) {
  const int64_t nh = weight.size(0), hd = weight.size(1);
  const auto sum_dtype = at::toOpMathType(weight.scalar_type());
  Tensor rows = at::empty({grad_output.size(0), nh, hd}, weight.options().dtype(sum_dtype));
  cuda::forward(grad_output, weight.transpose(1, 2), std::nullopt, rows);
  const auto [sorted, order] = at::sort(indices, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  Tensor grad_input = at::empty({m, nh, hd}, weight.options());
  cuda::sum_rows(rows.const_data_ptr(), sorted.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>(),
                 indices.size(0), m, nh * hd, dtype_of(weight), grad_input.mutable_data_ptr(),
                 at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_input;
}

// Whatever a padding row's gradient holds, it counts for nothing; so both operands are masked.
Tensor wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
  return cuda::wgrad(masked(grad_output, indices, input.size(0)), gather(input, indices));
}

Tensor gather_head_matmul_cuda(const Tensor& input, const Tensor& weight, const Tensor& indices,
                               const OptionalTensor& bias) {
  check_head_matmul("gather_head_matmul", input, weight, bias, indices);
  const c10::cuda::CUDAGuard guard(input.device());
  const Tensor contiguous_indices = indices.contiguous();
  Tensor output = at::empty({indices.size(0), weight.size(0), weight.size(2)}, input.options());
  cuda::forward(gather(input, contiguous_indices), weight, bias, output);
  cuda::zero_rows(contiguous_indices.const_data_ptr<int64_t>(), indices.size(0), input.size(0),
                  output.size(1) * output.size(2), output.element_size(), output.mutable_data_ptr(),
                  at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

Tensor gather_head_matmul_dgrad_cuda(const Tensor& grad_output, const Tensor& weight, const Tensor& indices,
                                     int64_t m) {
  check_head_matmul_backward("_gather_head_matmul_dgrad", grad_output, std::nullopt, weight, indices, SymInt(m));
  const c10::cuda::CUDAGuard guard(grad_output.device());
  return dgrad(grad_output, weight, indices, m);
}

Tensor gather_head_matmul_wgrad_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
  check_head_matmul_backward("_gather_head_matmul_wgrad", grad_output, input, std::nullopt, indices);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  return wgrad(grad_output, input, indices.contiguous());
}

std::tuple<Tensor, Tensor> gather_head_matmul_backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                            const Tensor& weight, const Tensor& indices) {
  check_head_matmul_backward("_gather_head_matmul_backward", grad_output, input, weight, indices);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  return {dgrad(grad_output, weight, indices, input.size(0)), wgrad(grad_output, input, indices.contiguous())};
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CUDA, m) {
  m.impl("gather_head_matmul", gather_head_matmul_cuda);
  m.impl("_gather_head_matmul_dgrad", gather_head_matmul_dgrad_cuda);
  m.impl("_gather_head_matmul_wgrad", gather_head_matmul_wgrad_cuda);
  m.impl("_gather_head_matmul_backward", gather_head_matmul_backward_cuda);
}

}  // namespace mhmatmul
