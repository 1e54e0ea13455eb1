// Differentiating the gather family. With i = indices, rows r with i_r = -1 left out of every sum:
//
//   G: y_r = x[i_r] W + c                    gather_head_matmul(x, W, i, c)
//   S: x_j = sum over r with i_r = j of g_r W^T     _gather_head_matmul_dgrad(g, W, i, m)
//   K: W = sum over r of x[i_r]^T g_r        _gather_head_matmul_wgrad(g, x, i)
//
//   dG:  dx = S(dy, W, i),  dW = K(dy, x, i),  dc = sum over r of dy_r
//   dS, for z the gradient that reaches it:  dg = G(z, W, i),  dW = K(g, z, i)
//   dK, for z likewise:  dg = G(x, z, i),  dx = S(g, z, i)
//
// so the family is closed: every order of derivative uses the same kernels.
#include "formulas.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace mhmatmul {
namespace {

using formulas::kept_if;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// The gradients of input and weight that are asked for.
std::tuple<Tensor, Tensor> gradients(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input,
                                     const Tensor& weight, const Tensor& indices, bool distinct) {
  const bool of_input = ctx->needs_input_grad(0), of_weight = ctx->needs_input_grad(1);
  if (of_input && of_weight) return gather_head_matmul_backward(grad_output, input, weight, indices, distinct);
  if (of_input)
    return {gather_head_matmul_dgrad(grad_output, weight, indices, ctx->saved_data["m"].toSymInt(), distinct),
            Tensor()};
  if (of_weight) return {Tensor(), gather_head_matmul_wgrad(grad_output, input, indices)};
  return {};
}

struct GatherHeadMatmul : Function<GatherHeadMatmul> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const Tensor& indices,
                        const OptionalTensor& bias, bool distinct) {
    ctx->save_for_backward({kept_if(weight.requires_grad(), input), kept_if(input.requires_grad(), weight), indices});
    ctx->saved_data["m"] = input.sym_size(0);
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["distinct"] = distinct;
    at::AutoDispatchBelowADInplaceOrView below;
    return gather_head_matmul(input, weight, indices, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_output = grads[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor& indices = saved[2];
    const auto [grad_input, grad_weight] =
        gradients(ctx, grad_output, saved[0], saved[1], indices, ctx->saved_data["distinct"].toBool());
    Tensor grad_bias;
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3))
      grad_bias = grad_output.masked_fill(indices.lt(0).unsqueeze(-1).unsqueeze(-1), 0).sum(0);
    return {grad_input, grad_weight, Tensor(), grad_bias, Tensor()};
  }
};

// y, i = _importance_head_matmul(x, W, probs, ...): G with the indices that it found itself.
struct ImportanceHeadMatmul : Function<ImportanceHeadMatmul> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const Tensor& probs,
                               std::optional<double> top_p_value, const OptionalTensor& top_p,
                               const std::optional<SymInt>& top_k) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, indices, cu_seqlens] = importance_head_matmul(input, weight, probs, top_p_value, top_p, top_k);
    ctx->save_for_backward({kept_if(weight.requires_grad(), input), kept_if(input.requires_grad(), weight), indices});
    ctx->saved_data["m"] = input.sym_size(0);
    ctx->set_materialize_grads(false);  // none reaches the integers
    return {output, indices, cu_seqlens};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined()) return variable_list(6);
    const auto saved = ctx->get_saved_variables();
    const auto [grad_input, grad_weight] = gradients(ctx, grad_output, saved[0], saved[1], saved[2], /*distinct=*/true);
    return {grad_input, grad_weight, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct GatherHeadMatmulDgrad : Function<GatherHeadMatmulDgrad> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& weight, const Tensor& indices,
                        const SymInt& m, bool distinct) {
    ctx->save_for_backward(
        {kept_if(weight.requires_grad(), grad_output), kept_if(grad_output.requires_grad(), weight), indices});
    at::AutoDispatchBelowADInplaceOrView below;
    return gather_head_matmul_dgrad(grad_output, weight, indices, m, distinct);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& z = grads[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &weight = saved[1], &indices = saved[2];
    Tensor grad_grad_output, grad_weight;
    if (ctx->needs_input_grad(0)) grad_grad_output = gather_head_matmul(z, weight, indices, std::nullopt);
    if (ctx->needs_input_grad(1)) grad_weight = gather_head_matmul_wgrad(grad_output, z, indices);
    return {grad_grad_output, grad_weight, Tensor(), Tensor(), Tensor()};
  }
};

struct GatherHeadMatmulWgrad : Function<GatherHeadMatmulWgrad> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
    ctx->save_for_backward(
        {kept_if(input.requires_grad(), grad_output), kept_if(grad_output.requires_grad(), input), indices});
    ctx->saved_data["m"] = input.sym_size(0);
    at::AutoDispatchBelowADInplaceOrView below;
    return gather_head_matmul_wgrad(grad_output, input, indices);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& z = grads[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &input = saved[1], &indices = saved[2];
    Tensor grad_grad_output, grad_input;
    if (ctx->needs_input_grad(0)) grad_grad_output = gather_head_matmul(input, z, indices, std::nullopt);
    if (ctx->needs_input_grad(1))
      grad_input =
          gather_head_matmul_dgrad(grad_output, z, indices, ctx->saved_data["m"].toSymInt(), /*distinct=*/false);
    return {grad_grad_output, grad_input, Tensor()};
  }
};

