// The head-wise products on CUDA: tensors in, strides read off them, one cuBLAS call for all heads.
#pragma once

#include "../ops.h"

namespace mhmatmul::cuda {

// output[r] = rows[r] weight + bias: rows [M, nh, hd], weight [nh, hd, e], output [M, nh, e] with stride 1 in
// the last dimension, of the rows' dtype or float32.
void forward(const Tensor& rows, const Tensor& weight, const OptionalTensor& bias, const Tensor& output);

// grad_weight [nh, hd, e]: the sum over r of rows[r]^T grad_output[r].
Tensor wgrad(const Tensor& grad_output, const Tensor& rows);

}  // namespace mhmatmul::cuda
