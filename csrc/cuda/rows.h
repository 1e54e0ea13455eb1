// Launchers of the kernels that move rows by index. No Tensor: pointers, sizes in elements, on the stream
// given. An index outside [0, m), -1 above all, names no row: it reads as zeros and adds nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mhmatmul::cuda {

// to[r, :] = from[indices[r], :]; rows of `width` elements of `element_size` bytes, `from_stride` apart in
// `from`.
void gather_rows(const void* from, int64_t from_stride, const int64_t* indices, int64_t t, int64_t m, int64_t width,
                 int64_t element_size, void* to, cudaStream_t stream);

// to[r, :] = from[r, :], zeros where indices[r] names no row.
void mask_rows(const void* from, int64_t from_stride, const int64_t* indices, int64_t t, int64_t m, int64_t width,
               int64_t element_size, void* to, int64_t to_stride, cudaStream_t stream);

// to[r, :] = zeros where indices[r] names no row; rows of `width` elements side by side. The others are not touched.
void zero_rows(const int64_t* indices, int64_t t, int64_t m, int64_t width, int64_t element_size, void* to,
               cudaStream_t stream);

// to[j] = the place of j among indices, of which none in [0, m) comes twice; -1 where there is none.
void invert(const int64_t* indices, int64_t t, int64_t m, int64_t* to, cudaStream_t stream);

enum class Dtype { kFloat64, kFloat32, kFloat16, kBFloat16 };

// to[j, :] = the sum of from[order[p], :] over the places p with sorted[p] = j, in that order, rounded once
// to `dtype`; zeros where there is none. `sorted` ascends; `from` holds `width` float32 per row (float64 for
// kFloat64).
void sum_rows(const void* from, const int64_t* sorted, const int64_t* order, int64_t t, int64_t m, int64_t width,
              Dtype dtype, void* to, cudaStream_t stream);

// to[j, :] = base[j, :] + the sum of gates[order[p]] * updates[order[p], :] over the places p with sorted[p] = j, in
// that order, in float32 (float64), rounded once to `dtype`. All of `dtype`, rows of `width` side by side; no gates: 1.
void combine_rows(const void* base, const void* updates, const void* gates, const int64_t* sorted, const int64_t* order,
                  int64_t t, int64_t m, int64_t width, Dtype dtype, void* to, cudaStream_t stream);

// to[r, :] = gates[r] * from[indices[r], :], likewise.
void scale_rows(const void* from, const int64_t* indices, const void* gates, int64_t t, int64_t m, int64_t width,
                Dtype dtype, void* to, cudaStream_t stream);

// to[r] = from[indices[r], :] . updates[r, :], likewise.
void dot_rows(const void* from, const int64_t* indices, const void* updates, int64_t t, int64_t m, int64_t width,
              Dtype dtype, void* to, cudaStream_t stream);

}  // namespace mhmatmul::cuda
