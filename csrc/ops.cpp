// Every operator, one sentence each. Folders hold their kernels by dispatch key: cpu/, cuda/, autograd/ (with
// functorch and autocast), composite/ (made of other operators, the same for every device).
#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace mhmatmul {

TORCH_LIBRARY(mhmatmul, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> data_dependent{at::Tag::pt2_compliant_tag, at::Tag::dynamic_output_shape,
                                            at::Tag::cudagraph_unsafe};

  // Each head's rows by its own matrix: [..., nh, hd], [nh, hd, e], bias [nh, e] -> [..., nh, e].
  m.def("head_matmul(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", tags);
  // The same, written to `out`, whose last stride is 1. Given by place: torch.compile refuses strided tensors that are
  // named `out=`.
  m.def("_head_matmul_out(Tensor input, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()", tags);
  // Gradient of head_matmul's weight: the sum over rows of input^T grad_output, [nh, hd, e].
  m.def("_head_matmul_wgrad(Tensor grad_output, Tensor input) -> Tensor", tags);
  // Gradients of head_matmul's input and weight together.
  m.def(
      "_head_matmul_backward(Tensor grad_output, Tensor input, Tensor weight) -> "
      "(Tensor grad_input, Tensor grad_weight)",
      tags);

  // head_matmul over flat operands: [..., h], [h, e] -> [..., nh, e].
  m.def("multi_head_matmul(Tensor input, Tensor weight, SymInt num_heads) -> Tensor", tags);
  // The same with a bias [nh, e].
  m.def("_multi_head_matmul_bias(Tensor input, Tensor weight, SymInt num_heads, Tensor bias) -> Tensor", tags);
  // The same, written to `out`.
  m.def(
      "_multi_head_matmul_out(Tensor input, Tensor weight, SymInt num_heads, Tensor? bias, "
      "Tensor(a!) out) -> ()",
      tags);

  // Flat positions i*s + j of the tokens with probs >= top_p among their sequence's top_k highest, [t], and
  // where each sequence's begin, [b + 1].
  m.def(
      "select_important(Tensor probs, float top_p=1.0, SymInt? top_k=None) -> "
      "(Tensor indices, Tensor cu_seqlens)",
      data_dependent);
  // The same with a 0-d tensor as threshold.
  m.def(
      "_select_important_tensor(Tensor probs, Tensor top_p, SymInt? top_k) -> "
      "(Tensor indices, Tensor cu_seqlens)",
      data_dependent);
  // The same in a fixed size: indices [b, capacity] padded with -1, and how many each sequence would keep,
  // [b].
  m.def(
      "select_important_static(Tensor probs, Tensor top_p, SymInt? top_k, SymInt capacity) -> "
      "(Tensor indices, Tensor counts)",
      tags);

  // head_matmul of the rows of input [m, nh, hd] named by indices [t]; -1 names a row of zeros in the output.
  m.def("gather_head_matmul(Tensor input, Tensor weight, Tensor indices, Tensor? bias=None) -> Tensor", tags);
  // The same for indices of which none but -1 comes twice, as a selection gives them: its backward relies on it.
  m.def("_gather_distinct_head_matmul(Tensor input, Tensor weight, Tensor indices) -> Tensor", tags);
  // Gradient of its input, [m, nh, hd]; repeated indices add up in order, rows not named are zero. `distinct`: none but
  // -1 is repeated.
  m.def(
      "_gather_head_matmul_dgrad(Tensor grad_output, Tensor weight, Tensor indices, SymInt m, bool distinct=False) -> "
      "Tensor",
      tags);
  // Gradient of its weight, [nh, hd, e].
  m.def("_gather_head_matmul_wgrad(Tensor grad_output, Tensor input, Tensor indices) -> Tensor", tags);
  // Both together.
  m.def(
      "_gather_head_matmul_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor indices, "
      "bool distinct=False) -> "
      "(Tensor grad_input, Tensor grad_weight)",
      tags);

  // Selection and _gather_distinct_head_matmul of what it keeps, as one operator, so that the product need not wait
  // until the host knows how many are kept: [b * s, nh, hd], [nh, hd, e], [b, s] -> [t, nh, e] and the selection. The
  // threshold is a number or a 0-d tensor.
  m.def(
      "_importance_head_matmul(Tensor input, Tensor weight, Tensor probs, float? top_p_value, Tensor? top_p, "
      "SymInt? top_k) -> (Tensor output, Tensor indices, Tensor cu_seqlens)",
      data_dependent);

  // base [b, s, d] or [m, d] with gates[r] * updates[r] added at flat row indices[r]: updates [t, d], gates [t]; -1
  // adds nothing, repeated indices add up in order.
  m.def("combine(Tensor base, Tensor updates, Tensor indices, Tensor? gates=None) -> Tensor", tags);
  // Gradient of its updates: gates[r] * grad_output[indices[r]], [t, d], zeros for -1.
  m.def("_combine_updates_grad(Tensor grad_output, Tensor indices, Tensor? gates) -> Tensor", tags);
  // Gradient of its gates: grad_output[indices[r]] . updates[r], [t], zero for -1.
  m.def("_combine_gates_grad(Tensor grad_output, Tensor updates, Tensor indices) -> Tensor", tags);

  // multi_head_matmul of the selected tokens: [b, s, h], [h, e], [b, s] -> [t, nh, e] and the selection.
  m.def(
      "importance_matmul(Tensor input, Tensor weight, Tensor probs, SymInt num_heads, float top_p=1.0, "
      "SymInt? top_k=None) -> (Tensor output, Tensor indices, Tensor cu_seqlens)",
      data_dependent);
  // The same with a 0-d tensor as threshold and, given a capacity, over the static selection ([b, capacity,
  // nh, e]).
  m.def(
      "_importance_matmul_tensor(Tensor input, Tensor weight, Tensor probs, SymInt num_heads, Tensor top_p, "
      "SymInt? top_k, SymInt? capacity) -> (Tensor output, Tensor indices, Tensor offsets)",
      data_dependent);
  // The same with the gradients of input and weight for a given grad_output; nothing here is differentiable.
  m.def(
      "_importance_matmul_grads(Tensor input, Tensor weight, Tensor probs, Tensor grad_output, SymInt "
      "num_heads, "
      "Tensor top_p, SymInt? top_k, SymInt? capacity) -> "
      "(Tensor output, Tensor grad_input, Tensor grad_weight, Tensor indices)",
      data_dependent);

  // A checked threshold as a 0-d tensor of the dtype and device of probs; `op` names the caller in errors.
  m.def("_threshold(str op, Tensor probs, float top_p) -> Tensor", tags);
  // The checks alone (checks.h), for the fake kernels.
  m.def(
      "_check_head_matmul(str op, Tensor input, Tensor weight, Tensor? bias=None, Tensor? indices=None, "
      "Tensor? out=None) -> ()",
      tags);
  m.def(
      "_check_head_matmul_backward(str op, Tensor grad_output, Tensor? input=None, Tensor? weight=None, "
      "Tensor? indices=None, SymInt? m=None) -> ()",
      tags);
  m.def(
      "_check_select(str op, Tensor probs, float? top_p_value, Tensor? top_p, SymInt? top_k, "
      "SymInt? capacity=None) -> ()",
      tags);
  m.def(
      "_check_importance_head_matmul(str op, Tensor input, Tensor weight, Tensor probs, float? top_p_value, "
      "Tensor? top_p, SymInt? top_k) -> ()",
      tags);
  m.def("_check_combine(str op, str rows_name, Tensor rows, Tensor? updates, Tensor indices, Tensor? gates=None) -> ()",
        tags);
}

