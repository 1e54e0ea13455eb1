// The operators, called from C++ through the dispatcher. Schemas and their meaning: ops.cpp.
// Sizes by letter: b sequences, s positions, h hidden, nh heads, hd = h / nh, e embed, t (kept) rows, m rows, d width.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <tuple>

namespace mhmatmul {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

Tensor head_matmul(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
void head_matmul_out(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Tensor& out);
Tensor head_matmul_wgrad(const Tensor& grad_output, const Tensor& input);
std::tuple<Tensor, Tensor> head_matmul_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight);

Tensor multi_head_matmul(const Tensor& input, const Tensor& weight, SymInt num_heads);
Tensor multi_head_matmul_bias(const Tensor& input, const Tensor& weight, SymInt num_heads, const Tensor& bias);
void multi_head_matmul_out(const Tensor& input, const Tensor& weight, SymInt num_heads, const OptionalTensor& bias,
                           Tensor& out);

std::tuple<Tensor, Tensor> select_important(const Tensor& probs, double top_p, std::optional<SymInt> top_k);
std::tuple<Tensor, Tensor> select_important_tensor(const Tensor& probs, const Tensor& top_p,
                                                   std::optional<SymInt> top_k);
std::tuple<Tensor, Tensor> select_important_static(const Tensor& probs, const Tensor& top_p,
                                                   std::optional<SymInt> top_k, SymInt capacity);

Tensor gather_head_matmul(const Tensor& input, const Tensor& weight, const Tensor& indices, const OptionalTensor& bias);
Tensor gather_distinct_head_matmul(const Tensor& input, const Tensor& weight, const Tensor& indices);
Tensor gather_head_matmul_dgrad(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, SymInt m,
                                bool distinct);
Tensor gather_head_matmul_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& indices);
std::tuple<Tensor, Tensor> gather_head_matmul_backward(const Tensor& grad_output, const Tensor& input,
                                                       const Tensor& weight, const Tensor& indices, bool distinct);

std::tuple<Tensor, Tensor, Tensor> importance_head_matmul(const Tensor& input, const Tensor& weight,
                                                          const Tensor& probs, std::optional<double> top_p_value,
                                                          const OptionalTensor& top_p, std::optional<SymInt> top_k);

Tensor combine(const Tensor& base, const Tensor& updates, const Tensor& indices, const OptionalTensor& gates);
Tensor combine_updates_grad(const Tensor& grad_output, const Tensor& indices, const OptionalTensor& gates);
Tensor combine_gates_grad(const Tensor& grad_output, const Tensor& updates, const Tensor& indices);

std::tuple<Tensor, Tensor, Tensor> importance_matmul(const Tensor& input, const Tensor& weight, const Tensor& probs,
                                                     SymInt num_heads, double top_p, std::optional<SymInt> top_k);
std::tuple<Tensor, Tensor, Tensor> importance_matmul_tensor(const Tensor& input, const Tensor& weight,
                                                            const Tensor& probs, SymInt num_heads, const Tensor& top_p,
                                                            std::optional<SymInt> top_k,
                                                            std::optional<SymInt> capacity);
std::tuple<Tensor, Tensor, Tensor, Tensor> importance_matmul_grads(const Tensor& input, const Tensor& weight,
                                                                   const Tensor& probs, const Tensor& grad_output,
                                                                   SymInt num_heads, const Tensor& top_p,
                                                                   std::optional<SymInt> top_k,
                                                                   std::optional<SymInt> capacity);

}  // namespace mhmatmul
