#include "select.h"

#include "../checks.h"
#include "../score_format.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <string>

namespace mhmatmul {
namespace {

template <class Format>
cuda::Scores<Format> scores_of(const Tensor& probs) {
  TORCH_CHECK_VALUE(
      probs.size(0) <= std::numeric_limits<int32_t>::max() && probs.size(1) <= std::numeric_limits<uint32_t>::max(),
      "select_important: on CUDA probs may have up to 2^31 - 1 rows of up to 2^32 - 1 scores, got ",
      std::to_string(probs.size(0)), " of ", std::to_string(probs.size(1)));
  return {static_cast<const typename Format::Bits*>(probs.const_data_ptr()), probs.size(0), probs.size(1),
          probs.stride(0), probs.stride(1)};
}

// A threshold on the device stays there; one on the host is read here.
template <class Format>
cuda::Threshold<Format> threshold_of(const Tensor& rounded) {
  const auto* bits = static_cast<const typename Format::Bits*>(rounded.const_data_ptr());
  return rounded.is_cuda() ? cuda::Threshold<Format>{0, bits} : cuda::Threshold<Format>{*bits, nullptr};
}

template <class Format>
Tensor empty_rules(const Tensor& probs) {
  return at::empty({probs.size(0) * static_cast<int64_t>(sizeof(SelectionRule<Format>))},
                   probs.options().dtype(at::kByte));
}

template <class Format>
std::tuple<Tensor, Tensor> select(const Tensor& probs, const cuda::Threshold<Format>& top_p,
                                  std::optional<int64_t> top_k) {
  const int64_t b = probs.size(0), k = top_k.value_or(probs.size(1));
  Tensor counts = at::zeros({b + 1}, probs.options().dtype(at::kLong));  // one place down, for the running sum
  if (b == 0) return {counts.narrow(0, 0, 0), counts.to(at::kInt)};

  const auto scores = scores_of<Format>(probs);
  const auto stream = at::cuda::getCurrentCUDAStream();
  Tensor rules_memory = empty_rules<Format>(probs);
  auto* const rules = reinterpret_cast<SelectionRule<Format>*>(rules_memory.mutable_data_ptr());
  cuda::find_rules<Format>(scores, top_p, k, k, rules, counts.mutable_data_ptr<int64_t>() + 1, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();

  const Tensor starts = counts.cumsum(0);
  const int64_t t = starts[b].item<int64_t>();
  check_kept("select_important", t);
  Tensor indices = at::empty({t}, probs.options().dtype(at::kLong));
  cuda::write_kept<Format>(scores, rules, starts.const_data_ptr<int64_t>(), 0, indices.mutable_data_ptr<int64_t>(),
                           stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {indices, starts.to(at::kInt)};
}

std::tuple<Tensor, Tensor> select_important_cuda(const Tensor& probs, double top_p, std::optional<int64_t> top_k) {
  check_select("select_important", probs, top_p, std::nullopt, top_k);
  const c10::cuda::CUDAGuard guard(probs.device());
  return with_score_format(probs.scalar_type(), [&](auto format) {
    using Format = decltype(format);
    return select<Format>(probs, {score_bits<Format>(top_p), nullptr}, top_k);
  });
}

std::tuple<Tensor, Tensor> select_important_tensor_cuda(const Tensor& probs, const Tensor& top_p,
                                                        std::optional<int64_t> top_k) {
  check_select("select_important", probs, std::nullopt, top_p, top_k);
  const c10::cuda::CUDAGuard guard(probs.device());
  const Tensor rounded = top_p.to(probs.scalar_type());
  return with_score_format(probs.scalar_type(), [&](auto format) {
    using Format = decltype(format);
    return select<Format>(probs, threshold_of<Format>(rounded), top_k);
  });
}

std::tuple<Tensor, Tensor> select_important_static_cuda(const Tensor& probs, const Tensor& top_p,
                                                        std::optional<int64_t> top_k, int64_t capacity) {
  check_select("select_important", probs, std::nullopt, top_p, top_k, SymInt(capacity));
  const c10::cuda::CUDAGuard guard(probs.device());
  const int64_t b = probs.size(0), k = top_k.value_or(probs.size(1));
  Tensor indices = at::empty({b, capacity}, probs.options().dtype(at::kLong));
  Tensor counts = at::empty({b}, probs.options().dtype(at::kLong));
  if (b == 0) return {indices, counts};

  const Tensor rounded = top_p.to(probs.scalar_type());
  const auto stream = at::cuda::getCurrentCUDAStream();
  with_score_format(probs.scalar_type(), [&](auto format) {
    using Format = decltype(format);
    const auto scores = scores_of<Format>(probs);
    Tensor rules_memory = empty_rules<Format>(probs);
    auto* const rules = reinterpret_cast<SelectionRule<Format>*>(rules_memory.mutable_data_ptr());
    cuda::find_rules<Format>(scores, threshold_of<Format>(rounded), std::min(k, capacity), k, rules,
                             counts.mutable_data_ptr<int64_t>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    cuda::write_kept<Format>(scores, rules, nullptr, capacity, indices.mutable_data_ptr<int64_t>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {indices, counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CUDA, m) {
  m.impl("select_important", select_important_cuda);
  m.impl("_select_important_tensor", select_important_tensor_cuda);
  m.impl("select_important_static", select_important_static_cuda);
}

}  // namespace mhmatmul
