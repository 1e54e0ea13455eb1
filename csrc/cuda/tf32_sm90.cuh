// C_i[m, n] = A_i[m, k] B_i[k, n] in TF32 for one Hopper SM at a time, bound by the bytes of A and C.
//
// Of TF32 the matrix unit reads from shared memory only what has k side by side, as rows of A have and B has not. So it
// makes the transposed tile, C^T = B^T A^T: its 64 rows are columns of B, which a warpgroup holds in registers, turned
// on their way out of shared memory; its columns are rows of A, as they lie. Warpgroups share a tile: side by side, as
// far as a piece of B goes, then one below the other.
//
// A block works through groups of tiles, one piece of B each (tile_walk.h). One thread brings, through one ring of
// stages, B of a group and then A of its tiles; so the next B comes while this one is used. One thread hands tiles of
// C, when the warpgroups have turned theirs, to the copy engine: what each would hand over for itself is written
// slower. Nobody waits for anybody but through the two rings: while one warpgroup turns, others multiply.
//
// Where B is so long that a piece has few columns, blocks side by side are pairs with neighbouring pieces of a head,
// and each brings half of A's rows for both.
//
// The copy engine rounds A and B to TF32, to nearest, as cuBLAS has it do. Every row is summed over k in steps of 8
// from the lowest, into one float32 sum, whatever the tile: the same bits.
#pragma once

#include "sm90.cuh"
#include "tf32_sm90_tuning.h"
#include "tile_walk.h"

namespace mhmatmul::cuda::sm90 {

constexpr int kFloats = kRowBytes / 4;  // of a row in shared memory

// B is kept [k, 64 * units] by `groups` warpgroups, for so many of these at a time.
template <int k, int units, int groups>
struct Tf32Tile {
  static constexpr tuning::Tf32Size kSize{k, units, groups};
  static constexpr int kK = k, kUnits = units, kM = kSize.m(), kN = kSize.n();
  static constexpr int kMultipliers = groups * kGroup, kThreads = kGroup + kMultipliers;  // the first bring and store
  // Registers of a thread of either kind: what kThreads leave them.
  static constexpr int kMoving = groups == 4 ? 32 : 40, kMultiplying = groups == 4 ? 112 : 232;
  static constexpr int kAPanels = k / kFloats, kCPanels = kN / kFloats, kPanelBytes = kM * kRowBytes;
  static constexpr int kABytes = kAPanels * kPanelBytes, kCBytes = kCPanels * kPanelBytes;
  // Of B, 32 columns by all of k; as many to a stage as it has room for.
  static constexpr int kParts = kN / kFloats, kPartBytes = k * kRowBytes, kPartsOfStage = kABytes / kPartBytes;
  static constexpr int kStagesOfB = (kParts + kPartsOfStage - 1) / kPartsOfStage;
  static constexpr int kMostStages = 16, kRing = kCBytes > (16 << 10) ? 3 : 4;  // of A and B, of C
  static constexpr bool kPairs = k > 128;

