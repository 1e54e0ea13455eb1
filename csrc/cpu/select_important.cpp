#include "select.h"

#include "../checks.h"
#include "../score_format.h"

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
  return *static_cast<const typename Format::Bits*>(rounded.const_data_ptr());
}

template <class Format>
std::vector<SelectionRule<Format>> find_rules(const Tensor& probs, typename Format::Bits top_p, int64_t k) {
  const int64_t b = probs.size(0), s = probs.size(1), row_stride = probs.stride(0), stride = probs.stride(1);
  const auto* data = static_cast<const typename Format::Bits*>(probs.const_data_ptr());
  std::vector<SelectionRule<Format>> rules(b);
  at::parallel_for(0, b, rows_per_task(s), [&](int64_t begin, int64_t end) {
    std::vector<typename Format::Bits> survivors;
    for (int64_t i = begin; i < end; ++i)
      rules[i] = cpu::find_rule<Format>(data + i * row_stride, stride, s, top_p, k, survivors);
  });
  return rules;
}

// Writes row i's kept positions at indices[offset(i)].
template <class Format, class Offset>
void write_rows(const Tensor& probs, const std::vector<SelectionRule<Format>>& rules, int64_t* indices,
                const Offset& offset) {
  const int64_t b = probs.size(0), s = probs.size(1), row_stride = probs.stride(0), stride = probs.stride(1);
  const auto* data = static_cast<const typename Format::Bits*>(probs.const_data_ptr());
  at::parallel_for(0, b, rows_per_task(s), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      cpu::write_kept<Format>(data + i * row_stride, stride, s, rules[i], i * s, indices + offset(i));
  });
}

template <class Format>
std::tuple<Tensor, Tensor> select(const Tensor& probs, typename Format::Bits top_p, std::optional<int64_t> top_k) {
  const int64_t b = probs.size(0), s = probs.size(1);
  const auto rules = find_rules<Format>(probs, top_p, top_k.value_or(s));
  std::vector<int64_t> starts(b + 1, 0);
  for (int64_t i = 0; i < b; ++i) starts[i + 1] = starts[i] + rules[i].count;
  check_kept("select_important", starts[b]);

  Tensor indices = at::empty({starts[b]}, probs.options().dtype(at::kLong));
  Tensor cu_seqlens = at::empty({b + 1}, probs.options().dtype(at::kInt));
  std::copy(starts.begin(), starts.end(), cu_seqlens.mutable_data_ptr<int32_t>());
  write_rows<Format>(probs, rules, indices.mutable_data_ptr<int64_t>(), [&](int64_t i) { return starts[i]; });
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
    const auto rules = find_rules<Format>(probs, read_threshold<Format>(top_p, probs), std::min(k, capacity));
    int64_t* const count = counts.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < b; ++i) count[i] = std::min(rules[i].candidates, k);

    int64_t* const out = indices.mutable_data_ptr<int64_t>();
    write_rows<Format>(probs, rules, out, [&](int64_t i) { return i * capacity; });
    for (int64_t i = 0; i < b; ++i)
      std::fill(out + i * capacity + rules[i].count, out + (i + 1) * capacity, int64_t{-1});
  });
  return {indices, counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CPU, m) {
  m.impl("select_important", select_important_cpu);
  m.impl("_select_important_tensor", select_important_tensor_cpu);
  m.impl("select_important_static", select_important_static_cpu);
}

}  // namespace mhmatmul
