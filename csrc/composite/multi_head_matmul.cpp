// The flat form is views over head_matmul, so every device and every transform of head_matmul serves it.
#include "split_heads.h"

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

void register_composites(torch::Library& m) {
  m.impl("multi_head_matmul", multi_head_matmul_composite);
  m.impl("_multi_head_matmul_bias", multi_head_matmul_bias_composite);
  m.impl("_multi_head_matmul_out", multi_head_matmul_out_composite);
}

}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CompositeImplicitAutograd, m) { register_composites(m); }
// Without a rule of its own even a composite runs as a loop under vmap.
TORCH_LIBRARY_IMPL(mhmatmul, FuncTorchBatched, m) { register_composites(m); }

}  // namespace mhmatmul
