// From a tensor's dtype to the Dtype of the kernels that move rows.
#pragma once

#include "rows.h"

#include <ATen/core/Tensor.h>

namespace mhmatmul::cuda {

inline Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      TORCH_INTERNAL_ASSERT(false, "an operand of dtype ", tensor.scalar_type(), " passed the checks");
  }
}

}  // namespace mhmatmul::cuda