namespace {
template <class Signature>
auto typed(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
}  // namespace

Tensor head_matmul(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  static const auto op = typed<decltype(head_matmul)>("mhmatmul::head_matmul");
  return op.call(input, weight, bias);
}

void head_matmul_out(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Tensor& out) {
  static const auto op = typed<decltype(head_matmul_out)>("mhmatmul::_head_matmul_out");
  op.call(input, weight, bias, out);
}

Tensor head_matmul_wgrad(const Tensor& grad_output, const Tensor& input) {
  static const auto op = typed<decltype(head_matmul_wgrad)>("mhmatmul::_head_matmul_wgrad");
  return op.call(grad_output, input);
}

std::tuple<Tensor, Tensor> head_matmul_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
  static const auto op = typed<decltype(head_matmul_backward)>("mhmatmul::_head_matmul_backward");
  return op.call(grad_output, input, weight);
}

Tensor multi_head_matmul(const Tensor& input, const Tensor& weight, SymInt num_heads) {
  static const auto op = typed<decltype(multi_head_matmul)>("mhmatmul::multi_head_matmul");
  return op.call(input, weight, std::move(num_heads));
}

Tensor multi_head_matmul_bias(const Tensor& input, const Tensor& weight, SymInt num_heads, const Tensor& bias) {
  static const auto op = typed<decltype(multi_head_matmul_bias)>("mhmatmul::_multi_head_matmul_bias");
  return op.call(input, weight, std::move(num_heads), bias);
}

void multi_head_matmul_out(const Tensor& input, const Tensor& weight, SymInt num_heads, const OptionalTensor& bias,
                           Tensor& out) {
  static const auto op = typed<decltype(multi_head_matmul_out)>("mhmatmul::_multi_head_matmul_out");
  op.call(input, weight, std::move(num_heads), bias, out);
}

std::tuple<Tensor, Tensor> select_important(const Tensor& probs, double top_p, std::optional<SymInt> top_k) {
  static const auto op = typed<decltype(select_important)>("mhmatmul::select_important");
  return op.call(probs, top_p, std::move(top_k));
}

