// What the TF32 kernels for Hopper share.
//
// Of TF32 the matrix unit reads from shared memory only what has k side by side, as rows of A have and B has not. So
// both make the transposed tile, C^T = B^T A^T: its 64 rows are columns of B, which a warpgroup turns on their way out
// of shared memory into registers; its columns are rows of A, as they lie.
//
// The copy engine rounds A and B to TF32, to nearest, as cuBLAS has it do. Every row is summed over k in steps of 8
// from the lowest, into one float32 sum, whatever the tile: the same bits.
#pragma once

#include "sm90.cuh"
#include "tf32_sm90_tuning.h"

namespace mhmatmul::cuda::sm90 {

constexpr int kFloats = kRowBytes / 4;  // of a row in shared memory

// Where rows of 32 floats have one: swizzled as the copy engine does.
__device__ inline int place_of_float(int row, int column) {
  return row * kRowBytes + ((column / 4) ^ (row % 8)) * 16 + column % 4 * 4;
}

// Of 32 columns, a part of B that two warps share, the first of the two side by side that are a thread's. Columns may
// be dealt to threads in any way; in this one, reading rows of B and writing rows of C keeps all banks busy.
__device__ inline int column_in_part(int thread) {
  const int warp = thread / kWarp, row = thread % kWarp / 4;
  return ((warp % 2 * 2 + row / 4) ^ (row / 2 % 2 * 5)) * 4 + row % 2 * 2;
}

// A thread's columns of a part of B, k of their elements, as the matrix unit takes them.
template <int k>
struct TurnedColumns {
  static constexpr int kSteps = k / 8;
  decltype(cute::make_tensor<cute::tfloat32_t>(
      cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2>, cute::Int<kSteps>>>{})) fragment;

  // The part has a row for each of k or, transposed, 32 columns as rows, 32 along k at a time.
  __device__ void read(const unsigned char* part, bool is_transposed, int thread) {
    cute::Tensor words = cute::recast<uint32_t>(fragment);
    const int n = column_in_part(thread);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = step * 8 + i * 2 + thread % 4;
        uint2 two;
        if (is_transposed) {
          const unsigned char* const from = part + row / kFloats * (kFloats * kRowBytes);
          two.x = *reinterpret_cast<const uint32_t*>(from + place_of_float(n, row % kFloats));
          two.y = *reinterpret_cast<const uint32_t*>(from + place_of_float(n + 1, row % kFloats));
        } else {
          two = *reinterpret_cast<const uint2*>(part + place_of_float(row, n));
        }
        words(i, step) = two.x;
        words(i + 1, step) = two.y;
      }
    }
  }
};

// What both are told alike.
struct Tf32Params {
  CUtensorMap a, b;
  const float* bias;
  float* c;
  int64_t bias_batch_stride, c_stride, c_batch_stride;
  int m, n;
};

// That of two columns from `column` on.
__device__ inline float2 bias_of(const Tf32Params& params, int head, int column) {
  float2 bias = make_float2(0, 0);
  if (!params.bias) return bias;
  const float* const from = params.bias + head * params.bias_batch_stride + column;
  if (column < params.n) bias.x = from[0];
  if (column + 1 < params.n) bias.y = from[1];
  return bias;
}

// Writes a thread's sums: two columns from `column` on, its two of every 8 of `rows` rows from `first_row` on. Eight
// threads fill sectors. Nothing goes by way of shared memory.
template <int rows, class Sums>
__device__ __forceinline__ void write_columns(const Tf32Params& params, const Sums& sums, float2 bias, int head,
                                              int first_row, int column) {
  if (column >= params.n) return;
  const int row = first_row + static_cast<int>(threadIdx.x) % 4 * 2;
  const auto write_rows = [&](auto write) {
    float* to = params.c + head * params.c_batch_stride + row * params.c_stride + column;
#pragma unroll
    for (int j = 0; j < rows / 8; ++j) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        write(to, make_float2(sums(j * 4 + side) + bias.x, sums(j * 4 + 2 + side) + bias.y), row + j * 8 + side);
        to += side ? 7 * params.c_stride : params.c_stride;
      }
    }
  };
  if (first_row + rows <= params.m && column + 1 < params.n) {  // no branch at each row, which would have each wait
    write_rows([](float* to, float2 two, int) { write_past_l1(to, two); });
  } else {
    write_rows([&](float* to, float2 two, int of_row) {
      if (of_row >= params.m) return;
      to[0] = two.x;
      if (column + 1 < params.n) to[1] = two.y;
    });
  }
}

}  // namespace mhmatmul::cuda::sm90
