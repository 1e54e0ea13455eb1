// The only argument checks. Each is called before any work by the CPU and CUDA kernels, by the operators in
// composite/ and, through the _check_* operators, by the fake kernels, so that all refuse alike; each returns
// the sizes it verified. Wrong dtype: TypeError. Wrong shape or value: ValueError. Operands on several
// devices: RuntimeError.
#pragma once

#include "ops.h"

#include <string_view>

namespace mhmatmul {

struct HeadSizes {
  SymInt nh, hd, e;
};

// input [..., nh, hd] (with indices [t]: [m, nh, hd]), weight [nh, hd, e], bias [nh, e], out [..., nh, e].
HeadSizes check_head_matmul(std::string_view op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& indices = std::nullopt, const OptionalTensor& out = std::nullopt);

// grad_output [..., nh, e] with input [..., nh, hd] (one leading size per row) and/or weight [nh, hd, e];
// with indices [t]: grad_output [t, nh, e], input [m, nh, hd].
void check_head_matmul_backward(std::string_view op, const Tensor& grad_output, const OptionalTensor& input,
                                const OptionalTensor& weight, const OptionalTensor& indices = std::nullopt,
                                const std::optional<SymInt>& m = std::nullopt);

// input [..., h], weight [h, e], bias [nh, e], out [..., nh, e]; num_heads divides h.
HeadSizes check_multi_head_matmul(std::string_view op, const Tensor& input, const Tensor& weight,
                                  const SymInt& num_heads, const OptionalTensor& bias = std::nullopt,
                                  const OptionalTensor& out = std::nullopt);

// probs [b, s]; top_p a number in [0, 1] or a 0-d tensor; top_k in [1, s]; capacity >= 0.
void check_select(std::string_view op, const Tensor& probs, std::optional<double> top_p_value,
                  const OptionalTensor& top_p, const std::optional<SymInt>& top_k,
                  const std::optional<SymInt>& capacity = std::nullopt);

// input [b, s, h], weight [h, e], probs [b, s]; num_heads divides h.
HeadSizes check_importance_matmul(std::string_view op, const Tensor& input, const Tensor& weight, const Tensor& probs,
                                  const SymInt& num_heads);

// The same with heads apart: input [b * s, nh, hd], weight [nh, hd, e], probs [b, s]; and the selection's arguments, of
// which one gives the threshold.
void check_importance_head_matmul(std::string_view op, const Tensor& input, const Tensor& weight, const Tensor& probs,
                                  std::optional<double> top_p_value, const OptionalTensor& top_p,
                                  const std::optional<SymInt>& top_k);

// grad_output [t, nh, e], or [b, c, nh, e] with the static selection; `rows` are its sizes before the last
// two, empty as long as they are not known.
void check_importance_grad(std::string_view op, const Tensor& grad_output, const Tensor& input, bool is_static,
                           const HeadSizes& sizes, c10::SymIntArrayRef rows);

struct CombineSizes {
  SymInt m, d, t;
};

// rows [b, s, d] or [m, d] (`rows_name` in messages: base, or the gradient that has its shape), updates [t, d], indices
// [t], gates [t].
CombineSizes check_combine(std::string_view op, const char* rows_name, const Tensor& rows,
                           const OptionalTensor& updates, const Tensor& indices, const OptionalTensor& gates);

// Every index in [-1, m), else IndexError; for devices whose memory the host can read. Returns whether any is
// -1.
void check_indices(std::string_view op, const int64_t* indices, int64_t t, int64_t m);

// At most 2^31 - 1 kept tokens, since cu_seqlens is int32.
void check_kept(std::string_view op, int64_t t);

}  // namespace mhmatmul
