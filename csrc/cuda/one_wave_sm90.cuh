// The product of gemm_sm90.cuh where each tile of C can have a block of its own and all blocks work at once: what
// counts is how soon all bytes are under way, and how little is left to do when the last have come.
//
// A block is one warpgroup. What it needs it asks for at once, each 64 along k with a barrier of its own, or in two
// halves where many blocks share a multiprocessor, and multiplies it as it comes. Of A only the rows that there are
// come; what the matrix unit reads in place of others makes rows of C that nobody writes.
//
// Where it is known what the kernel ahead writes, and that B is not of it, B comes before that kernel has ended.
//
// Sums are taken as in gemm_sm90.cuh: the same bits.
#pragma once

#include "gemm_sm90.cuh"

namespace mhmatmul::cuda::sm90 {

constexpr int kOneWaveRows = 64, kMostDepths = 8;
constexpr int kSharedOfMultiprocessor = 228 * 1024, kSharedReserved = 1024;  // of which each block takes so much

// How many blocks the registers of a multiprocessor suffice for.
template <class Tile>
constexpr int kMostBlocks = Tile::kN == 64 ? 8 : 5;

// Shared memory, in this order: stages of A, `rows` each, stages of B, barriers. Behind A's last stage the matrix unit
// reads B as if it were rows of A.
template <class Tile>
constexpr int bytes_of_one_wave(int stages, int rows) {
  static_assert(Tile::kBBytes >= kOneWaveRows * kRowBytes);
  return kSharedAlignment + stages * (rows * kRowBytes + Tile::kBBytes) +
         kMostDepths * static_cast<int>(sizeof(uint64_t));
}

// The grid: blocks of columns, heads, blocks of rows. `rows`: of A's boxes, a multiple of 8.
template <class Tile>
__global__ void __launch_bounds__(kGroup, kMostBlocks<Tile>)
    one_wave_kernel(const __grid_constant__ Params params, int rows, bool b_is_early) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace cute;
  using Element = typename Tile::Element;
  const Cut& cut = params.cut;
  const int a_bytes = rows * kRowBytes, stages = cut.b_stages;
  unsigned char* const a_stages = aligned_shared_memory();
  unsigned char* const b_stages = a_stages + stages * a_bytes;
  auto* const full = reinterpret_cast<uint64_t*>(b_stages + stages * Tile::kBBytes);
  const int n_block = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int m_block = static_cast<int>(blockIdx.z);

  // 64 along k, into a stage that nobody reads: B's, and then A's. Called by one thread.
  const auto bring_b_to = [&](int stage, int k_block) {
    ClusterTransactionBarrier::arrive_and_expect_tx(&full[stage], Tile::kBBytes + a_bytes);
    bring_b<Tile>(params, &full[stage], b_stages + stage * Tile::kBBytes, head, n_block, k_block);
  };
  const auto bring_a_to = [&](int stage, int k_block) {
    bring(params.a, &full[stage], a_stages + stage * a_bytes, k_block * kDepth, head, m_block * kOneWaveRows);
  };
  if (threadIdx.x == 0) {
    prefetch_tma_descriptor(&params.a);
    prefetch_tma_descriptor(&params.b);
    for (int i = 0; i < stages; ++i) ClusterBarrier::init(&full[i], 1);
    cutlass::arch::fence_barrier_init();
    for (int i = 0; i < stages && b_is_early; ++i) bring_b_to(i, i);
  }
  __syncthreads();
  follow_kernel_before();
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      if (!b_is_early) bring_b_to(i, i);
      bring_a_to(i, i);
    }
  }
  __syncwarp();

  typename Product<Tile>::Multiply multiply;
  const auto slice = multiply.get_slice(threadIdx.x);
  const auto pieces_of_a = [&](unsigned char* stage) {
    return slice.make_fragment_A(slice.partition_A(
        make_tensor(make_smem_ptr(reinterpret_cast<Element*>(stage)), typename Product<Tile>::LayoutA{})));
  };
  const Tensor b_pieces = slice.make_fragment_B(slice.partition_B(
      make_tensor(make_smem_ptr(reinterpret_cast<Element*>(b_stages)), typename Product<Tile>::LayoutB{})));
  Tensor sums = partition_fragment_C(multiply, Shape<_64, Int<Tile::kN>>{});
  multiply.accumulate_ = GMMA::ScaleOut::Zero;
  warpgroup_fence_operand(sums);
  Place place;
  for (int i = 0; i < cut.k_blocks; ++i) {
    const Tensor a_pieces = pieces_of_a(a_stages + place.slot * a_bytes);
    wait_for(&full[place.slot], place.parity);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < size<2>(a_pieces); ++k) {
      gemm(multiply, a_pieces(_, 0, k, 0), b_pieces(_, 0, k, place.slot), sums(_, 0, 0));
      multiply.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    if (i + stages < cut.k_blocks) {
      warpgroup_wait<0>();
      __syncthreads();
      if (threadIdx.x == 0) {
        bring_b_to(place.slot, i + stages);
        bring_a_to(place.slot, i + stages);
      }
      __syncwarp();
    }
    place.advance(1, stages);
  }
  warpgroup_wait<0>();
  warpgroup_fence_operand(sums);
  if (params.bias) SummedRows<Tile>{}.finish(params, head, n_block, sums);
  __syncthreads();  // all have read B, which makes room for C
  round_into<Tile>(b_stages, sums, static_cast<int>(threadIdx.x));
  fence_shared_memory();
  __syncthreads();
  if (threadIdx.x == 0) {
    store_tile<Tile>(params, b_stages, head, n_block, m_block);
    tma_store_wait<0>();
  }
#else
  __trap();  // machine code for another architecture: takes_sm90 keeps the host from launching it
#endif
}

}  // namespace mhmatmul::cuda::sm90
