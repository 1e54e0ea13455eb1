#include "../checks.h"
#include "../flatten.h"
#include "head_gemm.h"
#include "memory.h"

#include <torch/library.h>

namespace mhmatmul {
namespace {

Tensor head_matmul_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  check_head_matmul("head_matmul", input, weight, bias);
  auto sizes = input.sizes().vec();
  sizes.back() = weight.size(2);
  Tensor output = cpu::empty_output(sizes, input.options());
  cpu::forward(flatten_rows(input), nullptr, weight, bias, flatten_rows(output));
  return output;
}

void head_matmul_out_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Tensor& out) {
  check_head_matmul("head_matmul", input, weight, bias, std::nullopt, out);
  check_no_overlap(input, weight, bias, out);
  const Tensor rows = flatten_rows(out);  // a copy where the leading dimensions do not collapse
  cpu::forward(flatten_rows(input), nullptr, weight, bias, rows);
  if (!rows.is_alias_of(out)) out.copy_(rows.view(out.sizes()));
}

Tensor head_matmul_wgrad_cpu(const Tensor& grad_output, const Tensor& input) {
  check_head_matmul_backward("_head_matmul_wgrad", grad_output, input, std::nullopt);
  return cpu::wgrad(flatten_rows(grad_output), flatten_rows(input), nullptr);
}

std::tuple<Tensor, Tensor> head_matmul_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                    const Tensor& weight) {
  check_head_matmul_backward("_head_matmul_backward", grad_output, input, weight);
  Tensor grad_input = cpu::empty_output(input.sizes(), input.options());
  cpu::forward(flatten_rows(grad_output), nullptr, weight.transpose(1, 2), std::nullopt, flatten_rows(grad_input));
  return {grad_input, cpu::wgrad(flatten_rows(grad_output), flatten_rows(input), nullptr)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CPU, m) {
  m.impl("head_matmul", cpu::WithMemoryErrors<head_matmul_cpu>::call);
  m.impl("_head_matmul_out", cpu::WithMemoryErrors<head_matmul_out_cpu>::call);
  m.impl("_head_matmul_wgrad", cpu::WithMemoryErrors<head_matmul_wgrad_cpu>::call);
  m.impl("_head_matmul_backward", cpu::WithMemoryErrors<head_matmul_backward_cpu>::call);
}

}  // namespace mhmatmul
