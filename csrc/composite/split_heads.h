// The flat form's operands as views by head.
#pragma once

#include "../checks.h"

namespace mhmatmul {

// [..., h] -> [..., nh, hd]
inline Tensor split_input(const Tensor& input, const HeadSizes& sizes) {
  auto shape = input.sym_sizes().vec();
  shape.back() = sizes.nh;
  shape.push_back(sizes.hd);
  return input.view_symint(shape);
}

// [h, e] -> [nh, hd, e]
inline Tensor split_weight(const Tensor& weight, const HeadSizes& sizes) {
  return weight.view_symint({sizes.nh, sizes.hd, sizes.e});
}

}  // namespace mhmatmul
