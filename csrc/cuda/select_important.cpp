#include "select.h"

#include "../checks.h"
#include "../score_format.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>
#include <ATen/cuda/CUDAGraphsUtils.cuh>

#include <algorithm>
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

// Of what was allocated for the most that rows can keep, the part that they do keep: a copy where it would hold on to
// more than as much again.
Tensor first(const Tensor& indices, int64_t t) {
  constexpr int64_t kNegligible = int64_t{1} << 17;  // places: 1 MiB
  const Tensor part = indices.narrow(0, 0, t);
  return indices.size(0) - t > std::max(t, kNegligible) ? part.clone() : part;
}

template <class Format>
std::tuple<Tensor, Tensor> select(const Tensor& probs, const cuda::Threshold<Format>& top_p,
                                  std::optional<int64_t> top_k) {
  const int64_t b = probs.size(0), s = probs.size(1), k = top_k.value_or(s);
  Tensor cu_seqlens = at::empty({b + 1}, probs.options().dtype(at::kInt));
  const auto longs = probs.options().dtype(at::kLong);
  if (b == 0) return {at::empty({0}, longs), cu_seqlens.zero_()};
  TORCH_CHECK(at::cuda::currentStreamCaptureStatus() == c10::cuda::CaptureStatus::None,
              "select_important: how many tokens are kept depends on data, which a CUDA graph cannot capture; give a "
              "capacity");

  const auto scores = scores_of<Format>(probs);
  Tensor indices = at::empty({b * std::min(k, s)}, longs);
  Tensor words = at::zeros({b + 2}, longs);  // and, behind them, the ticket and the total
  auto* const word = words.mutable_data_ptr<int64_t>();
  cuda::select_packed<Format>(
      scores, top_p, k,
      {indices.mutable_data_ptr<int64_t>(), cu_seqlens.mutable_data_ptr<int32_t>(), word + b + 1,
       reinterpret_cast<unsigned long long*>(word), reinterpret_cast<unsigned long long*>(word + b)},
      at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const int64_t t = words[b + 1].item<int64_t>();  // the only wait
  check_kept("select_important", t);
  return {first(indices, t), cu_seqlens};
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
  with_score_format(probs.scalar_type(), [&](auto format) {
    using Format = decltype(format);
    cuda::select_padded<Format>(scores_of<Format>(probs), threshold_of<Format>(rounded), std::min(k, capacity),
                                {indices.mutable_data_ptr<int64_t>(), counts.mutable_data_ptr<int64_t>(), capacity, k},
                                at::cuda::getCurrentCUDAStream());
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