std::tuple<Tensor, Tensor> select_important_tensor(const Tensor& probs, const Tensor& top_p,
                                                   std::optional<SymInt> top_k) {
  static const auto op = typed<decltype(select_important_tensor)>("mhmatmul::_select_important_tensor");
  return op.call(probs, top_p, std::move(top_k));
}

std::tuple<Tensor, Tensor> select_important_static(const Tensor& probs, const Tensor& top_p,
                                                   std::optional<SymInt> top_k, SymInt capacity) {
  static const auto op = typed<decltype(select_important_static)>("mhmatmul::select_important_static");
  return op.call(probs, top_p, std::move(top_k), std::move(capacity));
}

Tensor gather_head_matmul(const Tensor& input, const Tensor& weight, const Tensor& indices,
                          const OptionalTensor& bias) {
  static const auto op = typed<decltype(gather_head_matmul)>("mhmatmul::gather_head_matmul");
  return op.call(input, weight, indices, bias);
}

Tensor gather_distinct_head_matmul(const Tensor& input, const Tensor& weight, const Tensor& indices) {
  static const auto op = typed<decltype(gather_distinct_head_matmul)>("mhmatmul::_gather_distinct_head_matmul");
  return op.call(input, weight, indices);
}

Tensor gather_head_matmul_dgrad(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, SymInt m,
                                bool distinct) {
  static const auto op = typed<decltype(gather_head_matmul_dgrad)>("mhmatmul::_gather_head_matmul_dgrad");
  return op.call(grad_output, weight, indices, std::move(m), distinct);
}

Tensor gather_head_matmul_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
  static const auto op = typed<decltype(gather_head_matmul_wgrad)>("mhmatmul::_gather_head_matmul_wgrad");
  return op.call(grad_output, input, indices);
}

std::tuple<Tensor, Tensor> gather_head_matmul_backward(const Tensor& grad_output, const Tensor& input,
                                                       const Tensor& weight, const Tensor& indices, bool distinct) {
  static const auto op = typed<decltype(gather_head_matmul_backward)>("mhmatmul::_gather_head_matmul_backward");
  return op.call(grad_output, input, weight, indices, distinct);
}

std::tuple<Tensor, Tensor, Tensor> importance_head_matmul(const Tensor& input, const Tensor& weight,
                                                          const Tensor& probs, std::optional<double> top_p_value,
                                                          const OptionalTensor& top_p, std::optional<SymInt> top_k) {
  static const auto op = typed<decltype(importance_head_matmul)>("mhmatmul::_importance_head_matmul");
  return op.call(input, weight, probs, top_p_value, top_p, std::move(top_k));
}

Tensor combine(const Tensor& base, const Tensor& updates, const Tensor& indices, const OptionalTensor& gates) {
  static const auto op = typed<decltype(combine)>("mhmatmul::combine");
  return op.call(base, updates, indices, gates);
}

Tensor combine_updates_grad(const Tensor& grad_output, const Tensor& indices, const OptionalTensor& gates) {
  static const auto op = typed<decltype(combine_updates_grad)>("mhmatmul::_combine_updates_grad");
  return op.call(grad_output, indices, gates);
}

Tensor combine_gates_grad(const Tensor& grad_output, const Tensor& updates, const Tensor& indices) {
  static const auto op = typed<decltype(combine_gates_grad)>("mhmatmul::_combine_gates_grad");
  return op.call(grad_output, updates, indices);
}

std::tuple<Tensor, Tensor, Tensor> importance_matmul(const Tensor& input, const Tensor& weight, const Tensor& probs,
                                                     SymInt num_heads, double top_p, std::optional<SymInt> top_k) {
  static const auto op = typed<decltype(importance_matmul)>("mhmatmul::importance_matmul");
  return op.call(input, weight, probs, std::move(num_heads), top_p, std::move(top_k));
}

std::tuple<Tensor, Tensor, Tensor> importance_matmul_tensor(const Tensor& input, const Tensor& weight,
                                                            const Tensor& probs, SymInt num_heads, const Tensor& top_p,
                                                            std::optional<SymInt> top_k,
                                                            std::optional<SymInt> capacity) {
  static const auto op = typed<decltype(importance_matmul_tensor)>("mhmatmul::_importance_matmul_tensor");
  return op.call(input, weight, probs, std::move(num_heads), top_p, std::move(top_k), std::move(capacity));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> importance_matmul_grads(const Tensor& input, const Tensor& weight,
                                                                   const Tensor& probs, const Tensor& grad_output,
                                                                   SymInt num_heads, const Tensor& top_p,
                                                                   std::optional<SymInt> top_k,
                                                                   std::optional<SymInt> capacity) {
  static const auto op = typed<decltype(importance_matmul_grads)>("mhmatmul::_importance_matmul_grads");
  return op.call(input, weight, probs, grad_output, std::move(num_heads), top_p, std::move(top_k), std::move(capacity));
}

}  // namespace mhmatmul
