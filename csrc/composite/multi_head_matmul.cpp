// The flat form is views over head_matmul, so every device and every transform of head_matmul serves it.
#include "split_heads.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace mhmatmul {
namespace {

constexpr std::string_view kName = "matmul_with_multi_head";

Tensor multi_head_matmul_composite(const Tensor& input, const Tensor& weight, SymInt num_heads) {
  const auto sizes = check_multi_head_matmul(kName, input, weight, num_heads);
  return head_matmul(split_input(input, sizes), split_weight(weight, sizes), std::nullopt);
}

Tensor multi_head_matmul_bias_composite(const Tensor& input, const Tensor& weight, SymInt num_heads,
                                        const Tensor& bias) {
  const auto sizes = check_multi_head_matmul(kName, input, weight, num_heads, bias);
  return head_matmul(split_input(input, sizes), split_weight(weight, sizes), bias);
}

void multi_head_matmul_out_composite(const Tensor& input, const Tensor& weight, SymInt num_heads,
                                     const OptionalTensor& bias, Tensor& out) {
  const auto sizes = check_multi_head_matmul(kName, input, weight, num_heads, bias, out);
  head_matmul_out(split_input(input, sizes), split_weight(weight, sizes), bias, out);
}

// Of tensors that are negated lazily (`imag` of a conjugate) torch's own fallback makes plain ones, but it takes for
// granted that an operator returns what it writes to.
void head_matmul_out_negated(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Tensor& out) {
  check_head_matmul("head_matmul", input, weight, bias, std::nullopt, out);
  Tensor plain = out.is_neg() ? at::empty(out.sizes(), out.options()) : out;
  const OptionalTensor plain_bias = bias ? OptionalTensor(bias->resolve_neg()) : std::nullopt;
  head_matmul_out(input.resolve_neg(), weight.resolve_neg(), plain_bias, plain);
  if (!plain.is_same(out)) out.copy_(plain);
}

void register_composites(torch::Library& m) {
  m.impl("multi_head_matmul", multi_head_matmul_composite);
  m.impl("_multi_head_matmul_bias", multi_head_matmul_bias_composite);
  m.impl("_multi_head_matmul_out", multi_head_matmul_out_composite);
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CompositeImplicitAutograd, m) { register_composites(m); }
TORCH_LIBRARY_IMPL(mhmatmul, Negative, m) {
  m.impl("_head_matmul_out", head_matmul_out_negated);
  m.impl("_multi_head_matmul_out", torch::CppFunction::makeFallthrough());
}
// Without a rule of its own even a composite runs as a loop under vmap.
TORCH_LIBRARY_IMPL(mhmatmul, FuncTorchBatched, m) { register_composites(m); }

}  // namespace mhmatmul
