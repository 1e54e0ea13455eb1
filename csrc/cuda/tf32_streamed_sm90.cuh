// C_i[m, n] = A_i[m, k] B_i[k, n] in TF32 for heads too long to be held: A and B come together, 32 along k at a time.
//
// Two warpgroups have 64 columns each of a tile of C, for all of its rows. They turn columns of the next stage while
// those of this one are multiplied. Blocks side by side are pairs, where tiles come in pairs, and each brings half of
// A's rows for both.
#pragma once

#include "tf32_sm90.cuh"
#include "tile_walk.h"

namespace mhmatmul::cuda::sm90 {

struct Tf32StreamedTile {
  static constexpr int kM = tuning::kTf32Streamed.m, kN = tuning::kTf32Streamed.n, kGroups = kN / 64;
  static constexpr int kMultipliers = kGroups * kGroup, kThreads = kGroup + kMultipliers;  // the first bring
  static constexpr int kMoving = 40, kMultiplying = 232;  // registers of a thread of either kind: what kThreads leave
  static constexpr int kParts = kN / kFloats, kPartBytes = kFloats * kRowBytes;  // of B, 32 columns by 32 along k
  static constexpr int kABytes = kM * kRowBytes, kBBytes = kParts * kPartBytes;
  static constexpr int kBox = kM / 2;  // rows of A that come together

