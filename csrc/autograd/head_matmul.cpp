// Differentiating the dense family.
//
//   y = x W + c                           x [..., nh, hd], W [nh, hd, e], c [nh, e]
//   dx = dy W^T                           head_matmul(dy, W^T)
//   dW = sum over rows of x^T dy          _head_matmul_wgrad(dy, x)
//   dc = sum over rows of dy
//
// and wgrad is bilinear in turn, for G the gradient that reaches it:
//   d(dy) = x G,  dx = dy G^T             both head_matmul
// so the family is closed: every order of derivative uses the same kernels.
#include "formulas.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <numeric>
#include <vector>

namespace mhmatmul {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Tensor sum_rows(const Tensor& grad_output) {
  std::vector<int64_t> leading(grad_output.dim() - 2);
  std::iota(leading.begin(), leading.end(), 0);
  return leading.empty() ? grad_output : grad_output.sum(leading);
}

struct HeadMatmul : Function<HeadMatmul> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
    ctx->save_for_backward(
        {formulas::kept_if(weight.requires_grad(), input), formulas::kept_if(input.requires_grad(), weight)});
    ctx->saved_data["has_bias"] = bias.has_value();
    at::AutoDispatchBelowADInplaceOrView below;
    return head_matmul(input, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_output = grads[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1];
    Tensor grad_input, grad_weight, grad_bias;
    if (ctx->needs_input_grad(0) && ctx->needs_input_grad(1)) {
      std::tie(grad_input, grad_weight) = head_matmul_backward(grad_output, input, weight);
    } else if (ctx->needs_input_grad(0)) {
      grad_input = head_matmul(grad_output, weight.transpose(1, 2), std::nullopt);
    } else if (ctx->needs_input_grad(1)) {
      grad_weight = head_matmul_wgrad(grad_output, input);
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)) grad_bias = sum_rows(grad_output);
    return {grad_input, grad_weight, grad_bias};
  }
};

struct HeadMatmulWgrad : Function<HeadMatmulWgrad> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input) {
    ctx->save_for_backward(
        {formulas::kept_if(input.requires_grad(), grad_output), formulas::kept_if(grad_output.requires_grad(), input)});
    at::AutoDispatchBelowADInplaceOrView below;
    return head_matmul_wgrad(grad_output, input);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& g = grads[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &input = saved[1];
    Tensor grad_grad_output, grad_input;
    if (ctx->needs_input_grad(0)) grad_grad_output = head_matmul(input, g, std::nullopt);
    if (ctx->needs_input_grad(1)) grad_input = head_matmul(grad_output, g.transpose(1, 2), std::nullopt);
    return {grad_grad_output, grad_input};
  }
};

Tensor head_matmul_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  if (formulas::needed(input, weight, bias)) return formulas::head_matmul(input, weight, bias);
  if (formulas::recorded(input, weight, bias)) return HeadMatmul::apply(input, weight, bias);
  at::AutoDispatchBelowADInplaceOrView below;
  return head_matmul(input, weight, bias);
}

Tensor head_matmul_wgrad_autograd(const Tensor& grad_output, const Tensor& input) {
  if (formulas::needed(grad_output, input)) return formulas::head_matmul_wgrad(grad_output, input);
  if (formulas::recorded(grad_output, input)) return HeadMatmulWgrad::apply(grad_output, input);
  at::AutoDispatchBelowADInplaceOrView below;
  return head_matmul_wgrad(grad_output, input);
}

std::tuple<Tensor, Tensor> head_matmul_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                                         const Tensor& weight) {
  if (formulas::needed(grad_output, input, weight)) return formulas::head_matmul_backward(grad_output, input, weight);
  if (formulas::recorded(grad_output, input, weight))
    return {head_matmul(grad_output, weight.transpose(1, 2), std::nullopt), head_matmul_wgrad(grad_output, input)};
  at::AutoDispatchBelowADInplaceOrView below;
  return head_matmul_backward(grad_output, input, weight);
}

constexpr const char* kOutUnderTransform =
    "matmul_with_multi_head: out= is not supported under torch.func transforms and forward-mode AD";

void head_matmul_out_refused(const Tensor&, const Tensor&, const OptionalTensor&, Tensor&) {
  TORCH_CHECK(false, kOutUnderTransform);
}

void head_matmul_out_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Tensor& out) {
  TORCH_CHECK(!formulas::recorded(input, weight, bias) && !(at::GradMode::is_enabled() && out.requires_grad()),
              "matmul_with_multi_head: out= is not differentiable, but an operand requires grad; "
              "call it under torch.no_grad() or without out=");
  TORCH_CHECK(!formulas::needed(input, weight, bias), kOutUnderTransform);
  at::AutoDispatchBelowAutograd below;
  head_matmul_out(input, weight, bias, out);
}

// Not in the kernel above: inference mode leaves that out, and a graph recorded outside may have saved `out`.
void head_matmul_out_versioned(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Tensor& out) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    head_matmul_out(input, weight, bias, out);
  }
  torch::autograd::impl::bump_version(out);
}

void register_formulas(torch::Library& m) {
  m.impl("head_matmul", formulas::head_matmul);
  m.impl("_head_matmul_out", head_matmul_out_refused);
  m.impl("_head_matmul_wgrad", formulas::head_matmul_wgrad);
  m.impl("_head_matmul_backward", formulas::head_matmul_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, Autograd, m) {
  m.impl("head_matmul", head_matmul_autograd);
  m.impl("_head_matmul_out", head_matmul_out_autograd);
  m.impl("_head_matmul_wgrad", head_matmul_wgrad_autograd);
  m.impl("_head_matmul_backward", head_matmul_backward_autograd);
}

TORCH_LIBRARY_IMPL(mhmatmul, ADInplaceOrView, m) { m.impl("_head_matmul_out", head_matmul_out_versioned); }
TORCH_LIBRARY_IMPL(mhmatmul, FuncTorchBatched, m) { register_formulas(m); }
TORCH_LIBRARY_IMPL(mhmatmul, Batched, m) { register_formulas(m); }  // torch.autograd.grad(is_grads_batched=True)

}  // namespace mhmatmul
