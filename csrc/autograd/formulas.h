// The operators written in differentiable ATen, for the modes that a C++ autograd::Function cannot serve:
// functorch transforms (grad, vmap, jvp, ...) and forward-mode AD.
#pragma once

#include "../ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace mhmatmul::formulas {

Tensor head_matmul(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
Tensor head_matmul_wgrad(const Tensor& grad_output, const Tensor& input);
std::tuple<Tensor, Tensor> head_matmul_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight);
Tensor gather_head_matmul(const Tensor& input, const Tensor& weight, const Tensor& indices, const OptionalTensor& bias);
Tensor gather_distinct_head_matmul(const Tensor& input, const Tensor& weight, const Tensor& indices);
std::tuple<Tensor, Tensor, Tensor> importance_head_matmul(const Tensor& input, const Tensor& weight,
                                                          const Tensor& probs, std::optional<double> top_p_value,
                                                          const OptionalTensor& top_p, std::optional<SymInt> top_k);
Tensor gather_head_matmul_dgrad(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, SymInt m,
                                bool distinct);
Tensor gather_head_matmul_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& indices);
std::tuple<Tensor, Tensor> gather_head_matmul_backward(const Tensor& grad_output, const Tensor& input,
                                                       const Tensor& weight, const Tensor& indices, bool distinct);

Tensor combine(const Tensor& base, const Tensor& updates, const Tensor& indices, const OptionalTensor& gates);
Tensor combine_updates_grad(const Tensor& grad_output, const Tensor& indices, const OptionalTensor& gates);
Tensor combine_gates_grad(const Tensor& grad_output, const Tensor& updates, const Tensor& indices);

inline bool has_tangent(const Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); }

inline bool requires_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool requires_grad(const OptionalTensor& tensor) { return tensor && requires_grad(*tensor); }

// Whether a call on these operands must go through the formulas above.
template <class... Tensors>
bool needed(const Tensors&... tensors) {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) || (has_tangent(tensors) || ...);
}

// Whether a call on these operands must be recorded for reverse mode.
template <class... Tensors>
bool recorded(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

// What to save for backward: only what a gradient that is asked for will read.
inline Tensor kept_if(bool needed, const Tensor& tensor) { return needed ? tensor : Tensor(); }

}  // namespace mhmatmul::formulas
