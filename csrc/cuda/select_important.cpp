#include "select.h"
#include "selection.h"

#include "../checks.h"
#include "../flatten.h"
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
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>

namespace mhmatmul {
namespace {

template <class Format>
cuda::Scores<Format> scores_of(const Tensor& probs) {
  TORCH_CHECK_VALUE(
      probs.size(0) <= std::numeric_limits<int32_t>::max() && probs.size(1) <= std::numeric_limits<uint32_t>::max(),
      "select_important: on CUDA probs may have up to 2^31 - 1 rows of up to 2^32 - 1 scores, got ",
      std::to_string(probs.size(0)), " of ", std::to_string(probs.size(1)));
  return {static_cast<const typename Format::Bits*>(allocated(probs).const_data_ptr()), probs.size(0), probs.size(1),
          probs.stride(0), probs.stride(1)};
}

// A threshold on the device stays there; one on the host is read here.
template <class Format>
cuda::Threshold<Format> threshold_of(const Tensor& rounded) {
  const auto* bits = static_cast<const typename Format::Bits*>(rounded.const_data_ptr());
  return rounded.is_cuda() ? cuda::Threshold<Format>{0, bits} : cuda::Threshold<Format>{*bits, nullptr};
}

void refuse_capture() {
  TORCH_CHECK(at::cuda::currentStreamCaptureStatus() == c10::cuda::CaptureStatus::None,
              "select_important: how many tokens are kept depends on data, which a CUDA graph cannot capture; give a "
              "capacity");
}

}  // namespace

namespace cuda {
namespace {

constexpr int64_t kUnknown = -1;

// Two words and one for each of b rows, for selections on the current stream, which find and leave them zeros: setting
// them for each would take as long as the selection. Each stream's are kept, at most as many as its longest needed.
Tensor cleared_words(int64_t b, const Tensor& probs, const c10::cuda::CUDAStream& stream) {
  static std::mutex mutex;
  static auto& words_of = *new std::unordered_map<c10::cuda::CUDAStream, Tensor>;  // CUDA may be gone at exit
  const std::lock_guard lock(mutex);
  Tensor& words = words_of[stream];
  if (!words.defined() || words.size(0) < b + 2) words = at::zeros({b + 2}, probs.options().dtype(at::kLong));
  return words;
}

}  // namespace

PackedSelection::PackedSelection(const Tensor& probs, std::optional<double> top_p_value, const OptionalTensor& top_p,
                                 std::optional<int64_t> top_k)
    : stream_(at::cuda::getCurrentCUDAStream()) {
  const int64_t b = probs.size(0), s = probs.size(1), k = top_k.value_or(s);
  places = at::empty({b * std::min(k, s)}, probs.options().dtype(at::kLong));
  cu_seqlens = at::empty({b + 1}, probs.options().dtype(at::kInt));
  if (b == 0) {
    cu_seqlens.zero_();
    return;
  }
  refuse_capture();
  const Tensor words = cleared_words(b, probs, stream_);
  auto* const word = reinterpret_cast<unsigned long long*>(words.mutable_data_ptr<int64_t>());
  const Tensor rounded = top_p ? top_p->to(probs.scalar_type()) : Tensor();
  with_score_format(probs.scalar_type(), [&](auto format) {
    using Format = decltype(format);
    const auto threshold =
        top_p ? threshold_of<Format>(rounded) : Threshold<Format>{score_bits<Format>(top_p_value.value()), nullptr};
    const auto scores = scores_of<Format>(probs);
    total_ = at::empty({1}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
    *total_.mutable_data_ptr<int64_t>() = kUnknown;
    select_packed<Format>(scores, threshold, k,
                          {places.mutable_data_ptr<int64_t>(), cu_seqlens.mutable_data_ptr<int32_t>(),
                           total_.mutable_data_ptr<int64_t>(), word + 2, word, word + 1},
                          stream_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

PackedSelection::~PackedSelection() {
  if (total_.defined() && counted() == kUnknown) cudaStreamSynchronize(stream_);  // an error is the next call's
}

int64_t PackedSelection::counted() const { return __atomic_load_n(total_.const_data_ptr<int64_t>(), __ATOMIC_ACQUIRE); }

int64_t PackedSelection::wait() {
  if (!total_.defined()) return 0;
  // Looking is sooner than an event, which costs a call to be recorded and another to be waited for. Seldom: whether
  // the device still works.
  constexpr int kLooks = 1 << 16;
  for (int looks = 0; counted() == kUnknown; ++looks) {
    if (looks == kLooks) {
      C10_CUDA_CHECK(cudaStreamSynchronize(stream_));
      TORCH_INTERNAL_ASSERT(counted() != kUnknown, "the selection has ended without a count");
    }
    std::this_thread::yield();
  }
  const int64_t t = counted();
  check_kept("select_important", t);
  return t;
}

Tensor first_rows(const Tensor& rows, int64_t t) {
  constexpr int64_t kNegligible = 1 << 20;  // bytes
  if (t == rows.size(0)) return rows;
  const Tensor part = rows.narrow(0, 0, t);
  const auto kept = static_cast<int64_t>(part.nbytes());
  return static_cast<int64_t>(rows.nbytes()) - kept > std::max(kept, kNegligible) ? part.clone() : part;
}

}  // namespace cuda

namespace {

std::tuple<Tensor, Tensor> select(const Tensor& probs, std::optional<double> top_p_value, const OptionalTensor& top_p,
                                  std::optional<int64_t> top_k) {
  check_select("select_important", probs, top_p_value, top_p, top_k);
  const c10::cuda::CUDAGuard guard(probs.device());
  cuda::PackedSelection selection(probs, top_p_value, top_p, top_k);
  const int64_t t = selection.wait();
  return {cuda::first_rows(selection.places, t), selection.cu_seqlens};
}

std::tuple<Tensor, Tensor> select_important_cuda(const Tensor& probs, double top_p, std::optional<int64_t> top_k) {
  return select(probs, top_p, std::nullopt, top_k);
}

std::tuple<Tensor, Tensor> select_important_tensor_cuda(const Tensor& probs, const Tensor& top_p,
                                                        std::optional<int64_t> top_k) {
  return select(probs, std::nullopt, top_p, top_k);
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