  struct Barriers {
    uint64_t full[kMostStages], empty[kMostStages], c_full[kRing], c_empty[kRing];
  };
  static constexpr int kFixed = static_cast<int>(sizeof(Barriers)) + kSharedAlignment;
  static constexpr int kRoom = (kSharedBytes - kFixed - kRing * kCBytes) / kABytes;
  static constexpr int kStages = kRoom < kMostStages ? kRoom : kMostStages;
  static constexpr int kBytes = kFixed + kStages * kABytes + kRing * kCBytes;
  static_assert(groups % units == 0 && kStages >= 2);
};

struct Tf32Params {
  CUtensorMap a, b, c;
  const float* bias;
  int64_t bias_batch_stride;
  int n;
  bool is_b_transposed, is_paired;
  bool c_leaves_cache;  // C is first to be evicted from L2
  Cut cut;
};

// Where rows of 32 floats have one: swizzled as the copy engine does.
__device__ inline int place_of_float(int row, int column) {
  return row * kRowBytes + ((column / 4) ^ (row % 8)) * 16 + column % 4 * 4;
}

// A part of B: rows along k or, transposed, 32 columns as rows, 32 along k at a time.
template <class Tile>
__device__ void bring_part_of_b(const Tf32Params& params, uint64_t* full, unsigned char* to, int head, int column) {
  if (!params.is_b_transposed) return bring(params.b, full, to, column, 0, head);
  for (int i = 0; i < Tile::kAPanels; ++i)
    bring(params.b, full, to + i * kFloats * kRowBytes, i * kFloats, column, head);
}

// The rows of A of a tile, or, paired, this block's half of them to both blocks.
template <class Tile>
__device__ void bring_a(const Tf32Params& params, uint64_t* full, unsigned char* stage, int head, int row) {
  if constexpr (Tile::kPairs) {
    if (params.is_paired) {
      for (int i = static_cast<int>(cute::block_rank_in_cluster()); i < Tile::kAPanels; i += 2)
        cute::SM90_TMA_LOAD_MULTICAST_3D::copy(&params.a, full, /*both=*/3,
                                               static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                               stage + i * Tile::kPanelBytes, i * kFloats, head, row);
      return;
    }
  }
  for (int i = 0; i < Tile::kAPanels; ++i) bring(params.a, full, stage + i * Tile::kPanelBytes, i * kFloats, head, row);
}

// Called by one thread.
template <class Tile>
__device__ void bring_all(const Tf32Params& params, typename Tile::Barriers& barriers, unsigned char* stages) {
  Place at;
  const auto begin_stage = [&](int bytes) {
    ClusterBarrier::wait(&barriers.empty[at.slot], at.parity ^ 1);
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
    bring_a<Tile>(params, &barriers.full[at.slot], stage, walk.head, walk.m_block * Tile::kM);
    at.advance(1, Tile::kStages);
  }
}

// Called by one thread.
template <class Tile>
__device__ void store_all(const Tf32Params& params, typename Tile::Barriers& barriers, const unsigned char* tiles) {
  Place at, before;
  bool has_before = false;
  for (Walk walk(params.cut, params.cut.m_blocks, static_cast<int>(blockIdx.x)); !walk.at_end(); walk.next()) {
    ClusterBarrier::wait(&barriers.c_full[at.slot], at.parity);
    for (int panel = 0; panel < Tile::kCPanels; ++panel) {
      const int column = walk.n_block * Tile::kN + panel * kFloats;
      if (column < params.n)
        store(params.c, params.c_leaves_cache, tiles + at.slot * Tile::kCBytes + panel * Tile::kPanelBytes, column,
              walk.head, walk.m_block * Tile::kM);
    }
    cute::tma_store_arrive();
    if (has_before) {
      cute::tma_store_wait<1>();  // the tile before has been read out
      ClusterBarrier::arrive(&barriers.c_empty[before.slot]);
    }
    has_before = true;
    before = at;
    at.advance(1, Tile::kRing);
  }
  cute::tma_store_wait<0>();
}

// What a thread holds of a warpgroup's 64 columns of B, two columns, 8 apart, of each 16, as the matrix unit takes it.
template <class Tile>
struct HeldColumns {
  static constexpr int kSteps = Tile::kK / 8;
  decltype(cute::make_tensor<cute::tfloat32_t>(
      cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2>, cute::Int<kSteps>>>{})) fragment;

  // Its first column in a part of B, which two warps share.
  __device__ static int column(int thread) { return thread / kWarp % 2 * 16 + thread % kWarp / 4; }

  __device__ void read(const unsigned char* part, bool is_transposed) {
    cute::Tensor words = cute::recast<uint32_t>(fragment);
    const int thread = thread_anew();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = column(thread) + i % 2 * 8, k = step * 8 + i / 2 * 4 + thread % 4;
        const int place =
            is_transposed ? k / kFloats * (kFloats * kRowBytes) + place_of_float(n, k % kFloats) : place_of_float(k, n);
        words(i, step) = *reinterpret_cast<const uint32_t*>(part + place);
      }
    }
  }
};

