#include "../checks.h"
#include "head_gemm.h"
#include "memory.h"

#include <torch/library.h>

namespace mhmatmul {
namespace {

// Indices as the kernels read them: contiguous, every one in [-1, m).
Tensor checked(const char* op, const Tensor& indices, int64_t m) {
  const Tensor contiguous = indices.contiguous();
  check_indices(op, contiguous.const_data_ptr<int64_t>(), contiguous.size(0), m);
  return contiguous;
}

Tensor gather_head_matmul_cpu(const Tensor& input, const Tensor& weight, const Tensor& indices,
                              const OptionalTensor& bias) {
  check_head_matmul("gather_head_matmul", input, weight, bias, indices);
  const Tensor rows = checked("gather_head_matmul", indices, input.size(0));
  Tensor output = cpu::empty_output({rows.size(0), weight.size(0), weight.size(2)}, input.options());
  cpu::forward(input, rows.const_data_ptr<int64_t>(), weight, bias, output);
  return output;
}

Tensor gather_head_matmul_dgrad_cpu(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, int64_t m,
                                    bool distinct) {
  constexpr auto kName = "_gather_head_matmul_dgrad";
  check_head_matmul_backward(kName, grad_output, std::nullopt, weight, indices, SymInt(m));
  return cpu::dgrad(grad_output, weight, checked(kName, indices, m), m);
}

Tensor gather_head_matmul_wgrad_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
  constexpr auto kName = "_gather_head_matmul_wgrad";
  check_head_matmul_backward(kName, grad_output, input, std::nullopt, indices);
  const Tensor rows = checked(kName, indices, input.size(0));
  return cpu::wgrad(grad_output, input, rows.const_data_ptr<int64_t>());
}

std::tuple<Tensor, Tensor> gather_head_matmul_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                           const Tensor& weight, const Tensor& indices, bool distinct) {
  constexpr auto kName = "_gather_head_matmul_backward";
  check_head_matmul_backward(kName, grad_output, input, weight, indices);
  const Tensor rows = checked(kName, indices, input.size(0));
  return {cpu::dgrad(grad_output, weight, rows, input.size(0)),
          cpu::wgrad(grad_output, input, rows.const_data_ptr<int64_t>())};
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CPU, m) {
  m.impl("gather_head_matmul", cpu::WithMemoryErrors<gather_head_matmul_cpu>::call);
  m.impl("_gather_head_matmul_dgrad", cpu::WithMemoryErrors<gather_head_matmul_dgrad_cpu>::call);
  m.impl("_gather_head_matmul_wgrad", cpu::WithMemoryErrors<gather_head_matmul_wgrad_cpu>::call);
  m.impl("_gather_head_matmul_backward", cpu::WithMemoryErrors<gather_head_matmul_backward_cpu>::call);
}

}  // namespace mhmatmul
