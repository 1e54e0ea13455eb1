// One warp per row, all kernels; lanes run along the row, in the widest words that its size and address
// allow.
#include "rows.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

namespace mhmatmul::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;

dim3 block_shape() { return dim3(kWarp, kRowsPerBlock); }
// Blocks stride over the rows, so their number only has to fill the chip.
unsigned int blocks_for(int64_t rows) {
  return static_cast<unsigned int>(std::min<int64_t>((rows + kRowsPerBlock - 1) / kRowsPerBlock, 1 << 16));
}

__device__ int64_t first_row() { return int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.y; }
__device__ int64_t row_step() { return int64_t{gridDim.x} * kRowsPerBlock; }

// to[r] = from[by_index ? indices[r] : r], zeros where indices[r] names no row.
template <class Word, bool by_index>
__global__ void copy_rows_kernel(const Word* from, int64_t from_stride, const int64_t* indices, int64_t t, int64_t m,
                                 int64_t width, Word* to, int64_t to_stride) {
  for (int64_t r = first_row(); r < t; r += row_step()) {
    const int64_t index = indices[r];
    const bool names_row = index >= 0 && index < m;
    const Word* const source = from + (by_index ? index : r) * from_stride;
    for (int64_t c = threadIdx.x; c < width; c += kWarp) to[r * to_stride + c] = names_row ? source[c] : Word{};
  }
}

template <bool by_index>
void copy_rows(const void* from, int64_t from_stride, const int64_t* indices, int64_t t, int64_t m, int64_t width,
               int64_t element_size, void* to, int64_t to_stride, cudaStream_t stream) {
  if (t == 0 || width == 0) return;
  const auto bits = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) |
                    static_cast<uintptr_t>((from_stride | to_stride | width) * element_size);
  const auto launch = [&](auto word) {
    using Word = decltype(word);
    const int64_t per_word = sizeof(Word);
    copy_rows_kernel<Word, by_index><<<blocks_for(t), block_shape(), 0, stream>>>(
        static_cast<const Word*>(from), from_stride * element_size / per_word, indices, t, m,
        width * element_size / per_word, static_cast<Word*>(to), to_stride * element_size / per_word);
  };
  if (bits % sizeof(uint4) == 0) {
    launch(uint4{});
  } else if (bits % sizeof(uint2) == 0) {
    launch(uint2{});
  } else if (bits % sizeof(uint32_t) == 0) {
    launch(uint32_t{});
  } else {
    launch(uint16_t{});
  }
}

// to[r] = zeros where indices[r] names no row; the others are not touched.
template <class Word>
__global__ void zero_rows_kernel(const int64_t* indices, int64_t t, int64_t m, int64_t width, Word* to) {
  for (int64_t r = first_row(); r < t; r += row_step()) {
    const int64_t index = indices[r];
    if (index >= 0 && index < m) continue;
    for (int64_t c = threadIdx.x; c < width; c += kWarp) to[r * width + c] = Word{};
  }
}

__global__ void invert_kernel(const int64_t* indices, int64_t t, int64_t m, int64_t* to) {
  for (int64_t r = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; r < t; r += int64_t{gridDim.x} * blockDim.x)
    if (indices[r] >= 0 && indices[r] < m) to[indices[r]] = r;
}

