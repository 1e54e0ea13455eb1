// What every backend's binding does before its kernels see an operand.
#pragma once

#include "ops.h"

#include <ATen/MemoryOverlap.h>

namespace mhmatmul {

// [..., nh, x] -> [rows, nh, x]; a view wherever the leading dimensions collapse.
inline Tensor flatten_rows(const Tensor& tensor) {
  return tensor.dim() == 2 ? tensor.unsqueeze(0) : tensor.flatten(0, -3);
}

// A storage may have been emptied under its tensor, as sharding does between uses: that is an error to tell, in the
// words of PyTorch's products, not an address to read.
inline const Tensor& allocated(const Tensor& tensor) {
  TORCH_CHECK(tensor.unsafeGetTensorImpl()->storage_initialized(),
              "The tensor has a non-zero number of elements, but its data is not allocated yet.");
  return tensor;
}

// `out` may share memory neither with an operand nor with itself.
inline void check_no_overlap(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& out) {
  at::assert_no_internal_overlap(out);
  at::assert_no_overlap(out, input);
  at::assert_no_overlap(out, weight);
  if (bias) at::assert_no_overlap(out, *bias);
}

}  // namespace mhmatmul