  static constexpr int kStages = 4;
  struct Barriers {
    uint64_t full[kStages], empty[kStages];
  };
  static constexpr int kBytes = kStages * (kABytes + kBBytes) + static_cast<int>(sizeof(Barriers)) + kSharedAlignment;
  static_assert(kBytes <= kSharedBytes);
};

struct Tf32StreamedParams : Tf32Params {
  int k_blocks;  // even
  Deal deal;
};

// Called by one thread.
template <class Tile>
__device__ void bring_streams(const Tf32StreamedParams& params, typename Tile::Barriers& barriers,
                              unsigned char* a_stages, unsigned char* b_stages) {
  const bool is_paired = params.deal.team > 1;
  Place at;
  for (DealtWalk walk(params.deal, static_cast<int>(blockIdx.x)); !walk.at_end(); walk.next()) {
    for (int k_block = 0; k_block < params.k_blocks; ++k_block) {
      wait_for(&barriers.empty[at.slot], at.parity ^ 1);
      uint64_t* const full = &barriers.full[at.slot];
      ClusterTransactionBarrier::arrive_and_expect_tx(full, Tile::kABytes + Tile::kBBytes);
      const int k = k_block * kFloats;
      for (int half = 0; half < 2; ++half) {
        unsigned char* const to = a_stages + at.slot * Tile::kABytes + half * Tile::kBox * kRowBytes;
        const int row = walk.m_block * Tile::kM + half * Tile::kBox;
        if (!is_paired) {
          bring(params.a, full, to, k, walk.head, row);
        } else if (half == static_cast<int>(cute::block_rank_in_cluster())) {
          bring_to_all(params.a, full, to, /*blocks=*/2, k, walk.head, row);
        }
      }
      for (int part = 0; part < Tile::kParts; ++part) {
        unsigned char* const to = b_stages + at.slot * Tile::kBBytes + part * Tile::kPartBytes;
        const int column = walk.n_block * Tile::kN + part * kFloats;
        bring(params.b, full, to, column, k, walk.head);
      }
      at.advance(1, Tile::kStages);
    }
  }
}

// Called by the warpgroups that multiply. Inlined, since a call between its instructions would keep the matrix unit
// waiting.
template <class Tile>
__device__ __forceinline__ void multiply_streams(const Tf32StreamedParams& params, typename Tile::Barriers& barriers,
                                                 unsigned char* a_stages, unsigned char* b_stages) {
  using namespace cute;
  using Element = tfloat32_t;
  using Columns = TurnedColumns<kFloats>;
  using Multiply =
      decltype(make_tiled_mma(GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<Tile::kM>, Int<kFloats>>,
                                                   GMMA::Major::K, GMMA::Major::K>()));
  using LayoutA = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                         Shape<Int<Tile::kM>, Int<kFloats>, Int<Tile::kStages>>{}));
  const int group = static_cast<int>(threadIdx.x) / kGroup - 1, thread = static_cast<int>(threadIdx.x) % kGroup;
  const int lane = thread % kWarp, part = group * 2 + thread / (2 * kWarp);

  Multiply multiply;
  const auto slice = multiply.get_slice(thread);
  const Tensor a_pieces = slice.make_fragment_B(
      slice.partition_B(make_tensor(make_smem_ptr(reinterpret_cast<Element*>(a_stages)), LayoutA{})));
  Tensor sums = partition_fragment_C(multiply, Shape<_64, Int<Tile::kM>>{});
  Columns even, odd;  // of stages in turn
  Place at;
  const auto turn = [&](Columns& columns, const Place& place) {
    wait_for(&barriers.full[place.slot], place.parity);
    columns.read(b_stages + place.slot * Tile::kBBytes + part * Tile::kPartBytes, /*is_transposed=*/false, thread);
  };
  const auto free_stage = [&] {
    __syncwarp();
    if (lane < params.deal.team) ClusterBarrier::arrive(&barriers.empty[at.slot], lane, /*predicate=*/1);  // of each
  };
  // Multiplies the stage that `now` is of, and turns `later` of the one after it.
  const auto multiply_stage = [&](Columns& now, Columns& later, bool is_first, bool has_later) {
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < Columns::kSteps; ++step) {
      multiply.accumulate_ = is_first && step == 0 ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
      gemm(multiply, now.fragment(_, step), a_pieces(_, 0, step, at.slot), sums(_, 0, 0));
    }
    warpgroup_commit_batch();
    Place after = at;
    after.advance(1, Tile::kStages);
    if (has_later) turn(later, after);
    warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
    free_stage();
    at = after;
  };
  DealtWalk walk(params.deal, static_cast<int>(blockIdx.x));
  turn(even, at);
  while (!walk.at_end()) {
    const int head = walk.head, m_block = walk.m_block, n_block = walk.n_block;
    walk.next();
    for (int k_block = 0; k_block < params.k_blocks; k_block += 2) {
      multiply_stage(even, odd, /*is_first=*/k_block == 0, /*has_later=*/true);
      multiply_stage(odd, even, /*is_first=*/false, /*has_later=*/k_block + 2 < params.k_blocks || !walk.at_end());
    }
    const int of_c = n_block * Tile::kN + part * kFloats + column_in_part(thread);
    write_columns<Tile::kM>(params, sums, bias_of(params, head, of_c), head, m_block * Tile::kM, of_c);
    __syncwarp();
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    tf32_streamed_kernel(const __grid_constant__ Tf32StreamedParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  unsigned char* const a_stages = aligned_shared_memory();
  unsigned char* const b_stages = a_stages + Tile::kStages * Tile::kABytes;
  auto& barriers = *reinterpret_cast<typename Tile::Barriers*>(b_stages + Tile::kStages * Tile::kBBytes);
  if (threadIdx.x == 0) {
    constexpr int kWarps = Tile::kMultipliers / kWarp;
    cute::prefetch_tma_descriptor(&params.a);
    cute::prefetch_tma_descriptor(&params.b);
    for (int i = 0; i < Tile::kStages; ++i) {
      ClusterBarrier::init(&barriers.full[i], 1);
      ClusterBarrier::init(&barriers.empty[i], params.deal.team > 1 ? 2 * kWarps : kWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  cute::cluster_sync();
  follow_kernel_before();
  if (threadIdx.x >= kGroup) {
    cutlass::arch::warpgroup_reg_alloc<Tile::kMultiplying>();
    multiply_streams<Tile>(params, barriers, a_stages, b_stages);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<Tile::kMoving>();
    if (threadIdx.x == 0) bring_streams<Tile>(params, barriers, a_stages, b_stages);
    __syncwarp();
  }
  cute::cluster_sync();  // neither leaves while the other may still write to its shared memory
#else
  __trap();  // machine code for another architecture: takes_tf32_sm90 keeps the host from launching it
#endif
}

}  // namespace mhmatmul::cuda::sm90
