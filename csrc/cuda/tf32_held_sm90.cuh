// C_i[m, n] = A_i[m, k] B_i[k, n] in TF32 for heads so short that a block can hold their columns in registers: bound by
// the bytes of A and C.
//
// Warpgroups share a tile, side by side, as far as a piece of B goes, then one below the other.
//
// A block works through groups of tiles, one piece of B each (tile_walk.h). One thread brings, through one ring of
// stages, B of a group and then A of its tiles; so the next B comes while this one is used. Nobody waits for anybody
// but through the ring: while one warpgroup writes its sums, others multiply.
#pragma once

#include "tf32_sm90.cuh"

namespace mhmatmul::cuda::sm90 {

// B is kept [k, n] by four warpgroups, 64 columns by each.
template <int m, int n, int k>
struct Tf32HeldTile {
  static constexpr tuning::Tf32Size kSize{m, n, k};
  static constexpr int kM = m, kN = n, kK = k, kGroups = 4, kUnits = n / 64;  // units: warpgroups side by side
  static constexpr int kRows = m * kUnits / kGroups;                          // of a warpgroup
  static constexpr int kMultipliers = kGroups * kGroup, kThreads = kGroup + kMultipliers;  // the first bring
  static constexpr int kMoving = 32, kMultiplying = 112;  // registers of a thread of either kind: what kThreads leave
  static constexpr int kAPanels = k / kFloats, kPanelBytes = kM * kRowBytes;
  static constexpr int kABytes = kAPanels * kPanelBytes;
  // Of B, 32 columns by all of k; as many to a stage as it has room for.
  static constexpr int kParts = kN / kFloats, kPartBytes = k * kRowBytes, kPartsOfStage = kABytes / kPartBytes;
  static constexpr int kStagesOfB = (kParts + kPartsOfStage - 1) / kPartsOfStage;
  static constexpr int kMostStages = 16;

