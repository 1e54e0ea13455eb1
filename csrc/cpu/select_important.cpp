#include "select.h"

#include "../checks.h"
#include "../flatten.h"
#include "../score_format.h"
#include "memory.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace mhmatmul {
namespace {

// Rows in flight per thread: enough scores to be worth a thread.
int64_t rows_per_task(int64_t s) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, s)); }

template <class Format>
typename Format::Bits read_threshold(const Tensor& top_p, const Tensor& probs) {
  const Tensor rounded = top_p.to(probs.scalar_type()).contiguous();
  return *static_cast<const typename Format::Bits*>(allocated(rounded).const_data_ptr());
}

template <class Format>
std::vector<cpu::RowSelection> select_rows(const Tensor& probs, typename Format::Bits top_p, int64_t k) {
  const int64_t b = probs.size(0), s = probs.size(1), row_stride = probs.stride(0), stride = probs.stride(1);
  const auto* data = static_cast<const typename Format::Bits*>(allocated(probs).const_data_ptr());
  std::vector<cpu::RowSelection> rows(b);
  at::parallel_for(0, b, rows_per_task(s), [&](int64_t begin, int64_t end) {
    cpu::SelectionScratch<Format> scratch;
    for (int64_t i = begin; i < end; ++i)
      rows[i] = cpu::select_row<Format>(data + i * row_stride, stride, s, top_p, k, i * s, scratch);
  });
  return rows;
}

template <class Format>
std::tuple<Tensor, Tensor> select(const Tensor& probs, typename Format::Bits top_p, std::optional<int64_t> top_k) {
  const auto rows = select_rows<Format>(probs, top_p, top_k.value_or(probs.size(1)));
  int64_t t = 0;
  for (const auto& row : rows) t += static_cast<int64_t>(row.kept.size());
  check_kept("select_important", t);

  Tensor indices = at::empty({t}, probs.options().dtype(at::kLong));
  Tensor cu_seqlens = at::empty({probs.size(0) + 1}, probs.options().dtype(at::kInt));
  auto* const begin = indices.mutable_data_ptr<int64_t>();
  auto* next = begin;
  auto* offset = cu_seqlens.mutable_data_ptr<int32_t>();
  for (const auto& row : rows) {
    *offset++ = static_cast<int32_t>(next - begin);
    next = std::copy(row.kept.begin(), row.kept.end(), next);
  }
  *offset = static_cast<int32_t>(t);
  return {indices, cu_seqlens};
}

std::tuple<Tensor, Tensor> select_important_cpu(const Tensor& probs, double top_p, std::optional<int64_t> top_k) {
  check_select("select_important", probs, top_p, std::nullopt, top_k);
  return with_score_format(probs.scalar_type(), [&](auto format) {
    using Format = decltype(format);
    return select<Format>(probs, score_bits<Format>(top_p), top_k);
  });
}

std::tuple<Tensor, Tensor> select_important_tensor_cpu(const Tensor& probs, const Tensor& top_p,
                                                       std::optional<int64_t> top_k) {
  check_select("select_important", probs, std::nullopt, top_p, top_k);
  return with_score_format(probs.scalar_type(), [&](auto format) {
    using Format = decltype(format);
    return select<Format>(probs, read_threshold<Format>(top_p, probs), top_k);
  });
}

std::tuple<Tensor, Tensor> select_important_static_cpu(const Tensor& probs, const Tensor& top_p,
                                                       std::optional<int64_t> top_k, int64_t capacity) {
  check_select("select_important", probs, std::nullopt, top_p, top_k, SymInt(capacity));
  const int64_t b = probs.size(0), s = probs.size(1), k = top_k.value_or(s);
  Tensor indices = at::empty({b, capacity}, probs.options().dtype(at::kLong));
  Tensor counts = at::empty({b}, probs.options().dtype(at::kLong));
  with_score_format(probs.scalar_type(), [&](auto format) {
    using Format = decltype(format);
    const auto rows = select_rows<Format>(probs, read_threshold<Format>(top_p, probs), std::min(k, capacity));
    auto* place = indices.mutable_data_ptr<int64_t>();
    auto* count = counts.mutable_data_ptr<int64_t>();
    for (const auto& row : rows) {
      std::fill(std::copy(row.kept.begin(), row.kept.end(), place), place + capacity, int64_t{-1});
      place += capacity;
      *count++ = std::min(row.candidates, k);
    }
  });
  return {indices, counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CPU, m) {
  m.impl("select_important", cpu::WithMemoryErrors<select_important_cpu>::call);
  m.impl("_select_important_tensor", cpu::WithMemoryErrors<select_important_tensor_cpu>::call);
  m.impl("select_important_static", cpu::WithMemoryErrors<select_important_static_cpu>::call);
}

}  // namespace mhmatmul
