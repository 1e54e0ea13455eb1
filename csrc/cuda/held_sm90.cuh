// The product of gemm_sm90.cuh for heads of up to 128 inputs and 512 outputs: what is written at one time lies closer
// together the fewer rows a tile has, and here it has 32, by all columns.
//
// The matrix unit has 64 rows, so it makes the transposed tile, C^T = B^T A^T: its 64 rows are columns of B, which four
// warpgroups hold in registers among themselves, its columns are rows of A. A block has one group of tiles, so that B
// comes once, through shared memory, which is then room for tiles of C.
//
// A warpgroup's unit of work is 64 columns of a tile. It multiplies the next unit while it rounds one and turns it.
// When all have turned theirs, one thread hands the tile to the copy engine: what the warpgroups would hand over each
// for itself is written 5 % slower.
//
// Sums are taken as in gemm_sm90.cuh: the same bits.
#pragma once

#include "gemm_sm90.cuh"

namespace mhmatmul::cuda::sm90 {

template <class Element_, bool b_is_transposed>
struct HeldTile {
  using Element = Element_;
  static constexpr int kM = 32, kK = 128, kN = 512, kHeads = 1, kHeadN = kN;
  static constexpr bool kGathers = false, kTransposed = b_is_transposed;
  static constexpr int kGroups = 4, kThreads = kGroups * kGroup;  // no more, for 128 registers each
  static constexpr int kDepths = kK / kDepth, kSteps = kK / 16;
  static constexpr int kPanelBytes = kM * kRowBytes, kBPanelBytes = kK * kRowBytes;  // of C or A, and of B: 64 columns
  static constexpr int kABytes = kDepths * kPanelBytes, kBBytes = kN / kDepth * kBPanelBytes;
  static constexpr int kBoxRowsOfB = kDepth;
  static constexpr int kRing = kBPanelBytes / kPanelBytes;  // tiles of C on their way, in the room of each panel of B
  static constexpr int kStages = (kSharedBytes - kFixedBytes - kBBytes) / kABytes;
  static constexpr int kBytes = kFixedBytes + kBBytes + kStages * kABytes;
  static_assert(kN == 2 * 64 * kGroups && kStages >= 2 && kStages <= kMaxStages && kRing >= 2);
};

// B, in panels of 64 columns, as 64 rows along k or, transposed, as 64 columns below one another, 64 along k at a time.
// Called by one thread.
template <class Tile>
__device__ void bring_held(const Params& params, uint64_t* full, unsigned char* b, int head) {
  ClusterTransactionBarrier::arrive_and_expect_tx(full, Tile::kBBytes);
  for (int panel = 0; panel < Tile::kN / kDepth; ++panel) {
    for (int i = 0; i < Tile::kDepths; ++i) {
      const int x = Tile::kTransposed ? i : panel, y = Tile::kTransposed ? panel : i;
      bring(params.b, full, b + (panel * Tile::kDepths + i) * kDepth * kRowBytes, x * kDepth, y * kDepth, head);
    }
  }
}

// The rows of A of one tile. Called by one thread.
template <class Tile>
__device__ void bring_rows_of(const Params& params, Barriers& barriers, unsigned char* a_stages, const Place& at,
                              int head, int m_block) {
  wait_for(&barriers.a_empty[at.slot], at.parity ^ 1);
  uint64_t* const full = &barriers.a_full[at.slot];
  ClusterTransactionBarrier::arrive_and_expect_tx(full, Tile::kABytes);
  for (int i = 0; i < Tile::kDepths; ++i)
    bring(params.a, full, a_stages + at.slot * Tile::kABytes + i * Tile::kPanelBytes, i * kDepth, head,
          m_block * Tile::kM);
}

// Four 8 x 8 matrices of B^T, as the matrix unit takes a warp's 16 of its rows, and 16 along k, of a panel.
template <class Tile>
__device__ void load_b(const unsigned char* panel, int step, uint32_t (&to)[4]) {
  const int warp = static_cast<int>(threadIdx.x) % kGroup / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int column = warp * 16 + lane / 8 % 2 * 8, k = step * 16 + lane / 16 * 8;  // of the matrix
  const int row = Tile::kTransposed ? k / kDepth * kDepth + column + lane % 8 : k + lane % 8;
  const int piece = Tile::kTransposed ? k % kDepth / 8 : column / 8;
  const uint32_t from = cute::cast_smem_ptr_to_uint(panel) + place_in_panel(row, piece * 8);
  if constexpr (Tile::kTransposed) {
    asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  } else {
    asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  }
}

// Rounds the sums of 64 columns and all rows of a tile, transposed, into a panel of C.
template <class Tile, class Sums>
__device__ void turn_into(unsigned char* panel, const Sums& sums) {
  using Element = typename Tile::Element;
  const int warp = static_cast<int>(threadIdx.x) % kGroup / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int piece = warp * 2 + lane / 8 % 2;  // of 8 columns, 16 bytes
#pragma unroll
  for (int j = 0; j < Tile::kM / 8; j += 2) {
    const int row = (j + lane / 16) * 8 + lane % 8;  // that this lane gives the address of
    const uint32_t target = cute::cast_smem_ptr_to_uint(panel) + place_in_panel(row, piece * 8);
    asm volatile(
        "stmatrix.sync.aligned.x4.trans.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(target),
        "r"(pack(sums(j * 4 + 0), sums(j * 4 + 1), Element{})), "r"(pack(sums(j * 4 + 2), sums(j * 4 + 3), Element{})),
        "r"(pack(sums(j * 4 + 4), sums(j * 4 + 5), Element{})), "r"(pack(sums(j * 4 + 6), sums(j * 4 + 7), Element{}))
        : "memory");
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) held_kernel(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace cute;
  using Element = typename Tile::Element;
  using Multiply =
      decltype(make_tiled_mma(GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<Tile::kM>, Int<kDepth>>,
                                                   GMMA::Major::K, GMMA::Major::K>()));
  using LayoutA = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                         Shape<Int<Tile::kM>, Int<Tile::kK>, Int<Tile::kStages>>{}));
  unsigned char* const b = aligned_shared_memory();
  unsigned char* const a_stages = b + Tile::kBBytes;
  auto& barriers = *reinterpret_cast<Barriers*>(a_stages + Tile::kStages * Tile::kABytes);
  const int group = static_cast<int>(threadIdx.x) / kGroup, thread = static_cast<int>(threadIdx.x) % kGroup;
  const int warp = thread / kWarp, lane = thread % kWarp;

