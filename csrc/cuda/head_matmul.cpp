#include "../checks.h"
#include "../flatten.h"
#include "head_gemm.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

namespace mhmatmul {
namespace {

Tensor head_matmul_cuda(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  check_head_matmul("head_matmul", input, weight, bias);
  const c10::cuda::CUDAGuard guard(input.device());
  auto sizes = input.sizes().vec();
  sizes.back() = weight.size(2);
  Tensor output = at::empty(sizes, input.options());
  cuda::forward(flatten_rows(input), weight, bias, flatten_rows(output));
  return output;
}

void head_matmul_out_cuda(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Tensor& out) {
  check_head_matmul("head_matmul", input, weight, bias, std::nullopt, out);
  check_no_overlap(input, weight, bias, out);
  const c10::cuda::CUDAGuard guard(input.device());
  const Tensor rows = flatten_rows(out);  // a copy where the leading dimensions do not collapse
  cuda::forward(flatten_rows(input), weight, bias, rows);
  if (!rows.is_alias_of(out)) out.copy_(rows.view(out.sizes()));
}

Tensor head_matmul_wgrad_cuda(const Tensor& grad_output, const Tensor& input) {
  check_head_matmul_backward("_head_matmul_wgrad", grad_output, input, std::nullopt);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  Tensor grad_weight = at::empty({input.size(-2), input.size(-1), grad_output.size(-1)}, input.options());
  cuda::wgrad(flatten_rows(grad_output), flatten_rows(input), grad_weight);
  return grad_weight;
}

std::tuple<Tensor, Tensor> head_matmul_backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                     const Tensor& weight) {
  check_head_matmul_backward("_head_matmul_backward", grad_output, input, weight);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const Tensor grads = flatten_rows(grad_output), rows = flatten_rows(input);
  Tensor grad_input = at::empty(input.sizes(), input.options());
  Tensor grad_weight = at::empty(weight.sizes(), weight.options());
  const Tensor grad_rows = flatten_rows(grad_input);
  if (cuda::backward_in_one_pass(grads, rows, weight, Tensor(), grad_rows, grad_weight))
    return {grad_input, grad_weight};
  cuda::forward(grads, weight.transpose(1, 2), std::nullopt, grad_rows);
  cuda::wgrad(grads, rows, grad_weight);
  return {grad_input, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CUDA, m) {
  m.impl("head_matmul", head_matmul_cuda);
  m.impl("_head_matmul_out", head_matmul_out_cuda);
  m.impl("_head_matmul_wgrad", head_matmul_wgrad_cuda);
  m.impl("_head_matmul_backward", head_matmul_backward_cuda);
}

}  // namespace mhmatmul
