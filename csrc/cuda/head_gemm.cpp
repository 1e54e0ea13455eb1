#include "head_gemm.h"

#include "../flatten.h"
#include "backward_sm90.h"
#include "gemm.h"
#include "gemm_lt.h"
#include "gemm_sm90.h"
#include "rows.h"
#include "tf32_sm90.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDADataType.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>

#include <optional>

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
    return Operand{allocated(tensor).const_data_ptr(), ld, tensor.stride(batch), transposed};
  };
  if (!readable(row, column) && !readable(column, row)) tensor = tensor.contiguous();
  return readable(row, column) ? read(row, column, false) : read(column, row, true);
}

bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

bool is_dense(const Tensor& tensor, int64_t dim) { return tensor.stride(dim) == 1 || tensor.size(dim) == 1; }

// Whether float32 may be rounded to TF32: PyTorch's settings, as PyTorch understands them, are those of its handle.
bool allows_tf32() {
  cublasMath_t mode{};
  TORCH_CHECK(cublasGetMathMode(at::cuda::getCurrentCUDABlasHandle(), &mode) == CUBLAS_STATUS_SUCCESS,
              "cublasGetMathMode failed");
  return mode & CUBLAS_TF32_TENSOR_OP_MATH;
}

// Runs a kernel for Hopper where one takes the product; else nothing is done, and false is returned.
bool run_sm90_where_faster(const Tensor& rows, const Tensor& weight, const Tensor& indices, const OptionalTensor& bias,
                           const Tensor& output, const Tensor& rows_given = {}) {
  const bool is_float32 = rows.scalar_type() == at::kFloat;
  if (!(is_half(rows) || is_float32) || output.scalar_type() != rows.scalar_type()) return false;
  if (!is_dense(rows, 2) || !is_dense(output, 2) || (bias && !is_dense(*bias, 1))) return false;
  const bool is_transposed = !is_dense(weight, 2);
  if (is_transposed && !is_dense(weight, 1)) return false;

  HeadGemm gemm{};
  gemm.m = output.size(0);
  gemm.n = weight.size(2);
  gemm.k = weight.size(1);
  gemm.batch = weight.size(0);
  gemm.a = allocated(rows).const_data_ptr();
  gemm.a_stride = rows.stride(0);
  gemm.a_batch_stride = rows.stride(1);
  gemm.a_rows = rows.size(0);
  gemm.indices = indices.defined() ? indices.const_data_ptr<int64_t>() : nullptr;
  gemm.b = {allocated(weight).const_data_ptr(), weight.stride(is_transposed ? 2 : 1), weight.stride(0), is_transposed};
  gemm.bias = bias ? allocated(*bias).const_data_ptr() : nullptr;
  gemm.bias_batch_stride = bias ? bias->stride(0) : 0;
  gemm.c = allocated(output).mutable_data_ptr();
  gemm.c_stride = output.stride(0);
  gemm.c_batch_stride = output.stride(1);
  gemm.is_bfloat16 = rows.scalar_type() == at::kBFloat16;
  if (rows_given.defined()) gemm.rows_given = rows_given.const_data_ptr<int32_t>();
  const auto stream = at::cuda::getCurrentCUDAStream();
  if (is_float32) {
    if (!allows_tf32() || !takes_tf32_sm90(gemm)) return false;
    run_tf32_sm90(gemm, stream);
  } else {
    if (!takes_sm90(gemm)) return false;
    run_sm90(gemm, stream);
  }
  return true;
}

LtOptions lt_options(bool is_float32) {
  const auto& context = at::globalContext();
  LtOptions options{};
  options.stream = at::cuda::getCurrentCUDAStream();
  options.times = context.benchmarkCuDNN() && !context.deterministicCuDNN() && !context.deterministicAlgorithms();
  options.allows_tf32 = is_float32 && allows_tf32();
  return options;
}