// The first place whose value is not below `value`.
__device__ int64_t lower_bound(const int64_t* sorted, int64_t t, int64_t value) {
  int64_t low = 0, high = t;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sorted[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ void store(double value, double* to) { *to = value; }
__device__ void store(float value, float* to) { *to = value; }
__device__ void store(float value, __half* to) { *to = __float2half_rn(value); }
__device__ void store(float value, __nv_bfloat16* to) { *to = __float2bfloat16_rn(value); }

__device__ double load(const double* from) { return *from; }
__device__ float load(const float* from) { return *from; }
__device__ float load(const __half* from) { return __half2float(*from); }
__device__ float load(const __nv_bfloat16* from) { return __bfloat162float(*from); }

template <class Element>
using SumOf = decltype(load(static_cast<const Element*>(nullptr)));

template <class Sum, class Element>
__global__ void sum_rows_kernel(const Sum* from, const int64_t* sorted, const int64_t* order, int64_t t, int64_t m,
                                int64_t width, Element* to) {
  for (int64_t j = first_row(); j < m; j += row_step()) {
    const int64_t begin = lower_bound(sorted, t, j);
    for (int64_t c = threadIdx.x; c < width; c += kWarp) {
      Sum sum = 0;
      for (int64_t p = begin; p < t && sorted[p] == j; ++p) sum += from[order[p] * width + c];
      store(sum, to + j * width + c);
    }
  }
}

template <class Element>
__global__ void combine_rows_kernel(const Element* base, const Element* updates, const Element* gates,
                                    const int64_t* sorted, const int64_t* order, int64_t t, int64_t m, int64_t width,
                                    Element* to) {
  for (int64_t j = first_row(); j < m; j += row_step()) {
    const int64_t begin = lower_bound(sorted, t, j);
    for (int64_t c = threadIdx.x; c < width; c += kWarp) {
      SumOf<Element> sum = load(base + j * width + c);
      for (int64_t p = begin; p < t && sorted[p] == j; ++p) {
        const SumOf<Element> update = load(updates + order[p] * width + c);
        sum += gates ? load(gates + order[p]) * update : update;
      }
      store(sum, to + j * width + c);
    }
  }
}

template <class Element>
__global__ void scale_rows_kernel(const Element* from, const int64_t* indices, const Element* gates, int64_t t,
                                  int64_t m, int64_t width, Element* to) {
  for (int64_t r = first_row(); r < t; r += row_step()) {
    const int64_t index = indices[r];
    const bool names_row = index >= 0 && index < m;
    for (int64_t c = threadIdx.x; c < width; c += kWarp) {
      SumOf<Element> value = 0;
      if (names_row) value = load(from + index * width + c);
      if (names_row && gates) value *= load(gates + r);
      store(value, to + r * width + c);
    }
  }
}

// Each lane sums every 32nd product; the lanes' sums are added in a fixed tree, so the bits do not vary.
template <class Element>
__global__ void dot_rows_kernel(const Element* from, const int64_t* indices, const Element* updates, int64_t t,
                                int64_t m, int64_t width, Element* to) {
  for (int64_t r = first_row(); r < t; r += row_step()) {
    const int64_t index = indices[r];
    SumOf<Element> sum = 0;
    if (index >= 0 && index < m)
      for (int64_t c = threadIdx.x; c < width; c += kWarp)
        sum += load(from + index * width + c) * load(updates + r * width + c);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(0xFFFFFFFF, sum, offset);
    if (threadIdx.x == 0) store(sum, to + r);
  }
}

// Calls `launch` with a null pointer to the element type.
template <class Launch>
void with_element(Dtype dtype, const Launch& launch) {
  switch (dtype) {
    case Dtype::kFloat64:
      return launch(static_cast<double*>(nullptr));
    case Dtype::kFloat32:
      return launch(static_cast<float*>(nullptr));
    case Dtype::kFloat16:
      return launch(static_cast<__half*>(nullptr));
    case Dtype::kBFloat16:
      return launch(static_cast<__nv_bfloat16*>(nullptr));
  }
}

}  // namespace

void gather_rows(const void* from, int64_t from_stride, const int64_t* indices, int64_t t, int64_t m, int64_t width,
                 int64_t element_size, void* to, cudaStream_t stream) {
  copy_rows<true>(from, from_stride, indices, t, m, width, element_size, to, width, stream);
}

void mask_rows(const void* from, int64_t from_stride, const int64_t* indices, int64_t t, int64_t m, int64_t width,
               int64_t element_size, void* to, int64_t to_stride, cudaStream_t stream) {
  copy_rows<false>(from, from_stride, indices, t, m, width, element_size, to, to_stride, stream);
}

void zero_rows(const int64_t* indices, int64_t t, int64_t m, int64_t width, int64_t element_size, void* to,
               cudaStream_t stream) {
  if (t == 0 || width == 0) return;
  const int64_t bytes = width * element_size;
  const auto launch = [&](auto word) {
    using Word = decltype(word);
    zero_rows_kernel<<<blocks_for(t), block_shape(), 0, stream>>>(
        indices, t, m, bytes / static_cast<int64_t>(sizeof(Word)), static_cast<Word*>(to));
  };
  if ((reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(bytes)) % sizeof(uint4) == 0) {
    launch(uint4{});
  } else {
    launch(uint16_t{});
  }
}

void invert(const int64_t* indices, int64_t t, int64_t m, int64_t* to, cudaStream_t stream) {
  if (m == 0) return;
  cudaMemsetAsync(to, 0xFF, m * sizeof(int64_t), stream);  // every place -1; an error is the launch's, seen after it
  constexpr int kThreads = 256;
  if (t > 0)
    invert_kernel<<<static_cast<unsigned int>(std::min<int64_t>((t + kThreads - 1) / kThreads, 1 << 16)), kThreads, 0,
                    stream>>>(indices, t, m, to);
}

void sum_rows(const void* from, const int64_t* sorted, const int64_t* order, int64_t t, int64_t m, int64_t width,
              Dtype dtype, void* to, cudaStream_t stream) {
  if (m == 0 || width == 0) return;
  const auto launch = [&](const auto* sums, auto* elements) {
    sum_rows_kernel<<<blocks_for(m), block_shape(), 0, stream>>>(sums, sorted, order, t, m, width, elements);
  };
  switch (dtype) {
    case Dtype::kFloat64:
      return launch(static_cast<const double*>(from), static_cast<double*>(to));
    case Dtype::kFloat32:
      return launch(static_cast<const float*>(from), static_cast<float*>(to));
    case Dtype::kFloat16:
      return launch(static_cast<const float*>(from), static_cast<__half*>(to));
    case Dtype::kBFloat16:
      return launch(static_cast<const float*>(from), static_cast<__nv_bfloat16*>(to));
  }
}

void combine_rows(const void* base, const void* updates, const void* gates, const int64_t* sorted, const int64_t* order,
                  int64_t t, int64_t m, int64_t width, Dtype dtype, void* to, cudaStream_t stream) {
  if (m == 0 || width == 0) return;
  with_element(dtype, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    combine_rows_kernel<<<blocks_for(m), block_shape(), 0, stream>>>(
        static_cast<const Element*>(base), static_cast<const Element*>(updates), static_cast<const Element*>(gates),
        sorted, order, t, m, width, static_cast<Element*>(to));
  });
}

void scale_rows(const void* from, const int64_t* indices, const void* gates, int64_t t, int64_t m, int64_t width,
                Dtype dtype, void* to, cudaStream_t stream) {
  if (t == 0 || width == 0) return;
  with_element(dtype, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    scale_rows_kernel<<<blocks_for(t), block_shape(), 0, stream>>>(static_cast<const Element*>(from), indices,
                                                                   static_cast<const Element*>(gates), t, m, width,
                                                                   static_cast<Element*>(to));
  });
}

void dot_rows(const void* from, const int64_t* indices, const void* updates, int64_t t, int64_t m, int64_t width,
              Dtype dtype, void* to, cudaStream_t stream) {
  if (t == 0) return;
  with_element(dtype, [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    dot_rows_kernel<<<blocks_for(t), block_shape(), 0, stream>>>(static_cast<const Element*>(from), indices,
                                                                 static_cast<const Element*>(updates), t, m, width,
                                                                 static_cast<Element*>(to));
  });
}

}  // namespace mhmatmul::cuda