  if (threadIdx.x == 0) {
    prefetch_tma_descriptor(&params.a);
    prefetch_tma_descriptor(&params.b);
    prefetch_tma_descriptor(&params.c);
    for (int i = 0; i < Tile::kStages; ++i) {
      ClusterBarrier::init(&barriers.a_full[i], 1);
      ClusterBarrier::init(&barriers.a_empty[i], Tile::kThreads / kWarp);
    }
    ClusterBarrier::init(barriers.b_full, 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  follow_kernel_before();

  const Walk walk(params.cut, params.cut.m_blocks, static_cast<int>(blockIdx.x));
  const int head = walk.head, tiles = walk.left_in_group() + 1;
  const auto m_block_of = [&](int tile) { return walk.m_block + tile * params.cut.step; };
  constexpr int kAhead = Tile::kStages - 1;  // the stage of the tile before may still be read
  Place ahead;
  const auto bring_ahead = [&](int tile) {
    if (threadIdx.x == 0 && tile < tiles)
      bring_rows_of<Tile>(params, barriers, a_stages, ahead, head, m_block_of(tile));
    ahead.advance(1, Tile::kStages);
  };
  if (threadIdx.x == 0) bring_held<Tile>(params, barriers.b_full, b, head);
  for (int tile = 0; tile < kAhead; ++tile) bring_ahead(tile);
  __syncwarp();

  // This warpgroup's two panels, of B and then of C.
  unsigned char* const panels[] = {b + 2 * group * Tile::kBPanelBytes, b + (2 * group + 1) * Tile::kBPanelBytes};
  Tensor held = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _2, Int<Tile::kSteps>>>{});
  Tensor words = recast<uint32_t>(held);
  wait_for(barriers.b_full, 0);
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) {
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      uint32_t four[4];
      load_b<Tile>(panels[panel], step, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) words(i, panel, step) = four[i];
    }
  }
  cutlass::arch::NamedBarrier::sync(kGroup, group);  // from here on B's panels are C's

  Multiply multiply;
  const auto slice = multiply.get_slice(thread);
  const Tensor a_pieces = slice.make_fragment_B(
      slice.partition_B(make_tensor(make_smem_ptr(reinterpret_cast<Element*>(a_stages)), LayoutA{})));
  Tensor even = partition_fragment_C(multiply, Shape<_64, Int<Tile::kM>>{}), odd = make_fragment_like(even);
  Place next, done;  // stages of the tile to be multiplied next and of that to be rounded next

  // A tile beyond the last is multiplied by whatever is there, and no more is seen of it.
  const auto start = [&](int tile, int panel, auto& sums) {
    if (panel == 0 && tile < tiles) wait_for(&barriers.a_full[next.slot], next.parity);
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      multiply.accumulate_ = step == 0 ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
      gemm(multiply, held(_, panel, step), a_pieces(_, 0, step, next.slot), sums(_, 0, 0));
    }
    warpgroup_commit_batch();
    if (panel == 1) next.advance(1, Tile::kStages);
  };
  const auto turn = [&](int tile, int panel, auto& sums) {
    warpgroup_fence_operand(sums);
    if (params.bias) {
      const auto* const bias = static_cast<const Element*>(params.bias) + head * params.bias_batch_stride;
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int column = (2 * group + panel) * kDepth + warp * 16 + below * 8 + lane / 4;
        const float term = column < params.n ? static_cast<float>(bias[column]) : 0;
#pragma unroll
        for (int j = 0; j < Tile::kM / 8; ++j) {
          sums(j * 4 + below * 2) += term;
          sums(j * 4 + below * 2 + 1) += term;
        }
      }
    }
    turn_into<Tile>(panels[panel] + tile % Tile::kRing * Tile::kPanelBytes, sums);
  };
  const auto hand_over = [&](int tile) {
    if (lane == 0) ClusterBarrier::arrive(&barriers.a_empty[done.slot]);
    done.advance(1, Tile::kStages);
    fence_shared_memory();
    if (threadIdx.x == 0) tma_store_wait<Tile::kRing - 2>();  // the next tile's place has been read out
    __syncthreads();
    if (threadIdx.x == 0 && tile < tiles) {
      for (int column = 0; column < params.n; column += kDepth)
        store(params.c, params.c_leaves_cache,
              b + column / kDepth * Tile::kBPanelBytes + tile % Tile::kRing * Tile::kPanelBytes, column, head,
              m_block_of(tile) * Tile::kM);
      tma_store_arrive();
    }
    bring_ahead(tile + kAhead);
    __syncwarp();
  };
  // Two tiles a round, between which nothing is being multiplied: ptxas wants it so.
  for (int tile = 0; tile < tiles; tile += 2) {
    start(tile, 0, even);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      start(tile + i, 1, odd);
      warpgroup_wait<1>();
      turn(tile + i, 0, even);
      if (i == 0) {
        start(tile + 1, 0, even);
        warpgroup_wait<1>();
      } else {
        warpgroup_wait<0>();
      }
      turn(tile + i, 1, odd);
      hand_over(tile + i);
    }
  }
  if (threadIdx.x == 0) tma_store_wait<0>();
#else
  __trap();  // machine code for another architecture: takes_sm90 keeps the host from launching it
#endif
}

}  // namespace mhmatmul::cuda::sm90
