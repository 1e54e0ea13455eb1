#include "../checks.h"
#include "../flatten.h"
#include "dtype.h"
#include "rows.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

namespace mhmatmul {
namespace {

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

const void* data_or_null(const OptionalTensor& tensor) {
  return tensor ? allocated(*tensor).const_data_ptr() : nullptr;
}

Tensor combine_cuda(const Tensor& base, const Tensor& updates, const Tensor& indices, const OptionalTensor& gates) {
  const auto sizes = check_combine("combine", "base", base, updates, indices, gates);
  const c10::cuda::CUDAGuard guard(base.device());
  const Tensor rows = base.contiguous(), added = updates.contiguous();
  const OptionalTensor factors = contiguous(gates);
  const auto [sorted, order] = at::sort(indices, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  Tensor output = at::empty(base.sizes(), base.options());
  cuda::combine_rows(allocated(rows).const_data_ptr(), allocated(added).const_data_ptr(), data_or_null(factors),
                     sorted.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>(), sizes.t.expect_int(),
                     sizes.m.expect_int(), sizes.d.expect_int(), cuda::dtype_of(base), output.mutable_data_ptr(),
                     at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

Tensor combine_updates_grad_cuda(const Tensor& grad_output, const Tensor& indices, const OptionalTensor& gates) {
  const auto sizes = check_combine("_combine_updates_grad", "grad_output", grad_output, std::nullopt, indices, gates);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const Tensor rows = grad_output.contiguous(), places = indices.contiguous();
  const OptionalTensor factors = contiguous(gates);
  const int64_t t = sizes.t.expect_int(), d = sizes.d.expect_int();
  Tensor grad_updates = at::empty({t, d}, grad_output.options());
  cuda::scale_rows(allocated(rows).const_data_ptr(), places.const_data_ptr<int64_t>(), data_or_null(factors), t,
                   sizes.m.expect_int(), d, cuda::dtype_of(rows), grad_updates.mutable_data_ptr(),
                   at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_updates;
}

Tensor combine_gates_grad_cuda(const Tensor& grad_output, const Tensor& updates, const Tensor& indices) {
  const auto sizes = check_combine("_combine_gates_grad", "grad_output", grad_output, updates, indices, std::nullopt);
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const Tensor rows = grad_output.contiguous(), added = updates.contiguous(), places = indices.contiguous();
  const int64_t t = sizes.t.expect_int();
  Tensor grad_gates = at::empty({t}, grad_output.options());
  cuda::dot_rows(allocated(rows).const_data_ptr(), places.const_data_ptr<int64_t>(), allocated(added).const_data_ptr(),
                 t, sizes.m.expect_int(), sizes.d.expect_int(), cuda::dtype_of(rows), grad_gates.mutable_data_ptr(),
                 at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_gates;
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CUDA, m) {
  m.impl("combine", combine_cuda);
  m.impl("_combine_updates_grad", combine_updates_grad_cuda);
  m.impl("_combine_gates_grad", combine_gates_grad_cuda);
}

}  // namespace mhmatmul
