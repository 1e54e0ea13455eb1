// The head-wise products on CPU, over ATen's batched matmul: three uses of one GEMM, rows optionally named by
// index.
#pragma once

#include "../ops.h"

namespace mhmatmul::cpu {

// Rows [m, nh, hd], or those of them that `indices` names (nullptr: all, in order). Indices have been
// checked.
struct Rows {
  Tensor tensor;
  const int64_t* indices = nullptr;
  int64_t count = 0;
  bool any_padding = false;

  explicit Rows(const Tensor& dense) : tensor(dense), count(dense.size(0)) {}
  Rows(const Tensor& source, const Tensor& checked_indices, bool padding)
      : tensor(source),
        indices(checked_indices.const_data_ptr<int64_t>()),
        count(checked_indices.size(0)),
        any_padding(padding) {}
};

// output[r] = rows[r] weight + bias, rounded once; output [count, nh, e] with any strides; padding rows are
// zeros.
void forward(const Rows& rows, const Tensor& weight, const OptionalTensor& bias, const Tensor& output);

// grad_input [m, nh, hd] of `rows`' source: at each row the sum of grad_output[r] weight^T, in ascending r.
Tensor dgrad(const Tensor& grad_output, const Tensor& weight, const int64_t* indices, int64_t m);

// grad_weight [nh, hd, e]: the sum over r of rows[r]^T grad_output[r].
Tensor wgrad(const Tensor& grad_output, const Rows& rows);

// How half types are multiplied: "float32" converts blocks of rows and rounds at the store; "native" hands
// them to ATen as they are, which is faster on CPUs with half-precision instructions and 50-100 times slower
// on others.
const char* half_path();
bool set_half_path(const char* name);

}  // namespace mhmatmul::cpu
