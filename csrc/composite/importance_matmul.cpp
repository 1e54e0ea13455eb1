// Importance matmul = selection, then the gathered matmul of the selected rows.
#include "split_heads.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

namespace mhmatmul {
namespace {

constexpr std::string_view kName = "matmul_with_importance";

// [b, s, h] -> [b * s, nh, hd]
Tensor rows_of(const Tensor& input, const HeadSizes& sizes) {
  return input.reshape_symint({input.sym_size(0) * input.sym_size(1), sizes.nh, sizes.hd});
}

// The product [t, nh, e], or [b * capacity, nh, e], and the selection.
std::tuple<Tensor, Tensor, Tensor> multiply_selected(const Tensor& rows, const Tensor& heads, const Tensor& probs,
                                                     const Tensor& top_p, const std::optional<SymInt>& top_k,
                                                     const std::optional<SymInt>& capacity) {
  if (!capacity) return importance_head_matmul(rows, heads, probs, std::nullopt, top_p, top_k);
  const auto [indices, counts] = select_important_static(probs, top_p, top_k, *capacity);
  return {gather_distinct_head_matmul(rows, heads, indices.reshape({-1})), indices, counts};
}

std::tuple<Tensor, Tensor, Tensor> importance_matmul_composite(const Tensor& input, const Tensor& weight,
                                                               const Tensor& probs, SymInt num_heads, double top_p,
                                                               std::optional<SymInt> top_k) {
  const auto sizes = check_importance_matmul(kName, input, weight, probs, num_heads);
  check_select(kName, probs, top_p, std::nullopt, top_k);
  return importance_head_matmul(rows_of(input, sizes), split_weight(weight, sizes), probs, top_p, std::nullopt, top_k);
}

std::tuple<Tensor, Tensor, Tensor> importance_matmul_tensor_composite(const Tensor& input, const Tensor& weight,
                                                                      const Tensor& probs, SymInt num_heads,
                                                                      const Tensor& top_p, std::optional<SymInt> top_k,
                                                                      std::optional<SymInt> capacity) {
  const auto sizes = check_importance_matmul(kName, input, weight, probs, num_heads);
  check_select(kName, probs, std::nullopt, top_p, top_k, capacity);
  auto [output, indices, offsets] =
      multiply_selected(rows_of(input, sizes), split_weight(weight, sizes), probs, top_p, top_k, capacity);
  if (capacity) output = output.unflatten_symint(0, {input.sym_size(0), *capacity});
  return {output, indices, offsets};
}

// The selection is returned as well: under tracing its size is a symbol of its own, which a result
// has to carry.
std::tuple<Tensor, Tensor, Tensor, Tensor> importance_matmul_grads_composite(
    const Tensor& input, const Tensor& weight, const Tensor& probs, const Tensor& grad_output, SymInt num_heads,
    const Tensor& top_p, std::optional<SymInt> top_k, std::optional<SymInt> capacity) {
  const auto sizes = check_importance_matmul(kName, input, weight, probs, num_heads);
  check_select(kName, probs, std::nullopt, top_p, top_k, capacity);
  check_importance_grad(kName, grad_output, input, capacity.has_value(), sizes, {});

  at::NoGradGuard no_grad;
  const Tensor rows = rows_of(input, sizes), heads = split_weight(weight, sizes);
  auto [output, indices, offsets] = multiply_selected(rows, heads, probs, top_p, top_k, capacity);
  check_importance_grad(kName, grad_output, input, capacity.has_value(), sizes, indices.sym_sizes());

  const Tensor flat_indices = indices.reshape({-1});
  auto [grad_input, grad_weight] = gather_head_matmul_backward(
      grad_output.reshape_symint({flat_indices.sym_size(0), sizes.nh, sizes.e}), rows, heads, flat_indices,
      /*distinct=*/true);
  if (capacity) output = output.unflatten_symint(0, {input.sym_size(0), *capacity});
  return {output, grad_input.view_symint(input.sym_sizes()), grad_weight.view_symint(weight.sym_sizes()), indices};
}

Tensor gather_distinct_head_matmul_composite(const Tensor& input, const Tensor& weight, const Tensor& indices) {
  return gather_head_matmul(input, weight, indices, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> importance_head_matmul_composite(const Tensor& input, const Tensor& weight,
                                                                    const Tensor& probs,
                                                                    std::optional<double> top_p_value,
                                                                    const OptionalTensor& top_p,
                                                                    std::optional<SymInt> top_k) {
  check_importance_head_matmul(kName, input, weight, probs, top_p_value, top_p, top_k);
  const auto [indices, cu_seqlens] =
      top_p ? select_important_tensor(probs, *top_p, top_k) : select_important(probs, *top_p_value, top_k);
  return {gather_distinct_head_matmul(input, weight, indices), indices, cu_seqlens};
}

Tensor threshold(std::string_view op, const Tensor& probs, double top_p) {
  check_select(op, probs, top_p, std::nullopt, std::nullopt);
  // A number stays on the host, where the kernels read it without a launch; in a traced graph one tensor of another
  // device would keep the whole from being captured.
  const bool is_traced = probs.key_set().has(c10::DispatchKey::Python);
  return at::scalar_tensor(top_p, is_traced ? probs.options() : probs.options().device(at::kCPU));
}

void register_composites(torch::Library& m) {
  m.impl("importance_matmul", importance_matmul_composite);
  m.impl("_importance_matmul_tensor", importance_matmul_tensor_composite);
  m.impl("_importance_matmul_grads", importance_matmul_grads_composite);
  m.impl("_threshold", threshold);
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CompositeImplicitAutograd, m) { register_composites(m); }
// Without a rule of its own even a composite runs as a loop under vmap.
TORCH_LIBRARY_IMPL(mhmatmul, FuncTorchBatched, m) { register_composites(m); }

// Their backward differs (autograd/gather_head_matmul.cpp); here they are the same product.
TORCH_LIBRARY_IMPL(mhmatmul, CompositeExplicitAutograd, m) {
  m.impl("_gather_distinct_head_matmul", gather_distinct_head_matmul_composite);
  m.impl("_importance_head_matmul", importance_head_matmul_composite);
}

}  // namespace mhmatmul
