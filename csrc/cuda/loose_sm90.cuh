// What the copy engine can neither read nor write, since it does not lie at multiples of 16 bytes: moved by the threads
// of a warpgroup, in words of two elements where all rows begin and end with one, else element by element.
#pragma once

#include "sm90.cuh"

namespace mhmatmul::cuda::sm90 {

// A matrix of each head, strides in elements; null data: none.
struct Loose {
  uint16_t* data;
  int64_t stride, batch_stride;  // between rows, between matrices
  bool in_words;

  bool in_elements() const { return data && !in_words; }
};

// Those of a product that are loose.
struct LooseOperands {
  Loose a, b, c;

  bool any() const { return a.data || b.data || c.data; }
};

// A part of one: so many rows and columns of it, or fewer where the matrix ends.
struct Box {
  uint16_t* first;
  int64_t stride;
  int rows, columns;  // that the matrix has from here on
  bool in_words;
};

// From this row and column on, of so many.
__device__ inline Box box_of(const Loose& matrix, int head, int row, int rows, int column, int columns) {
  return {matrix.data + head * matrix.batch_stride + row * matrix.stride + column, matrix.stride, rows - row,
          columns - column, matrix.in_words};
}

// Brings kRows rows of 64 columns into a panel, zeros where there is nothing.
template <int kRows>
__device__ void bring_box(const Box& box, unsigned char* panel) {
  constexpr int kWarps = kGroup / kWarp, kSides = kDepth / kWarp;
  const int warp = thread_anew() / kWarp, lane = thread_anew() % kWarp;
  if (box.in_words) {
    const uint32_t to = cute::cast_smem_ptr_to_uint(panel);
    const uint16_t* from = box.first + warp * box.stride + lane * 2;
#pragma unroll 4
    for (int row = warp; row < kRows; row += kWarps, from += kWarps * box.stride)
      copy_4_bytes(to + place_in_panel(row, lane * 2), from, row >= box.rows || lane * 2 >= box.columns);
    return;
  }
  uint16_t elements[kRows / kWarps][kSides];  // all on their way at once
  const uint16_t* from = box.first + warp * box.stride + lane;
#pragma unroll
  for (int i = 0; i < kRows / kWarps; ++i, from += kWarps * box.stride) {
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      const bool is_there = warp + i * kWarps < box.rows && lane + side * kWarp < box.columns;
      elements[i][side] = is_there ? from[side * kWarp] : uint16_t{0};
    }
  }
#pragma unroll
  for (int i = 0; i < kRows / kWarps; ++i) {
#pragma unroll
    for (int side = 0; side < kSides; ++side)
      *reinterpret_cast<uint16_t*>(panel + place_in_panel(warp + i * kWarps, lane + side * kWarp)) = elements[i][side];
  }
}

// What a thread has brought will have come when the barrier says so.
__device__ inline void tell_of_box(bool in_words, uint64_t* full) {
  if (in_words) return cutlass::arch::cpasync_barrier_arrive_noinc(full);
  fence_shared_memory();
  ClusterBarrier::arrive(full);
}

// Stores a tile of kM rows, rounded into panels, as far as there is room for it.
template <class Word, int kM, int kN>
__device__ void store_words(const Box& box, const unsigned char* tile) {
  constexpr int kWarps = kGroup / kWarp, kEach = sizeof(Word) / sizeof(uint16_t), kSides = kN / (kWarp * kEach);
  constexpr int kAtOnce = 2;  // rows of each warp
  const int warp = thread_anew() / kWarp, lane = thread_anew() % kWarp;
  uint16_t* to = box.first + warp * box.stride + lane * kEach;
  for (int first = warp; first < kM; first += kAtOnce * kWarps) {
    Word words[kAtOnce][kSides];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        const int column = (side * kWarp + lane) * kEach;
        words[i][side] = *reinterpret_cast<const Word*>(tile + column / kDepth * kM * kRowBytes +
                                                        place_in_panel(first + i * kWarps, column % kDepth));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i, to += kWarps * box.stride) {
#pragma unroll
      for (int side = 0; side < kSides; ++side)
        if (first + i * kWarps < box.rows && (side * kWarp + lane) * kEach < box.columns)
          *reinterpret_cast<Word*>(to + side * kWarp * kEach) = words[i][side];
    }
  }
}

template <int kM, int kN>
__device__ void store_box(const Box& box, const unsigned char* tile) {
  box.in_words ? store_words<uint32_t, kM, kN>(box, tile) : store_words<uint16_t, kM, kN>(box, tile);
}

}  // namespace mhmatmul::cuda::sm90
