#include "../checks.h"
#include "dtype.h"
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

// Where row j of m is named: the place of j among distinct indices, -1 where it is not.
Tensor inverse(const Tensor& indices, int64_t m) {
  Tensor places = at::empty({m}, indices.options());
  cuda::invert(indices.const_data_ptr<int64_t>(), indices.size(0), m, places.mutable_data_ptr<int64_t>(),
               at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return places;
}

// Distinct indices: a row of grad_input is one row's product, or zeros, and is written as such. On Hopper that is the
// forward's gathering product with the inverse of the indices; elsewhere the products are moved to their places.
Tensor distinct_dgrad(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, int64_t m) {
  const int64_t nh = weight.size(0), hd = weight.size(1);
  const Tensor transposed = weight.transpose(1, 2), places = inverse(indices, m);
  Tensor grad_input = at::empty({m, nh, hd}, weight.options());
  if (cuda::gather_forward_in_flight(grad_output, transposed, places, std::nullopt, grad_input)) return grad_input;
  Tensor rows = at::empty({grad_output.size(0), nh, hd}, weight.options());
  cuda::forward(grad_output, transposed, std::nullopt, rows);
  cuda::gather(rows, places, grad_input);
  return grad_input;
}

Tensor dgrad(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, int64_t m, bool distinct) {
  if (distinct) return distinct_dgrad(grad_output, weight, indices, m);
  const int64_t nh = weight.size(0), hd = weight.size(1);
  const auto sum_dtype = at::toOpMathType(weight.scalar_type());
  Tensor rows = at::empty({grad_output.size(0), nh, hd}, weight.options().dtype(sum_dtype));
  cuda::forward(grad_output, weight.transpose(1, 2), std::nullopt, rows);
  const auto [sorted, order] = at::sort(indices, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  Tensor grad_input = at::empty({m, nh, hd}, weight.options());
  cuda::sum_rows(rows.const_data_ptr(), sorted.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>(),
                 indices.size(0), m, nh * hd, cuda::dtype_of(weight), grad_input.mutable_data_ptr(),
                 at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_input;
}

Tensor wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
  Tensor grad_weight = at::empty({input.size(1), input.size(2), grad_output.size(2)}, input.options());
  cuda::gather_wgrad(grad_output, input, indices, grad_weight);
  return grad_weight;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                    const Tensor& indices, bool distinct) {
  const int64_t m = input.size(0);
  if (distinct) {
    Tensor grad_input = at::empty(input.sizes(), input.options());
    Tensor grad_weight = at::empty(weight.sizes(), weight.options());
    if (cuda::backward_in_one_pass(grad_output, input, weight, indices, grad_input, grad_weight)) {
      const Tensor places = inverse(indices, m);
      cuda::zero_rows(places.const_data_ptr<int64_t>(), m, indices.size(0), grad_input.size(1) * grad_input.size(2),
                      grad_input.element_size(), grad_input.mutable_data_ptr(), at::cuda::getCurrentCUDAStream());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      return {grad_input, grad_weight};
    }
  }
  return {dgrad(grad_output, weight, indices, m, distinct), wgrad(grad_output, input, indices)};
}

Tensor gather_head_matmul_cuda(const Tensor& input, const Tensor& weight, const Tensor& indices,
                               const OptionalTensor& bias) {
  check_head_matmul("gather_head_matmul", input, weight, bias, indices);
  const c10::cuda::CUDAGuard guard(input.device());
  const Tensor contiguous_indices = indices.contiguous();
  Tensor output = at::empty({indices.size(0), weight.size(0), weight.size(2)}, input.options());
  if (output.numel() > 0) cuda::gather_forward(input, weight, contiguous_indices, bias, output);
  return output;
}

Tensor gather_head_matmul_dgrad_cuda(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, int64_t m,
                                     bool distinct) {
  check_head_matmul_backward("_gather_head_matmul_dgrad", grad_output, std::nullopt, weight, indices, SymInt(m));
  const c10::cuda::CUDAGuard guard(grad_output.device());
  return dgrad(grad_output, weight, indices.contiguous(), m, distinct);
}

Tensor gather_head_matmul_wgrad_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
  check_head_matmul_backward("_gather_head_matmul_wgrad", grad_output, input, std::nullopt, indices);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  return wgrad(grad_output, input, indices.contiguous());
}

std::tuple<Tensor, Tensor> gather_head_matmul_backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                            const Tensor& weight, const Tensor& indices,
                                                            bool distinct) {
  check_head_matmul_backward("_gather_head_matmul_backward", grad_output, input, weight, indices);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  return backward(grad_output, input, weight, indices.contiguous(), distinct);
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CUDA, m) {
  m.impl("gather_head_matmul", gather_head_matmul_cuda);
  m.impl("_gather_head_matmul_dgrad", gather_head_matmul_dgrad_cuda);
  m.impl("_gather_head_matmul_wgrad", gather_head_matmul_wgrad_cuda);
  m.impl("_gather_head_matmul_backward", gather_head_matmul_backward_cuda);
}

}  // namespace mhmatmul
