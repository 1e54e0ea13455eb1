#include "../checks.h"
#include "head_gemm.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace mhmatmul {
namespace {

// Indices as the kernels read them: contiguous, every one in [-1, m).
struct CheckedIndices {
  Tensor tensor;
  bool any_padding;

  CheckedIndices(const char* op, const Tensor& indices, int64_t m)
      : tensor(indices.contiguous()),
        any_padding(check_indices(op, tensor.const_data_ptr<int64_t>(), tensor.size(0), m)) {}
  const int64_t* data() const { return tensor.const_data_ptr<int64_t>(); }
};

Tensor gather_head_matmul_cpu(const Tensor& input, const Tensor& weight, const Tensor& indices,
                              const OptionalTensor& bias) {
  check_head_matmul("gather_head_matmul", input, weight, bias, indices);
  const CheckedIndices checked("gather_head_matmul", indices, input.size(0));
  Tensor output = at::empty({indices.size(0), weight.size(0), weight.size(2)}, input.options());
  cpu::forward(cpu::Rows(input, checked.tensor, checked.any_padding), weight, bias, output);
  return output;
}

Tensor gather_head_matmul_dgrad_cpu(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, int64_t m) {
  check_head_matmul_backward("_gather_head_matmul_dgrad", grad_output, std::nullopt, weight, indices, SymInt(m));
  const CheckedIndices checked("_gather_head_matmul_dgrad", indices, m);
  return cpu::dgrad(grad_output, weight, checked.data(), m);
}

Tensor gather_head_matmul_wgrad_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
  check_head_matmul_backward("_gather_head_matmul_wgrad", grad_output, input, std::nullopt, indices);
  const CheckedIndices checked("_gather_head_matmul_wgrad", indices, input.size(0));
  return cpu::wgrad(grad_output, cpu::Rows(input, checked.tensor, checked.any_padding));
}

std::tuple<Tensor, Tensor> gather_head_matmul_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                           const Tensor& weight, const Tensor& indices) {
  check_head_matmul_backward("_gather_head_matmul_backward", grad_output, input, weight, indices);
  const CheckedIndices checked("_gather_head_matmul_backward", indices, input.size(0));
  return {cpu::dgrad(grad_output, weight, checked.data(), input.size(0)),
          cpu::wgrad(grad_output, cpu::Rows(input, checked.tensor, checked.any_padding))};
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CPU, m) {
  m.impl("gather_head_matmul", gather_head_matmul_cpu);
  m.impl("_gather_head_matmul_dgrad", gather_head_matmul_dgrad_cpu);
  m.impl("_gather_head_matmul_wgrad", gather_head_matmul_wgrad_cpu);
  m.impl("_gather_head_matmul_backward", gather_head_matmul_backward_cpu);
}

}  // namespace mhmatmul
