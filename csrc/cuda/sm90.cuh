// What the kernels for Hopper share: rings of stages in shared memory, the bulk copy engine, rounding into its layout.
#pragma once

#include "tile_walk.h"

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/tensor.hpp>

#include <cstdint>

namespace mhmatmul::cuda::sm90 {

using cutlass::arch::ClusterBarrier;
using cutlass::arch::ClusterTransactionBarrier;

constexpr int kWarp = 32, kGroup = 128;
constexpr int kRowBytes = kDepth * 2;     // of a row in shared memory: the widest swizzle
constexpr int kSharedBytes = 227 * 1024;  // what a block may have
constexpr int kSharedAlignment = 1024;    // of the swizzle

// The block's shared memory, aligned for the swizzle.
__device__ inline unsigned char* aligned_shared_memory() {
  extern __shared__ unsigned char raw[];
  return raw + (kSharedAlignment - cute::cast_smem_ptr_to_uint(raw) % kSharedAlignment) % kSharedAlignment;
}

// This kernel waits here for the one before. Then the next one of the stream may come up while this one works: all
// before this one have ended by then, and what they wrote is there.
__device__ inline void follow_kernel_before() {
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
}

// The thread's number in its warpgroup, read anew: what is made of it does not stay in registers while the thread does
// something else.
__device__ inline int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread % kGroup;
}

// A place in a ring of `size` stages and the parity of its round.
struct Place {
  int slot = 0;
  uint32_t parity = 0;

  __device__ void advance(int steps, int size) {
    slot += steps;
    while (slot >= size) {
      slot -= size;
      parity ^= 1;
    }
  }
};

// Where a panel, rows of 64 columns, has an element: swizzled as the copy engine does.
__device__ inline int place_in_panel(int row, int column) {
  return row * kRowBytes + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2;
}

// What follows stays behind it: the compiler may move ordinary loads and stores ahead of CUTLASS's.
__device__ inline void wait_for(uint64_t* barrier, uint32_t parity) {
  ClusterBarrier::wait(barrier, parity);
  asm volatile("" ::: "memory");
}

// Makes loads and stores of shared memory come before those of the copy engine and the matrix unit that are told of
// afterwards.
__device__ inline void fence_shared_memory() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

using CacheHint = cute::TMA::CacheHintSm90;

__device__ inline void bring(const CUtensorMap& map, uint64_t* barrier, void* to, int x, int y, int z) {
  cute::SM90_TMA_LOAD_3D::copy(&map, barrier, static_cast<uint64_t>(CacheHint::EVICT_NORMAL), to, x, y, z);
}

// The same to this place in each of `blocks` blocks, the cluster's; each one's own barrier is told.
__device__ inline void bring_to_all(const CUtensorMap& map, uint64_t* barrier, void* to, int blocks, int x, int y,
                                    int z) {
  const auto all = static_cast<uint16_t>((1 << blocks) - 1);
  cute::SM90_TMA_LOAD_MULTICAST_3D::copy(&map, barrier, all, static_cast<uint64_t>(CacheHint::EVICT_NORMAL), to, x, y,
                                         z);
}

// A panel on its way out of shared memory; one that leaves the cache is first to be evicted from L2.
__device__ inline void store(const CUtensorMap& map, bool leaves_cache, const void* from, int x, int y, int z) {
  if (!leaves_cache) return cute::SM90_TMA_STORE_3D::copy(&map, from, x, y, z);
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4}], [%1], %5;" ::"l"(&map),
      "r"(cute::cast_smem_ptr_to_uint(from)), "r"(x), "r"(y), "r"(z), "l"(static_cast<uint64_t>(CacheHint::EVICT_FIRST))
      : "memory");
}

// Past L1, which need not keep what is only written.
__device__ inline void write_past_l1(void* to, uint4 words) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}
__device__ inline void write_past_l1(void* to, float2 two) {
  asm volatile("st.global.L1::no_allocate.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(two.x), "f"(two.y) : "memory");
}

__device__ inline void copy_16_bytes(uint32_t to, const void* from, bool zeros) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(zeros ? 0 : 16)
               : "memory");
}

__device__ inline void copy_4_bytes(uint32_t to, const void* from, bool zeros) {
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(zeros ? 0 : 4)
               : "memory");
}

__device__ inline uint32_t pack(float low, float high, cute::bfloat16_t) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
__device__ inline uint32_t pack(float low, float high, cute::half_t) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// Where the sums of 8 columns of 64 rows are among a thread's: block `block` of rows, `j` of columns. The sums of the
// first kHeadN columns of all rows come first.
template <class Tile>
__device__ constexpr int place_of_sums(int block, int j) {
  constexpr int kBlocks = Tile::kM / 64, kEights = Tile::kHeadN / 8;
  return ((j / kEights * kBlocks + block) * kEights + j % kEights) * 4;
}

// Each of four threads side by side holds a row of a 4 x 4 matrix of words, and then a column.
__device__ inline void transpose(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int apart = 1; apart < 4; apart *= 2) {
    const bool is_upper = lane & apart;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & apart) continue;
      const uint32_t other = __shfl_xor_sync(~0u, is_upper ? words[i] : words[i + apart], apart);
      (is_upper ? words[i] : words[i + apart]) = other;
    }
  }
}

// Rounds a tile's sums, `thread`'s of a warpgroup, into `to`: panels of 64 columns, kM rows of 128 bytes each, swizzled
// as the copy engine reads.
template <class Tile, class Sums>
__device__ void round_into(unsigned char* to, const Sums& sums, int thread) {
  using Element = typename Tile::Element;
  const int warp = thread / kWarp, lane = thread % kWarp;
#pragma unroll
  for (int block = 0; block < Tile::kM / 64; ++block) {
    const int row = block * 64 + warp * 16 + lane % 16;  // lane: row of the matrix that it gives the address of
    const uint32_t address = cute::cast_smem_ptr_to_uint(to) + row * kRowBytes;
#pragma unroll
    for (int j = 0; j < Tile::kN / 8; j += 2) {
      const int low = place_of_sums<Tile>(block, j), high = place_of_sums<Tile>(block, j + 1);
      const int piece = j + lane / 16;  // of 8 columns, 16 bytes
      const uint32_t target = address + piece / 8 * (Tile::kM * kRowBytes) + ((piece % 8) ^ (row % 8)) * 16;
      asm volatile(
          "stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(target),
          "r"(pack(sums(low + 0), sums(low + 1), Element{})), "r"(pack(sums(low + 2), sums(low + 3), Element{})),
          "r"(pack(sums(high + 0), sums(high + 1), Element{})), "r"(pack(sums(high + 2), sums(high + 3), Element{}))
          : "memory");
    }
  }
}

}  // namespace mhmatmul::cuda::sm90
