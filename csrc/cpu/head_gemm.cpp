#include "head_gemm.h"

#include "../flatten.h"
#include "gemm.h"
#include "rows.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mhmatmul::cpu {
namespace {

constexpr int64_t kHugePage = int64_t{1} << 21;
constexpr int64_t kRowsToAdd = 1024;            // enough for the product to be as fast as of all at once
constexpr int64_t kAdviseFrom = 2 * kHugePage;  // below, a huge page or none makes no difference

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      TORCH_INTERNAL_ASSERT(false, "an operand of a dtype that the checks refuse");
  }
}

// Of [rows, nh, columns].
Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// One parallel region. Threads take tasks one by one: a core that is held up by something else does fewer.
template <class Problem>
void run_all(const Problem& problem) {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const Tasks tasks = cut(problem, threads);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(threads, tasks.count), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next++) < tasks.count;) run(problem, tasks, task);
  });
}

}  // namespace

Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor output = at::empty(sizes, options);
#if defined(__linux__)
  const auto bytes = static_cast<int64_t>(output.nbytes());
  if (bytes >= kAdviseFrom) {
    const auto address = reinterpret_cast<intptr_t>(output.mutable_data_ptr());
    const intptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
    const intptr_t end = (address + bytes) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be refused
  }
#endif
  return output;
}

void forward(const Tensor& rows, const int64_t* indices, const Tensor& weight, const OptionalTensor& bias,
             const Tensor& output) {
  if (output.numel() == 0) return;
  const Tensor c = bias ? bias->contiguous() : Tensor();
  const Strides b = strides_of(weight);
  run_all(ForwardProblem{dtype_of(weight),
                         weight.size(0),
                         output.size(0),
                         weight.size(2),
                         weight.size(1),
                         allocated(rows).const_data_ptr(),
                         strides_of(rows),
                         indices,
                         allocated(weight).const_data_ptr(),
                         {b.head, b.row, b.column},  // [nh, hd, e]: heads come first
                         bias ? allocated(c).const_data_ptr() : nullptr,
                         allocated(output).mutable_data_ptr(),
                         strides_of(output)});
}

Tensor dgrad(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, int64_t m) {
  const int64_t nh = weight.size(0), hd = weight.size(1), t = grad_output.size(0);
  const Tensor transposed = weight.transpose(1, 2);
  if (const auto places =
          inverse(indices.const_data_ptr<int64_t>(), t, m)) {  // every row of grad_input has one source or none
    Tensor grad_input = empty_output({m, nh, hd}, weight.options());
    forward(grad_output, places->data(), transposed, std::nullopt, grad_input);
    return grad_input;
  }
  // Rows of the product are added up block by block: neither they nor the widened gradients are ever there as a whole.
  const auto dtype = at::toOpMathType(weight.scalar_type());
  const Tensor wide = transposed.to(dtype), rows = at::empty({std::min(t, kRowsToAdd), nh, hd}, wide.options());
  Tensor grad_input = at::zeros({m, nh, hd}, rows.options());
  for (int64_t first = 0; first < t; first += kRowsToAdd) {
    const int64_t count = std::min(t - first, kRowsToAdd);
    forward(grad_output.narrow(0, first, count).to(dtype), nullptr, wide, std::nullopt, rows.narrow(0, 0, count));
    AT_DISPATCH_FLOATING_TYPES(dtype, "add_rows", [&] {
      at::parallel_for(0, nh * hd, 64, [&](int64_t begin, int64_t end) {
        add_rows(rows.const_data_ptr<scalar_t>(), indices.const_data_ptr<int64_t>() + first, count, begin, end, nh * hd,
                 grad_input.mutable_data_ptr<scalar_t>());
      });
    });
  }
  return grad_input.to(weight.scalar_type());
}

Tensor wgrad(const Tensor& grad_output, const Tensor& rows, const int64_t* indices) {
  Tensor grad_weight = empty_output({grad_output.size(1), rows.size(2), grad_output.size(2)}, grad_output.options());
  if (grad_weight.numel() == 0) return grad_weight;
  run_all(WgradProblem{dtype_of(grad_output), grad_output.size(1), grad_output.size(0), rows.size(2),
                       grad_output.size(2), allocated(rows).const_data_ptr(), strides_of(rows), indices,
                       allocated(grad_output).const_data_ptr(), strides_of(grad_output),
                       grad_weight.mutable_data_ptr()});
  return grad_weight;
}

}  // namespace mhmatmul::cpu
