#include "formulas.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/zeros.h>

#include <vector>

namespace mhmatmul::formulas {
namespace {

// [..., nh, x] -> [nh, rows, x]
Tensor heads_first(const Tensor& tensor) {
  SymInt rows = 1;
  for (const auto& size : tensor.sym_sizes().slice(0, tensor.dim() - 2)) rows = rows * size;
  return tensor.reshape_symint({rows, tensor.sym_size(-2), tensor.sym_size(-1)}).transpose(0, 1);
}

// Rows whose index is -1, as [t, 1, 1] to mask rows [t, nh, x].
Tensor is_padding(const Tensor& indices) { return indices.lt(0).unsqueeze(-1).unsqueeze(-1); }

// Rows of input by index, zeros for -1.
Tensor gather(const Tensor& input, const Tensor& indices) {
  if (input.sym_size(0) == 0)
    return input.new_zeros_symint({indices.sym_size(0), input.sym_size(1), input.sym_size(2)});
  return input.index_select(0, indices.clamp_min(0)).masked_fill(is_padding(indices), 0);
}

// [b, s, d] -> [b * s, d]
Tensor as_rows(const Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  return tensor.reshape_symint({tensor.sym_size(0) * tensor.sym_size(1), tensor.sym_size(2)});
}

// Flat rows of [b, s, d] or [m, d] by index, zeros for -1.
Tensor gather_rows(const Tensor& tensor, const Tensor& indices) {
  return gather(as_rows(tensor).unsqueeze(1), indices).squeeze(1);
}

}  // namespace

Tensor head_matmul(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  Tensor output = at::bmm(heads_first(input), weight);
  if (bias) output = output.add(bias->unsqueeze(1));
  std::vector<SymInt> sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.back() = weight.sym_size(2);
  return output.transpose(0, 1).reshape_symint(sizes);
}

Tensor head_matmul_wgrad(const Tensor& grad_output, const Tensor& input) {
  return at::bmm(heads_first(input).transpose(1, 2), heads_first(grad_output));
}

std::tuple<Tensor, Tensor> head_matmul_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
  return {head_matmul(grad_output, weight.transpose(1, 2), std::nullopt), head_matmul_wgrad(grad_output, input)};
}

Tensor gather_head_matmul(const Tensor& input, const Tensor& weight, const Tensor& indices,
                          const OptionalTensor& bias) {
  return head_matmul(gather(input, indices), weight, bias).masked_fill(is_padding(indices), 0);
}

Tensor gather_distinct_head_matmul(const Tensor& input, const Tensor& weight, const Tensor& indices) {
  return gather_head_matmul(input, weight, indices, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> importance_head_matmul(const Tensor& input, const Tensor& weight,
                                                          const Tensor& probs, std::optional<double> top_p_value,
                                                          const OptionalTensor& top_p, std::optional<SymInt> top_k) {
  const auto [indices, cu_seqlens] = top_p ? select_important_tensor(probs, *top_p, std::move(top_k))
                                           : select_important(probs, top_p_value.value(), std::move(top_k));
  return {gather_distinct_head_matmul(input, weight, indices), indices, cu_seqlens};
}

Tensor gather_head_matmul_dgrad(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, SymInt m,
                                bool distinct) {
  const Tensor rows = head_matmul(grad_output.masked_fill(is_padding(indices), 0), weight.transpose(1, 2), std::nullopt)
                          .masked_fill(is_padding(indices), 0);
  const auto sum_dtype = at::toOpMathType(rows.scalar_type());
  const Tensor zeros = at::zeros_symint({m, rows.sym_size(1), rows.sym_size(2)}, rows.options().dtype(sum_dtype));
  if (m == 0) return zeros.to(rows.scalar_type());
  return zeros.index_add(0, indices.clamp_min(0), rows.to(sum_dtype)).to(rows.scalar_type());
}

Tensor gather_head_matmul_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
  return head_matmul_wgrad(grad_output.masked_fill(is_padding(indices), 0), gather(input, indices));
}

std::tuple<Tensor, Tensor> gather_head_matmul_backward(const Tensor& grad_output, const Tensor& input,
                                                       const Tensor& weight, const Tensor& indices, bool distinct) {
  return {gather_head_matmul_dgrad(grad_output, weight, indices, input.sym_size(0), distinct),
          gather_head_matmul_wgrad(grad_output, input, indices)};
}

Tensor combine(const Tensor& base, const Tensor& updates, const Tensor& indices, const OptionalTensor& gates) {
  const Tensor rows = as_rows(base);
  if (rows.sym_size(0) == 0) return base.clone();
  const auto sum_dtype = at::toOpMathType(base.scalar_type());
  const Tensor is_padding = indices.lt(0);
  Tensor added = updates.to(sum_dtype).masked_fill(is_padding.unsqueeze(-1), 0);
  // Both factors are masked: masked after the product, a NaN in padding would come back in the other's gradient.
  if (gates) added = added.mul(gates->to(sum_dtype).masked_fill(is_padding, 0).unsqueeze(-1));
  return rows.to(sum_dtype)
      .index_add(0, indices.clamp_min(0), added)
      .to(base.scalar_type())
      .reshape_symint(base.sym_sizes());
}

Tensor combine_updates_grad(const Tensor& grad_output, const Tensor& indices, const OptionalTensor& gates) {
  const Tensor rows = gather_rows(grad_output, indices);
  return gates ? rows.mul(gates->unsqueeze(-1)).masked_fill(indices.lt(0).unsqueeze(-1), 0) : rows;
}

Tensor combine_gates_grad(const Tensor& grad_output, const Tensor& updates, const Tensor& indices) {
  const auto sum_dtype = at::toOpMathType(updates.scalar_type());
  return gather_rows(grad_output, indices)
      .to(sum_dtype)
      .mul(updates.to(sum_dtype))
      .sum(-1)
      .masked_fill(indices.lt(0), 0)
      .to(updates.scalar_type());
}

}  // namespace mhmatmul::formulas