Tensor gather_head_matmul_autograd(const Tensor& input, const Tensor& weight, const Tensor& indices,
                                   const OptionalTensor& bias) {
  if (formulas::needed(input, weight, bias)) return formulas::gather_head_matmul(input, weight, indices, bias);
  if (formulas::recorded(input, weight, bias)) return GatherHeadMatmul::apply(input, weight, indices, bias, false);
  at::AutoDispatchBelowADInplaceOrView below;
  return gather_head_matmul(input, weight, indices, bias);
}

Tensor gather_distinct_head_matmul_autograd(const Tensor& input, const Tensor& weight, const Tensor& indices) {
  if (!formulas::needed(input, weight) && formulas::recorded(input, weight))
    return GatherHeadMatmul::apply(input, weight, indices, std::nullopt, true);
  return gather_head_matmul(input, weight, indices, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> importance_head_matmul_autograd(const Tensor& input, const Tensor& weight,
                                                                   const Tensor& probs,
                                                                   std::optional<double> top_p_value,
                                                                   const OptionalTensor& top_p,
                                                                   std::optional<SymInt> top_k) {
  if (formulas::needed(input, weight))
    return formulas::importance_head_matmul(input, weight, probs, top_p_value, top_p, std::move(top_k));
  if (formulas::recorded(input, weight)) {
    const auto results = ImportanceHeadMatmul::apply(input, weight, probs, top_p_value, top_p, top_k);
    return {results[0], results[1], results[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return importance_head_matmul(input, weight, probs, top_p_value, top_p, std::move(top_k));
}

Tensor gather_head_matmul_dgrad_autograd(const Tensor& grad_output, const Tensor& weight, const Tensor& indices,
                                         SymInt m, bool distinct) {
  if (formulas::needed(grad_output, weight))
    return formulas::gather_head_matmul_dgrad(grad_output, weight, indices, std::move(m), distinct);
  if (formulas::recorded(grad_output, weight))
    return GatherHeadMatmulDgrad::apply(grad_output, weight, indices, m, distinct);
  at::AutoDispatchBelowADInplaceOrView below;
  return gather_head_matmul_dgrad(grad_output, weight, indices, std::move(m), distinct);
}

Tensor gather_head_matmul_wgrad_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
  if (formulas::needed(grad_output, input)) return formulas::gather_head_matmul_wgrad(grad_output, input, indices);
  if (formulas::recorded(grad_output, input)) return GatherHeadMatmulWgrad::apply(grad_output, input, indices);
  at::AutoDispatchBelowADInplaceOrView below;
  return gather_head_matmul_wgrad(grad_output, input, indices);
}

std::tuple<Tensor, Tensor> gather_head_matmul_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                                                const Tensor& weight, const Tensor& indices,
                                                                bool distinct) {
  if (formulas::needed(grad_output, input, weight))
    return formulas::gather_head_matmul_backward(grad_output, input, weight, indices, distinct);
  if (formulas::recorded(grad_output, input, weight))
    return {gather_head_matmul_dgrad(grad_output, weight, indices, input.sym_size(0), distinct),
            gather_head_matmul_wgrad(grad_output, input, indices)};
  at::AutoDispatchBelowADInplaceOrView below;
  return gather_head_matmul_backward(grad_output, input, weight, indices, distinct);
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, Autograd, m) {
  m.impl("gather_head_matmul", gather_head_matmul_autograd);
  m.impl("_gather_distinct_head_matmul", gather_distinct_head_matmul_autograd);
  m.impl("_importance_head_matmul", importance_head_matmul_autograd);
  m.impl("_gather_head_matmul_dgrad", gather_head_matmul_dgrad_autograd);
  m.impl("_gather_head_matmul_wgrad", gather_head_matmul_wgrad_autograd);
  m.impl("_gather_head_matmul_backward", gather_head_matmul_backward_autograd);
}

TORCH_LIBRARY_IMPL(mhmatmul, FuncTorchBatched, m) {
  m.impl("gather_head_matmul", formulas::gather_head_matmul);
  m.impl("_gather_distinct_head_matmul", formulas::gather_distinct_head_matmul);
  m.impl("_importance_head_matmul", formulas::importance_head_matmul);
  m.impl("_gather_head_matmul_dgrad", formulas::gather_head_matmul_dgrad);
  m.impl("_gather_head_matmul_wgrad", formulas::gather_head_matmul_wgrad);
  m.impl("_gather_head_matmul_backward", formulas::gather_head_matmul_backward);
}

}  // namespace mhmatmul