// What nobody may time cuBLAS chooses better for itself, but it has no bias: the first of cuBLASLt's algorithms
// took 1.5 times as long for 16 rows of 128 heads of 128 -> 512, 1.03 times for one matrix of 4096 (H200).
constexpr int64_t kFewRows = 64;  // too short to be timed

// output = A B + bias; `gemm` is filled in but for what tells of the bias.
void multiply(BatchedGemm& gemm, const OptionalTensor& bias, const Tensor& output) {
  const LtOptions options = lt_options(gemm.operand_type == CUDA_R_32F);
  if (!bias && (gemm.m <= kFewRows || !options.times)) return run(at::cuda::getCurrentCUDABlasHandle(), gemm);
  const OptionalTensor row = bias && bias->stride(1) != 1 ? OptionalTensor(bias->contiguous()) : bias;
  if (run_lt(at::cuda::getCurrentCUDABlasLtHandle(), gemm, row ? allocated(*row).const_data_ptr() : nullptr,
             row ? row->stride(0) : 0, options))
    return;
  if (bias) output.copy_(bias->expand_as(output));
  gemm.accumulates = bias.has_value();
  run(at::cuda::getCurrentCUDABlasHandle(), gemm);
}

// Runs the kernel for Hopper where it takes the product: `backward` has what concerns the input's gradient.
bool run_where_faster(HeadBackward backward, const Tensor& grad_output, const Tensor& rows, const Tensor& indices,
                      const Tensor& grad_weight) {
  if (!is_half(rows) || !is_dense(grad_output, 2) || !is_dense(rows, 2)) return false;
  backward.m = grad_output.size(0);
  backward.hd = grad_weight.size(1);
  backward.e = grad_weight.size(2);
  backward.heads = grad_weight.size(0);
  backward.grad_output = allocated(grad_output).const_data_ptr();
  backward.grad_output_stride = grad_output.stride(0);
  backward.grad_output_head_stride = grad_output.stride(1);
  backward.input = allocated(rows).const_data_ptr();
  backward.input_stride = rows.stride(0);
  backward.input_head_stride = rows.stride(1);
  backward.indices = indices.defined() ? indices.const_data_ptr<int64_t>() : nullptr;
  backward.named_rows = rows.size(0);
  backward.grad_weight = grad_weight.mutable_data_ptr();
  backward.is_bfloat16 = rows.scalar_type() == at::kBFloat16;
  if (!takes_backward_sm90(backward)) return false;
  const Tensor partial = at::empty({partial_of_backward_sm90(backward)}, rows.options().dtype(at::kFloat));
  run_backward_sm90(backward, partial.mutable_data_ptr<float>(), at::cuda::getCurrentCUDAStream());
  return true;
}