// Called by the warpgroups that multiply. Inlined, since a call between its instructions would keep the matrix unit
// waiting.
template <class Tile>
__device__ __forceinline__ void multiply_all(const Tf32Params& params, typename Tile::Barriers& barriers,
                                             unsigned char* stages, unsigned char* tiles) {
  using namespace cute;
  using Element = tfloat32_t;
  constexpr int kRows = tuning::Tf32Size::kRows;
  using Multiply =
      decltype(make_tiled_mma(GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kRows>, Int<kFloats>>,
                                                   GMMA::Major::K, GMMA::Major::K>()));
  using LayoutA = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                         Shape<Int<Tile::kM>, Int<Tile::kK>, Int<Tile::kStages>>{}));
  const int group = static_cast<int>(threadIdx.x) / kGroup - 1, thread = static_cast<int>(threadIdx.x) % kGroup;
  const int lane = thread % kWarp, rows_below = group / Tile::kUnits;
  const int part = group % Tile::kUnits * 2 + thread / (2 * kWarp);
  const int column = HeldColumns<Tile>::column(thread);

  Multiply multiply;
  const auto slice = multiply.get_slice(thread);
  const Tensor a_pieces = slice.make_fragment_B(
      slice.partition_B(make_tensor(make_smem_ptr(reinterpret_cast<Element*>(stages)), LayoutA{})));
  Tensor sums = partition_fragment_C(multiply, Shape<_64, Int<kRows>>{});
  HeldColumns<Tile> held;
  float bias[2] = {0, 0};
  Place at, c;
  const auto free_stage = [&] {
    __syncwarp();
    uint64_t* const empty = &barriers.empty[at.slot];
    if (Tile::kPairs && params.is_paired) {
      if (lane < 2) ClusterBarrier::arrive(empty, lane, /*predicate=*/1);  // either block's
    } else if (lane == 0) {
      ClusterBarrier::arrive(empty);
    }
    at.advance(1, Tile::kStages);
  };
  for (Walk walk(params.cut, params.cut.m_blocks, static_cast<int>(blockIdx.x)); !walk.at_end(); walk.next()) {
    if (walk.is_first_of_group()) {
      for (int stage = 0; stage < Tile::kStagesOfB; ++stage) {
        ClusterBarrier::wait(&barriers.full[at.slot], at.parity);
        if (part / Tile::kPartsOfStage == stage)
          held.read(stages + at.slot * Tile::kABytes + part % Tile::kPartsOfStage * Tile::kPartBytes,
                    params.is_b_transposed);
        free_stage();
      }
      if (params.bias) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int of_c = walk.n_block * Tile::kN + part * kFloats + column + below * 8;
          bias[below] = of_c < params.n ? params.bias[walk.head * params.bias_batch_stride + of_c] : 0;
        }
      }
    }
    ClusterBarrier::wait(&barriers.full[at.slot], at.parity);
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < HeldColumns<Tile>::kSteps; ++step) {
      multiply.accumulate_ = step == 0 ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
      gemm(multiply, held.fragment(_, step), a_pieces(_, rows_below, step, at.slot), sums(_, 0, 0));
    }
    warpgroup_commit_batch();
    ClusterBarrier::wait(&barriers.c_empty[c.slot], c.parity ^ 1);
    warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
    free_stage();
    unsigned char* const panel = tiles + c.slot * Tile::kCBytes + part * Tile::kPanelBytes;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        unsigned char* const to = panel + place_of_float(rows_below * kRows + lane % 4 * 2 + side, column + below * 8);
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j)
          *reinterpret_cast<float*>(to + j * 8 * kRowBytes) = sums(j * 4 + below * 2 + side) + bias[below];
      }
    }
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (lane == 0) ClusterBarrier::arrive(&barriers.c_full[c.slot]);
    c.advance(1, Tile::kRing);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) tf32_kernel(const __grid_constant__ Tf32Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char raw[];
  unsigned char* const stages =
      raw + (kSharedAlignment - cute::cast_smem_ptr_to_uint(raw) % kSharedAlignment) % kSharedAlignment;
  unsigned char* const tiles = stages + Tile::kStages * Tile::kABytes;
  auto& barriers = *reinterpret_cast<typename Tile::Barriers*>(tiles + Tile::kRing * Tile::kCBytes);
  if (threadIdx.x == 0) {
    constexpr int kWarps = Tile::kMultipliers / kWarp;
    cute::prefetch_tma_descriptor(&params.a);
    cute::prefetch_tma_descriptor(&params.b);
    cute::prefetch_tma_descriptor(&params.c);
    for (int i = 0; i < Tile::kStages; ++i) {
      ClusterBarrier::init(&barriers.full[i], 1);
      ClusterBarrier::init(&barriers.empty[i], Tile::kPairs && params.is_paired ? 2 * kWarps : kWarps);
    }
    for (int i = 0; i < Tile::kRing; ++i) {
      ClusterBarrier::init(&barriers.c_full[i], kWarps);
      ClusterBarrier::init(&barriers.c_empty[i], 1);
    }
    cutlass::arch::fence_barrier_init();
  }
  const auto meet = [] {  // a block of its own is a cluster, too
    if constexpr (Tile::kPairs) {
      cute::cluster_sync();
    } else {
      __syncthreads();
    }
  };
  meet();
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
  if (threadIdx.x >= kGroup) {
    cutlass::arch::warpgroup_reg_alloc<Tile::kMultiplying>();
    multiply_all<Tile>(params, barriers, stages, tiles);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<Tile::kMoving>();
    if (threadIdx.x == 0) bring_all<Tile>(params, barriers, stages);
    if (threadIdx.x == kWarp) store_all<Tile>(params, barriers, tiles);
    __syncwarp();
  }
  if constexpr (Tile::kPairs) meet();  // neither leaves while the other may still write to its shared memory
#else
  __trap();  // machine code for another architecture: takes_tf32_sm90 keeps the host from launching it
#endif
}

}  // namespace mhmatmul::cuda::sm90
