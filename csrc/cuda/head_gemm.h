// The head-wise products on CUDA: tensors in, strides read off them, one launch for all heads, by cuBLAS or by the
// kernels for Hopper (gemm_sm90.h, tf32_sm90.h).
#pragma once

#include "../ops.h"

namespace mhmatmul::cuda {

// output[r] = rows[r] weight + bias: rows [M, nh, hd], weight [nh, hd, e], output [M, nh, e] with stride 1 in
// the last dimension, of the rows' dtype or float32.
void forward(const Tensor& rows, const Tensor& weight, const OptionalTensor& bias, const Tensor& output);

// The same with row indices[r] of rows [m, nh, hd] in place of row r, int64 [t], side by side; where it names none, the
// output's row is zero, bias or not. The rows are copied only where the kernel for Hopper is not taken.
void gather_forward(const Tensor& rows, const Tensor& weight, const Tensor& indices, const OptionalTensor& bias,
                    const Tensor& output);

// The same without a copy, where the kernel for Hopper takes it; else nothing is done, and false is returned. Given
// `rows_given`, one int32 on the device, only so many rows of the output are there; the others are left or overwritten.
bool gather_forward_in_flight(const Tensor& rows, const Tensor& weight, const Tensor& indices,
                              const OptionalTensor& bias, const Tensor& output, const Tensor& rows_given = {});

// to[r] = rows[indices[r]], zeros where the index names no row: `to` [t, nh, x], contiguous.
void gather(const Tensor& rows, const Tensor& indices, const Tensor& to);

// grad_weight [nh, hd, e], contiguous: the sum over r of rows[r]^T grad_output[r].
void wgrad(const Tensor& grad_output, const Tensor& rows, const Tensor& grad_weight);

// The same with row indices[r] of rows [m, nh, hd] in place of row r, int64 [t], side by side; where it names none,
// whatever grad_output's row holds counts for nothing. Both are copied only where the kernel for Hopper is not taken.
void gather_wgrad(const Tensor& grad_output, const Tensor& rows, const Tensor& indices, const Tensor& grad_weight);

// Both gradients in one pass over grad_output, where the kernel for Hopper takes it; else nothing is done, and false is
// returned. grad_output [t, nh, e], weight [nh, hd, e], grad_weight [nh, hd, e] contiguous; rows [t, nh, hd] and
// grad_input of that shape, contiguous. Given indices, int64 [t] side by side, distinct but for those that name no row,
// rows and grad_input are [m, nh, hd], row indices[r] stands for row r, and rows of grad_input that none names are
// left.
bool backward_in_one_pass(const Tensor& grad_output, const Tensor& rows, const Tensor& weight, const Tensor& indices,
                          const Tensor& grad_input, const Tensor& grad_weight);

}  // namespace mhmatmul::cuda
