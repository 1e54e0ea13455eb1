// Inside torch.autocast the operands are cast to the region's dtype; probs and thresholds never are, since a
// rounded score may change sides. Gradient operators and the `out` forms take their operands as they come, as
// PyTorch's do.
#include "../ops.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace mhmatmul {
namespace {

// Calls `op` below autocast, so that no kernel's inner ATen call is cast a second time.
template <auto op>
struct Below;
template <class Result, class... Args, Result (*op)(Args...)>
struct Below<op> {
  static Result call(Args... args) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return op(std::forward<Args>(args)...);
  }
};

template <c10::DeviceType device>
Tensor cast(const Tensor& tensor) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}
template <c10::DeviceType device>
OptionalTensor cast(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(cast<device>(*tensor)) : tensor;
}

template <c10::DeviceType device>
Tensor head_matmul_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return Below<head_matmul>::call(cast<device>(input), cast<device>(weight), cast<device>(bias));
}

template <c10::DeviceType device>
Tensor gather_head_matmul_autocast(const Tensor& input, const Tensor& weight, const Tensor& indices,
                                   const OptionalTensor& bias) {
  return Below<gather_head_matmul>::call(cast<device>(input), cast<device>(weight), indices, cast<device>(bias));
}

template <c10::DeviceType device>
Tensor gather_distinct_head_matmul_autocast(const Tensor& input, const Tensor& weight, const Tensor& indices) {
  return Below<gather_distinct_head_matmul>::call(cast<device>(input), cast<device>(weight), indices);
}

template <c10::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> importance_head_matmul_autocast(const Tensor& input, const Tensor& weight,
                                                                   const Tensor& probs,
                                                                   std::optional<double> top_p_value,
                                                                   const OptionalTensor& top_p,
                                                                   std::optional<SymInt> top_k) {
  return Below<importance_head_matmul>::call(cast<device>(input), cast<device>(weight), probs, top_p_value, top_p,
                                             std::move(top_k));
}

template <c10::DeviceType device>
Tensor multi_head_matmul_autocast(const Tensor& input, const Tensor& weight, SymInt num_heads) {
  return Below<multi_head_matmul>::call(cast<device>(input), cast<device>(weight), std::move(num_heads));
}

template <c10::DeviceType device>
Tensor multi_head_matmul_bias_autocast(const Tensor& input, const Tensor& weight, SymInt num_heads,
                                       const Tensor& bias) {
  return Below<multi_head_matmul_bias>::call(cast<device>(input), cast<device>(weight), std::move(num_heads),
                                             cast<device>(bias));
}

template <c10::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> importance_matmul_autocast(const Tensor& input, const Tensor& weight,
                                                              const Tensor& probs, SymInt num_heads, double top_p,
                                                              std::optional<SymInt> top_k) {
  return Below<importance_matmul>::call(cast<device>(input), cast<device>(weight), probs, std::move(num_heads), top_p,
                                        std::move(top_k));
}

template <c10::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> importance_matmul_tensor_autocast(const Tensor& input, const Tensor& weight,
                                                                     const Tensor& probs, SymInt num_heads,
                                                                     const Tensor& top_p, std::optional<SymInt> top_k,
                                                                     std::optional<SymInt> capacity) {
  return Below<importance_matmul_tensor>::call(cast<device>(input), cast<device>(weight), probs, std::move(num_heads),
                                               top_p, std::move(top_k), std::move(capacity));
}

// The widest floating dtype among the operands, as PyTorch's scatter_add: a residual stream keeps its precision.
template <c10::DeviceType device>
Tensor combine_autocast(const Tensor& base, const Tensor& updates, const Tensor& indices, const OptionalTensor& gates) {
  const auto is_operand = [](const Tensor& tensor) { return tensor.defined() && tensor.is_floating_point(); };
  std::optional<at::ScalarType> widest;
  for (const Tensor& operand : {base, updates, gates.value_or(Tensor())})
    if (is_operand(operand))
      widest = widest ? c10::promoteTypes(*widest, operand.scalar_type()) : operand.scalar_type();
  const auto widened = [&](const Tensor& tensor) { return is_operand(tensor) ? tensor.to(*widest) : tensor; };
  return Below<combine>::call(widened(base), widened(updates), indices,
                              gates ? OptionalTensor(widened(*gates)) : gates);
}

// The gradients come back in the dtypes that the operands had outside the region, as autograd would give
// them.
template <c10::DeviceType device>
std::tuple<Tensor, Tensor, Tensor, Tensor> importance_matmul_grads_autocast(
    const Tensor& input, const Tensor& weight, const Tensor& probs, const Tensor& grad_output, SymInt num_heads,
    const Tensor& top_p, std::optional<SymInt> top_k, std::optional<SymInt> capacity) {
  auto [output, grad_input, grad_weight, indices] =
      Below<importance_matmul_grads>::call(cast<device>(input), cast<device>(weight), probs, cast<device>(grad_output),
                                           std::move(num_heads), top_p, std::move(top_k), std::move(capacity));
  return {output, grad_input.to(input.scalar_type()), grad_weight.to(weight.scalar_type()), indices};
}

template <c10::DeviceType device>
void register_autocast(torch::Library& m) {
  m.impl("head_matmul", head_matmul_autocast<device>);
  m.impl("gather_head_matmul", gather_head_matmul_autocast<device>);
  m.impl("_gather_distinct_head_matmul", gather_distinct_head_matmul_autocast<device>);
  m.impl("_importance_head_matmul", importance_head_matmul_autocast<device>);
  m.impl("multi_head_matmul", multi_head_matmul_autocast<device>);
  m.impl("_multi_head_matmul_bias", multi_head_matmul_bias_autocast<device>);
  m.impl("importance_matmul", importance_matmul_autocast<device>);
  m.impl("_importance_matmul_tensor", importance_matmul_tensor_autocast<device>);
  m.impl("_importance_matmul_grads", importance_matmul_grads_autocast<device>);
  m.impl("_head_matmul_out", Below<head_matmul_out>::call);
  m.impl("_multi_head_matmul_out", Below<multi_head_matmul_out>::call);
  m.impl("_head_matmul_wgrad", Below<head_matmul_wgrad>::call);
  m.impl("_head_matmul_backward", Below<head_matmul_backward>::call);
  m.impl("combine", combine_autocast<device>);
  m.impl("_combine_updates_grad", Below<combine_updates_grad>::call);
  m.impl("_combine_gates_grad", Below<combine_gates_grad>::call);
  m.impl("_gather_head_matmul_dgrad", Below<gather_head_matmul_dgrad>::call);
  m.impl("_gather_head_matmul_wgrad", Below<gather_head_matmul_wgrad>::call);
  m.impl("_gather_head_matmul_backward", Below<gather_head_matmul_backward>::call);
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, AutocastCPU, m) { register_autocast<c10::DeviceType::CPU>(m); }
TORCH_LIBRARY_IMPL(mhmatmul, AutocastCUDA, m) { register_autocast<c10::DeviceType::CUDA>(m); }

}  // namespace mhmatmul