// [m, nh, x] as rows of nh * x elements, a row's elements together.
Tensor as_rows(const Tensor& tensor) {
  const Tensor rows = tensor.reshape({tensor.size(0), tensor.size(1) * tensor.size(2)});
  return rows.size(1) <= 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

// What `gather` gives, in a tensor of its own.
Tensor gathered(const Tensor& rows, const Tensor& indices) {
  Tensor to = at::empty({indices.size(0), rows.size(1), rows.size(2)}, rows.options());
  gather(rows, indices, to);
  return to;
}

// A copy of rows [t, nh, x] with zeros where the index names none of m rows.
Tensor masked(const Tensor& rows, const Tensor& indices, int64_t m) {
  const Tensor from = as_rows(rows);
  Tensor to = at::empty(rows.sizes(), rows.options());
  mask_rows(allocated(from).const_data_ptr(), from.stride(0), indices.const_data_ptr<int64_t>(), indices.size(0), m,
            from.size(1), from.element_size(), to.mutable_data_ptr(), from.size(1), at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return to;
}

}  // namespace

void gather(const Tensor& rows, const Tensor& indices, const Tensor& to) {
  const Tensor from = as_rows(rows);
  gather_rows(allocated(from).const_data_ptr(), from.stride(0), indices.const_data_ptr<int64_t>(), indices.size(0),
              rows.size(0), from.size(1), from.element_size(), to.mutable_data_ptr(), at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

bool gather_forward_in_flight(const Tensor& rows, const Tensor& weight, const Tensor& indices,
                              const OptionalTensor& bias, const Tensor& output, const Tensor& rows_given) {
  return run_sm90_where_faster(rows, weight, indices, bias, output, rows_given);
}

void gather_forward(const Tensor& rows, const Tensor& weight, const Tensor& indices, const OptionalTensor& bias,
                    const Tensor& output) {
  if (gather_forward_in_flight(rows, weight, indices, bias, output)) return;
  forward(gathered(rows, indices), weight, bias, output);
  // Also without a bias: a row of zeros by a weight that is not finite is not zeros.
  zero_rows(indices.const_data_ptr<int64_t>(), indices.size(0), rows.size(0), output.size(1) * output.size(2),
            output.element_size(), output.mutable_data_ptr(), at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void forward(const Tensor& rows, const Tensor& weight, const OptionalTensor& bias, const Tensor& output) {
  if (output.numel() == 0) return;
  if (run_sm90_where_faster(rows, weight, Tensor(), bias, output)) return;
  if (weight.size(1) == 0) {
    bias ? output.copy_(bias->expand_as(output)) : output.zero_();
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
  gemm.c = allocated(output).mutable_data_ptr();
  gemm.ldc = std::max(output.stride(0), gemm.n);
  gemm.c_batch_stride = output.stride(1);
  gemm.operand_type = at::cuda::ScalarTypeToCudaDataType(rows.scalar_type());
  gemm.c_type = at::cuda::ScalarTypeToCudaDataType(output.scalar_type());
  multiply(gemm, bias, output);
}

void wgrad(const Tensor& grad_output, const Tensor& rows, const Tensor& grad_weight) {
  if (grad_weight.numel() == 0) return;
  if (rows.size(0) == 0) {
    grad_weight.zero_();
    return;
  }
  if (run_where_faster({}, grad_output, rows, Tensor(), grad_weight)) return;
  Tensor a = rows, b = grad_output;
  BatchedGemm gemm{};
  gemm.m = rows.size(2);
  gemm.n = grad_output.size(2);
  gemm.k = rows.size(0);
  gemm.batch = rows.size(1);
  gemm.a = operand(a, /*batch=*/1, /*row=*/2, /*column=*/0);
  gemm.b = operand(b, /*batch=*/1, /*row=*/0, /*column=*/2);
  gemm.c = grad_weight.mutable_data_ptr();
  gemm.ldc = gemm.n;
  gemm.c_batch_stride = gemm.m * gemm.n;
  gemm.operand_type = gemm.c_type = at::cuda::ScalarTypeToCudaDataType(rows.scalar_type());
  multiply(gemm, std::nullopt, grad_weight);
}

void gather_wgrad(const Tensor& grad_output, const Tensor& rows, const Tensor& indices, const Tensor& grad_weight) {
  if (run_where_faster({}, grad_output, rows, indices, grad_weight)) return;
  wgrad(masked(grad_output, indices, rows.size(0)), gathered(rows, indices), grad_weight);
}

bool backward_in_one_pass(const Tensor& grad_output, const Tensor& rows, const Tensor& weight, const Tensor& indices,
                          const Tensor& grad_input, const Tensor& grad_weight) {
  if (!is_dense(weight, 2)) return false;
  HeadBackward backward{};
  backward.weight = allocated(weight).const_data_ptr();
  backward.weight_stride = weight.stride(1);
  backward.weight_head_stride = weight.stride(0);
  backward.grad_input = grad_input.mutable_data_ptr();
  return run_where_faster(backward, grad_output, rows, indices, grad_weight);
}

}  // namespace mhmatmul::cuda
