// The head-wise products on CPU: tensors in, strides read off them, tasks shared out among torch's threads.
#pragma once

#include "../ops.h"

namespace mhmatmul::cpu {

// An output's memory. A large one is advised to huge pages before the threads that fill it touch it first.
Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options);

// output[r] = rows[i_r] weight + bias, rounded once. rows [m, nh, hd], weight [nh, hd, e], output [count, nh, e] with
// stride 1 in the last dimension. `indices` (checked, contiguous) name the rows, -1 a row of zeros; nullptr: all rows.
void forward(const Tensor& rows, const int64_t* indices, const Tensor& weight, const OptionalTensor& bias,
             const Tensor& output);

// grad_input [m, nh, hd]: at row j the sum over r with indices[r] = j of grad_output[r] weight^T, in ascending r.
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, const Tensor& indices, int64_t m);

// grad_weight [nh, hd, e]: the sum over r of rows[i_r]^T grad_output[r].
Tensor wgrad(const Tensor& grad_output, const Tensor& rows, const int64_t* indices);

}  // namespace mhmatmul::cpu