  struct Barriers {
    uint64_t full[kMostStages], empty[kMostStages];
  };
  static constexpr int kFixed = static_cast<int>(sizeof(Barriers)) + kSharedAlignment;
  static constexpr int kRoom = (kSharedBytes - kFixed) / kABytes;
  static constexpr int kStages = kRoom < kMostStages ? kRoom : kMostStages;
  static constexpr int kBytes = kFixed + kStages * kABytes;
  static_assert(kGroups % kUnits == 0 && kStages >= 2);
};

struct Tf32HeldParams : Tf32Params {
  bool is_b_transposed;
  Cut cut;
};

// A part of B: rows along k or, transposed, 32 columns as rows, 32 along k at a time.
template <class Tile>
__device__ void bring_part_of_b(const Tf32HeldParams& params, uint64_t* full, unsigned char* to, int head, int column) {
  if (!params.is_b_transposed) return bring(params.b, full, to, column, 0, head);
  for (int i = 0; i < Tile::kAPanels; ++i)
    bring(params.b, full, to + i * kFloats * kRowBytes, i * kFloats, column, head);
}

// Called by one thread.
template <class Tile>
__device__ void bring_all(const Tf32HeldParams& params, typename Tile::Barriers& barriers, unsigned char* stages) {
  Place at;
  const auto begin_stage = [&](int bytes) {
    wait_for(&barriers.empty[at.slot], at.parity ^ 1);
    ClusterTransactionBarrier::arrive_and_expect_tx(&barriers.full[at.slot], bytes);
    return stages + at.slot * Tile::kABytes;
  };
  for (Walk walk(params.cut, params.cut.m_blocks, static_cast<int>(blockIdx.x)); !walk.at_end(); walk.next()) {
    if (walk.is_first_of_group()) {
      for (int part = 0; part < Tile::kParts;) {
        const int parts = min(Tile::kPartsOfStage, Tile::kParts - part);
        unsigned char* const stage = begin_stage(parts * Tile::kPartBytes);
        for (int i = 0; i < parts; ++i, ++part)
          bring_part_of_b<Tile>(params, &barriers.full[at.slot], stage + i * Tile::kPartBytes, walk.head,
                                walk.n_block * Tile::kN + part * kFloats);
        at.advance(1, Tile::kStages);
      }
    }
    unsigned char* const stage = begin_stage(Tile::kABytes);
    for (int i = 0; i < Tile::kAPanels; ++i)
      bring(params.a, &barriers.full[at.slot], stage + i * Tile::kPanelBytes, i * kFloats, walk.head,
            walk.m_block * Tile::kM);
    at.advance(1, Tile::kStages);
  }
}

// Called by the warpgroups that multiply. Inlined, since a call between its instructions would keep the matrix unit
// waiting.
template <class Tile>
__device__ __forceinline__ void multiply_all(const Tf32HeldParams& params, typename Tile::Barriers& barriers,
                                             unsigned char* stages) {
  using namespace cute;
  using Element = tfloat32_t;
  constexpr int kRows = Tile::kRows;
  using Multiply =
      decltype(make_tiled_mma(GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kRows>, Int<kFloats>>,
                                                   GMMA::Major::K, GMMA::Major::K>()));
  using LayoutA = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                         Shape<Int<Tile::kM>, Int<Tile::kK>, Int<Tile::kStages>>{}));
  const int group = static_cast<int>(threadIdx.x) / kGroup - 1, thread = static_cast<int>(threadIdx.x) % kGroup;
  const int lane = thread % kWarp, rows_below = group / Tile::kUnits;
  const int part = group % Tile::kUnits * 2 + thread / (2 * kWarp);
  const int column = part * kFloats + column_in_part(thread);  // of the tile's

  Multiply multiply;
  const auto slice = multiply.get_slice(thread);
  const Tensor a_pieces = slice.make_fragment_B(
      slice.partition_B(make_tensor(make_smem_ptr(reinterpret_cast<Element*>(stages)), LayoutA{})));
  Tensor sums = partition_fragment_C(multiply, Shape<_64, Int<kRows>>{});
  TurnedColumns<Tile::kK> held;
  float2 bias = make_float2(0, 0);
  Place at;
  const auto free_stage = [&] {
    __syncwarp();
    if (lane == 0) ClusterBarrier::arrive(&barriers.empty[at.slot]);
    at.advance(1, Tile::kStages);
  };
  for (Walk walk(params.cut, params.cut.m_blocks, static_cast<int>(blockIdx.x)); !walk.at_end(); walk.next()) {
    if (walk.is_first_of_group()) {
      for (int stage = 0; stage < Tile::kStagesOfB; ++stage) {
        wait_for(&barriers.full[at.slot], at.parity);
        if (part / Tile::kPartsOfStage == stage)
          held.read(stages + at.slot * Tile::kABytes + part % Tile::kPartsOfStage * Tile::kPartBytes,
                    params.is_b_transposed, thread_anew());
        fence_shared_memory();  // the copy engine will write where threads read
        free_stage();
      }
      bias = bias_of(params, walk.head, walk.n_block * Tile::kN + column);
    }
    wait_for(&barriers.full[at.slot], at.parity);
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < TurnedColumns<Tile::kK>::kSteps; ++step) {
      multiply.accumulate_ = step == 0 ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
      gemm(multiply, held.fragment(_, step), a_pieces(_, rows_below, step, at.slot), sums(_, 0, 0));
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
    free_stage();
    write_columns<kRows>(params, sums, bias, walk.head, walk.m_block * Tile::kM + rows_below * kRows,
                         walk.n_block * Tile::kN + column);
    __syncwarp();
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) tf32_held_kernel(const __grid_constant__ Tf32HeldParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  unsigned char* const stages = aligned_shared_memory();
  auto& barriers = *reinterpret_cast<typename Tile::Barriers*>(stages + Tile::kStages * Tile::kABytes);
  if (threadIdx.x == 0) {
    constexpr int kWarps = Tile::kMultipliers / kWarp;
    cute::prefetch_tma_descriptor(&params.a);
    cute::prefetch_tma_descriptor(&params.b);
    for (int i = 0; i < Tile::kStages; ++i) {
      ClusterBarrier::init(&barriers.full[i], 1);
      ClusterBarrier::init(&barriers.empty[i], kWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  follow_kernel_before();
  if (threadIdx.x >= kGroup) {
    cutlass::arch::warpgroup_reg_alloc<Tile::kMultiplying>();
    multiply_all<Tile>(params, barriers, stages);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<Tile::kMoving>();
    if (threadIdx.x == 0) bring_all<Tile>(params, barriers, stages);
  }
#else
  __trap();  // machine code for another architecture: takes_tf32_sm90 keeps the host from launching it
#endif
}

}  // namespace mhmatmul::cuda::sm90
