#include "combine.h"

#include "../checks.h"
#include "memory.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace mhmatmul {
namespace {

constexpr auto kUpdatesGrad = "_combine_updates_grad";
constexpr auto kGatesGrad = "_combine_gates_grad";

// Rows in flight per thread: enough elements to be worth a thread.
int64_t rows_per_task(int64_t d) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, d)); }

// Indices as the kernels read them: contiguous, every one in [-1, m).
Tensor checked(const char* op, const Tensor& indices, const CombineSizes& sizes) {
  const Tensor contiguous = indices.contiguous();
  check_indices(op, contiguous.const_data_ptr<int64_t>(), sizes.t.expect_int(), sizes.m.expect_int());
  return contiguous;
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

template <class T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

template <class Function>
void with_operand_dtype(at::ScalarType dtype, const Function& function) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "combine", [&] { function(scalar_t{}); });
}

Tensor combine_cpu(const Tensor& base, const Tensor& updates, const Tensor& indices, const OptionalTensor& gates) {
  const auto sizes = check_combine("combine", "base", base, updates, indices, gates);
  const Tensor places = checked("combine", indices, sizes);
  const int64_t m = sizes.m.expect_int(), d = sizes.d.expect_int(), t = sizes.t.expect_int();
  const Tensor rows = base.contiguous(), added = updates.contiguous();
  const OptionalTensor factors = contiguous(gates);
  Tensor output = at::empty(base.sizes(), base.options());
  const cpu::PlacesByRow by_row(places.const_data_ptr<int64_t>(), t, m);
  with_operand_dtype(base.scalar_type(), [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, m, rows_per_task(d), [&](int64_t begin, int64_t end) {
      cpu::combine_rows<T, at::opmath_type<T>>(rows.const_data_ptr<T>(), added.const_data_ptr<T>(),
                                               data_or_null<T>(factors), by_row, begin, end, d,
                                               output.mutable_data_ptr<T>());
    });
  });
  return output;
}

Tensor combine_updates_grad_cpu(const Tensor& grad_output, const Tensor& indices, const OptionalTensor& gates) {
  const auto sizes = check_combine(kUpdatesGrad, "grad_output", grad_output, std::nullopt, indices, gates);
  const Tensor places = checked(kUpdatesGrad, indices, sizes), rows = grad_output.contiguous();
  const int64_t d = sizes.d.expect_int(), t = sizes.t.expect_int();
  const OptionalTensor factors = contiguous(gates);
  Tensor grad_updates = at::empty({t, d}, grad_output.options());
  with_operand_dtype(rows.scalar_type(), [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, t, rows_per_task(d), [&](int64_t begin, int64_t end) {
      cpu::scale_rows<T, at::opmath_type<T>>(rows.const_data_ptr<T>(), places.const_data_ptr<int64_t>(),
                                             data_or_null<T>(factors), begin, end, d,
                                             grad_updates.mutable_data_ptr<T>());
    });
  });
  return grad_updates;
}

Tensor combine_gates_grad_cpu(const Tensor& grad_output, const Tensor& updates, const Tensor& indices) {
  const auto sizes = check_combine(kGatesGrad, "grad_output", grad_output, updates, indices, std::nullopt);
  const Tensor places = checked(kGatesGrad, indices, sizes);
  const Tensor rows = grad_output.contiguous(), added = updates.contiguous();
  const int64_t d = sizes.d.expect_int(), t = sizes.t.expect_int();
  Tensor grad_gates = at::empty({t}, grad_output.options());
  with_operand_dtype(rows.scalar_type(), [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, t, rows_per_task(d), [&](int64_t begin, int64_t end) {
      cpu::dot_rows<T, at::opmath_type<T>>(rows.const_data_ptr<T>(), places.const_data_ptr<int64_t>(),
                                           added.const_data_ptr<T>(), begin, end, d, grad_gates.mutable_data_ptr<T>());
    });
  });
  return grad_gates;
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CPU, m) {
  m.impl("combine", cpu::WithMemoryErrors<combine_cpu>::call);
  m.impl("_combine_updates_grad", cpu::WithMemoryErrors<combine_updates_grad_cpu>::call);
  m.impl("_combine_gates_grad", cpu::WithMemoryErrors<combine_gates_grad_cpu>::call);
}

}  // namespace mhmatmul
