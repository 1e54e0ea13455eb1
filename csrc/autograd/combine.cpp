// Differentiating combine. With i = indices, rows r with i_r = -1 left out of every sum:
//
//   C: y_j = x_j + sum over r with i_r = j of g_r u_r     combine(x, u, i, g)
//   U: u_r = g_r z[i_r]                                   _combine_updates_grad(z, i, g)
//   D: g_r = z[i_r] . u_r                                 _combine_gates_grad(z, u, i)
//
//   dC:  dx = dy,  du = U(dy, i, g),  dg = D(dy, u, i)
//   dU, for w the gradient that reaches it:  dz = C(0, w, i, g),  dg = D(z, w, i)
//   dD, for v likewise:  dz = C(0, u, i, v),  du = U(z, i, v)
//
// so the family is closed: every order of derivative uses the same kernels.
#include "../checks.h"
#include "formulas.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace mhmatmul {
namespace {

using formulas::kept_if;
using formulas::requires_grad;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

std::vector<SymInt> sizes_of(AutogradContext* ctx) { return ctx->saved_data["sizes"].toSymIntVector(); }

OptionalTensor if_defined(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

struct Combine : Function<Combine> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static Tensor forward(AutogradContext* ctx, const Tensor& base, const Tensor& updates, const Tensor& indices,
                        const OptionalTensor& gates) {
    ctx->save_for_backward(
        {kept_if(requires_grad(gates), updates), indices, kept_if(requires_grad(updates), gates.value_or(Tensor()))});
    at::AutoDispatchBelowADInplaceOrView below;
    return combine(base, updates, indices, gates);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_output = grads[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &updates = saved[0], &indices = saved[1], &gates = saved[2];
    Tensor grad_base, grad_updates, grad_gates;
    if (ctx->needs_input_grad(0)) grad_base = grad_output;
    if (ctx->needs_input_grad(1)) grad_updates = combine_updates_grad(grad_output, indices, if_defined(gates));
    if (updates.defined()) grad_gates = combine_gates_grad(grad_output, updates, indices);
    return {grad_base, grad_updates, Tensor(), grad_gates};
  }
};

struct CombineUpdatesGrad : Function<CombineUpdatesGrad> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& indices,
                        const OptionalTensor& gates) {
    ctx->save_for_backward({kept_if(requires_grad(gates), grad_output), indices,
                            kept_if(requires_grad(grad_output), gates.value_or(Tensor()))});
    ctx->saved_data["sizes"] = grad_output.sym_sizes();
    at::AutoDispatchBelowADInplaceOrView below;
    return combine_updates_grad(grad_output, indices, gates);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& w = grads[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &indices = saved[1], &gates = saved[2];
    Tensor grad_grad_output, grad_gates;
    if (ctx->needs_input_grad(0))
      grad_grad_output = combine(w.new_zeros_symint(sizes_of(ctx)), w, indices, if_defined(gates));
    if (grad_output.defined()) grad_gates = combine_gates_grad(grad_output, w, indices);
    return {grad_grad_output, Tensor(), grad_gates};
  }
};

struct CombineGatesGrad : Function<CombineGatesGrad> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& updates, const Tensor& indices) {
    ctx->save_for_backward(
        {kept_if(updates.requires_grad(), grad_output), kept_if(grad_output.requires_grad(), updates), indices});
    ctx->saved_data["sizes"] = grad_output.sym_sizes();
    at::AutoDispatchBelowADInplaceOrView below;
    return combine_gates_grad(grad_output, updates, indices);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& v = grads[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_output = saved[0], &updates = saved[1], &indices = saved[2];
    Tensor grad_grad_output, grad_updates;
    if (ctx->needs_input_grad(0)) grad_grad_output = combine(v.new_zeros_symint(sizes_of(ctx)), updates, indices, v);
    if (ctx->needs_input_grad(1)) grad_updates = combine_updates_grad(grad_output, indices, v);
    return {grad_grad_output, grad_updates, Tensor()};
  }
};

Tensor combine_autograd(const Tensor& base, const Tensor& updates, const Tensor& indices, const OptionalTensor& gates) {
  if (formulas::needed(base, updates, gates)) {
    check_combine("combine", "base", base, updates, indices, gates);
    return formulas::combine(base, updates, indices, gates);
  }
  if (formulas::recorded(base, updates, gates)) return Combine::apply(base, updates, indices, gates);
  at::AutoDispatchBelowADInplaceOrView below;
  return combine(base, updates, indices, gates);
}

Tensor combine_updates_grad_autograd(const Tensor& grad_output, const Tensor& indices, const OptionalTensor& gates) {
  if (formulas::needed(grad_output, gates)) return formulas::combine_updates_grad(grad_output, indices, gates);
  if (formulas::recorded(grad_output, gates)) return CombineUpdatesGrad::apply(grad_output, indices, gates);
  at::AutoDispatchBelowADInplaceOrView below;
  return combine_updates_grad(grad_output, indices, gates);
}

Tensor combine_gates_grad_autograd(const Tensor& grad_output, const Tensor& updates, const Tensor& indices) {
  if (formulas::needed(grad_output, updates)) return formulas::combine_gates_grad(grad_output, updates, indices);
  if (formulas::recorded(grad_output, updates)) return CombineGatesGrad::apply(grad_output, updates, indices);
  at::AutoDispatchBelowADInplaceOrView below;
  return combine_gates_grad(grad_output, updates, indices);
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, Autograd, m) {
  m.impl("combine", combine_autograd);
  m.impl("_combine_updates_grad", combine_updates_grad_autograd);
  m.impl("_combine_gates_grad", combine_gates_grad_autograd);
}

TORCH_LIBRARY_IMPL(mhmatmul, FuncTorchBatched, m) {
  m.impl("combine", formulas::combine);
  m.impl("_combine_updates_grad", formulas::combine_updates_grad);
  m.impl("_combine_gates_grad", formulas::combine_gates_grad);
}

}  // namespace mhmatmul
