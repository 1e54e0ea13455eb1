#include "../checks.h"
#include "head_gemm.h"
#include "selection.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

namespace mhmatmul {
namespace {

// Room for every row that might be kept is taken up to this share of the device's memory; beyond it, the host waits for
// the count and allocates what there is.
constexpr int64_t kShareOfMemory = 16;

// The host waits once, when the product is on its way: it reads on the device how many rows there are.
std::tuple<Tensor, Tensor, Tensor> importance_head_matmul_cuda(const Tensor& input, const Tensor& weight,
                                                               const Tensor& probs, std::optional<double> top_p_value,
                                                               const OptionalTensor& top_p,
                                                               std::optional<int64_t> top_k) {
  check_importance_head_matmul("matmul_with_importance", input, weight, probs, top_p_value, top_p, top_k);
  const c10::cuda::CUDAGuard guard(input.device());
  cuda::PackedSelection selection(probs, top_p_value, top_p, top_k);
  const auto output_of = [&](int64_t rows) {
    return at::empty({rows, weight.size(0), weight.size(2)}, input.options());
  };
  const auto bytes_of_row = weight.size(0) * weight.size(2) * static_cast<int64_t>(input.element_size());
  const auto memory = static_cast<int64_t>(at::cuda::getCurrentDeviceProperties()->totalGlobalMem);
  if (selection.places.size(0) * bytes_of_row <= memory / kShareOfMemory) {
    const Tensor output = output_of(selection.places.size(0));
    const Tensor kept = selection.cu_seqlens.narrow(0, probs.size(0), 1);
    if (cuda::gather_forward_in_flight(input, weight, selection.places, std::nullopt, output, kept)) {
      const int64_t t = selection.wait();
      return {cuda::first_rows(output, t), cuda::first_rows(selection.places, t), selection.cu_seqlens};
    }
  }
  const Tensor indices = cuda::first_rows(selection.places, selection.wait());
  const Tensor output = output_of(indices.size(0));
  if (output.numel() > 0) cuda::gather_forward(input, weight, indices, std::nullopt, output);
  return {output, indices, selection.cu_seqlens};
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CUDA, m) { m.impl("_importance_head_matmul", importance_head_matmul_cuda); }

}  // namespace mhmatmul
