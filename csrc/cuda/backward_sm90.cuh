// The gradients of the head-wise product on Hopper, grad_output read once for both, or for the second alone:
//   grad_input[r, n] = grad_output[r, n] weight[n]^T
//   grad_weight[n]   = the sum over r of input[r, n]^T grad_output[r, n]
// Bound by the bytes of grad_output, the largest of all; two products would read it twice.
//
// A block owns kHd inputs of a head and all its e outputs: weight's piece stays in shared memory, grad_weight's in
// registers, while rows stream by, 64 at a time. Where a head needs several blocks, two form a cluster, and each brings
// half of the rows of grad_output for both. Four warpgroups (or three): the first brings rows, the second multiplies
// them by weight and writes grad_input, the others sum grad_weight.
//
// Gathered: row r of input and of grad_input is row indices[r], of which none comes twice. Rows of input come by
// cp.async, and rows of grad_input are written one by one. An index that names no row has no row of grad_input, and
// whatever its row of grad_output holds counts for nothing.
//
// A segment is every splits-th tile of one head's rows. Segments are dealt to clusters in turn. Where a head has
// several, each writes its sum of grad_weight in float32 for itself, and add_splits_kernel adds them in order: the same
// bits every time.
#pragma once

#include "backward_walk.h"
#include "sm90.cuh"

namespace mhmatmul::cuda::sm90 {

constexpr int kRows = 64;                       // of a stage
constexpr int kPanelBytes = kRows * kRowBytes;  // 64 rows of 64 columns
constexpr int kMostBackwardStages = 8;

template <class Element_, int hd, int e, int cluster, bool gathers>
struct BackwardTile {
  using Element = Element_;
  static constexpr int kHd = hd, kE = e, kCluster = cluster;
  static constexpr bool kGathers = gathers;
  // Warpgroups that sum grad_weight lie side by side in e, or one below the other in hd; 64 x 256 each at most.
  static constexpr bool kSplitsE = e > 256;
  static constexpr int kSummingGroups = kSplitsE || hd > 64 ? 2 : 1;
  static constexpr int kThreads = (2 + kSummingGroups) * kGroup;
  static constexpr int kChunks = kSplitsE ? 2 : 1, kChunk = e / kChunks;  // columns that come and go together
  static constexpr int kInputBytes = hd / 64 * kPanelBytes, kChunkBytes = kChunk / 64 * kPanelBytes;
  static constexpr int kGradBytes = kChunks * kChunkBytes, kWeightBytes = e / 64 * hd * kRowBytes;
  static constexpr int kM = kRows, kN = hd, kHeadN = hd;  // of grad_input's tile, for round_into
  static constexpr int kCBytes = kInputBytes;
};

struct BackwardBarriers {
  uint64_t input_full[kMostBackwardStages], input_empty[kMostBackwardStages];
  uint64_t grad_full[kMostBackwardStages][2], grad_empty[kMostBackwardStages][2];
  uint64_t weight_full;
};

template <class Tile>
constexpr int kBackwardFixedBytes =
    Tile::kWeightBytes + Tile::kCBytes + static_cast<int>(sizeof(BackwardBarriers)) + kSharedAlignment;
template <class Tile>
constexpr int kBackwardStages =
    (kSharedBytes - kBackwardFixedBytes<Tile>) / (Tile::kInputBytes + Tile::kGradBytes) < kMostBackwardStages
        ? (kSharedBytes - kBackwardFixedBytes<Tile>) / (Tile::kInputBytes + Tile::kGradBytes)
        : kMostBackwardStages;
template <class Tile>
constexpr int kBackwardBytes =
    kBackwardFixedBytes<Tile> + kBackwardStages<Tile> * (Tile::kInputBytes + Tile::kGradBytes);

struct BackwardParams {
  CUtensorMap input, grad_output, weight, grad_input;
  // When gathered, in place of two of these; and one row of grad_output.
  CUtensorMap grad_output_row;
  const void* input_rows;
  void* grad_input_rows;  // of heads * hd elements
  const int64_t* indices;
  int64_t input_stride, input_head_stride, named_rows;
  void* grad_weight;  // [nh, hd, e], when a head is one segment
  float* partial;     // else [splits, nh, hd, e]
  int m, hd, e;
  bool wants_input;  // its gradient
  BackwardCut cut;
};

// The part of gathered rows that one thread of a warpgroup moves: one 16-byte piece of every 16th row.
struct OwnPieces {
  static constexpr int kPieces = kRowBytes / 16, kStep = kGroup / kPieces, kCount = kRows / kStep;
  int piece = static_cast<int>(threadIdx.x) % kPieces;
  int first_row = static_cast<int>(threadIdx.x) % kGroup / kPieces;

  __device__ void read(const BackwardParams& params, int tile, int64_t (&indices)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = tile * kRows + first_row + i * kStep;
      indices[i] = row < params.m ? params.indices[row] : -1;
    }
  }
  // Of a row's piece in a panel of 64 columns. Rows are a multiple of 8 apart: one swizzle for all.
  __device__ int offset(int i) const {
    return (first_row + i * kStep) * kRowBytes + (piece ^ (first_row % kPieces)) * 16;
  }
};

__device__ inline bool names_row(const BackwardParams& params, int64_t index) {
  return index >= 0 && index < params.named_rows;
}

// Brings a tile's rows of input by cp.async, zeros for those that are not named. Called by a warpgroup.
template <class Tile>
__device__ void gather_input(const BackwardParams& params, const OwnPieces& own,
                             const int64_t (&indices)[OwnPieces::kCount], unsigned char* stage, int first_input,
                             int head) {
  const auto* const base = static_cast<const unsigned char*>(params.input_rows) +
                           (head * params.input_head_stride + first_input + own.piece * 8) * 2;
  const uint32_t to = cute::cast_smem_ptr_to_uint(stage);
#pragma unroll
  for (int i = 0; i < OwnPieces::kCount; ++i) {
    const bool is_named = names_row(params, indices[i]);
    const auto* const source = base + (is_named ? indices[i] * params.input_stride * 2 : 0);
#pragma unroll
    for (int panel = 0; panel < Tile::kHd / 64; ++panel) {
      const bool inside = first_input + panel * 64 + own.piece * 8 < params.hd;
      copy_16_bytes(to + panel * kPanelBytes + own.offset(i), source + (inside ? panel * kRowBytes : 0),
                    !is_named || !inside);
    }
  }
}

// One panel of grad_output on its way to all blocks of the cluster.
template <class Tile>
__device__ void bring_grad(const CUtensorMap& map, uint64_t* full, unsigned char* to, int column, int head, int row) {
  if constexpr (Tile::kCluster == 1) {
    bring(map, full, to, column, head, row);
  } else {
    bring_to_all(map, full, to, Tile::kCluster, column, head, row);
  }
}

// Which rows of a tile this block brings of grad_output, and which of them count for nothing: a bit each. A warp's.
template <class Tile>
struct Share {
  static constexpr int kCount = kRows / Tile::kCluster;
  static constexpr uint64_t kAll = ~uint64_t{0} >> (64 - kCount);
  int64_t indices[kCount / kWarp];

  __device__ void read(const BackwardParams& params, int first_row) {
#pragma unroll
    for (int i = 0; i < kCount / kWarp; ++i) {
      const int row = first_row + i * kWarp + static_cast<int>(threadIdx.x) % kWarp;
      indices[i] = row < params.m ? params.indices[row] : 0;  // rows beyond the last come as zeros anyway
    }
  }
  __device__ uint64_t unnamed(const BackwardParams& params) const {
    uint64_t bits = 0;
#pragma unroll
    for (int i = 0; i < kCount / kWarp; ++i)
      bits |= uint64_t{__ballot_sync(~0u, !names_row(params, indices[i]))} << i * kWarp;
    return bits;
  }
};

// One tile's share of grad_output. Called by one thread or, when gathered, by a warp.
template <class Tile>
__device__ void bring_grad_output(const BackwardParams& params, BackwardBarriers& barriers, unsigned char* stages,
                                  const Place& at, int rank, int head, int first_row, uint64_t unnamed) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    uint64_t* const full = &barriers.grad_full[at.slot][chunk];
    wait_for(&barriers.grad_empty[at.slot][chunk], at.parity ^ 1);
    if (lane == 0) ClusterTransactionBarrier::arrive_and_expect_tx(full, Tile::kChunkBytes);
    unsigned char* const to =
        stages + at.slot * Tile::kGradBytes + chunk * Tile::kChunkBytes + rank * Share<Tile>::kCount * kRowBytes;
    for (int panel = 0; panel < Tile::kChunk / 64; ++panel) {
      const int column = chunk * Tile::kChunk + panel * 64;
      // What lies beyond the last row comes as zeros.
      if (unnamed == 0 || unnamed == Share<Tile>::kAll) {
        if (lane == 0)
          bring_grad<Tile>(params.grad_output, full, to + panel * kPanelBytes, column, head,
                           unnamed == 0 ? first_row : params.m);
        continue;
      }
      for (int i = lane; i < Share<Tile>::kCount; i += kWarp)
        bring_grad<Tile>(params.grad_output_row, full, to + panel * kPanelBytes + i * kRowBytes, column, head,
                         unnamed >> i & 1 ? params.m : first_row + i);
    }
  }
}

// Called by a warpgroup; when rows are not gathered, by one thread.
template <class Tile>
__device__ void bring_rows(const BackwardParams& params, BackwardBarriers& barriers, unsigned char* input_stages,
                           unsigned char* grad_stages, int team, int rank) {
  [[maybe_unused]] const OwnPieces pieces;
  [[maybe_unused]] int64_t indices[OwnPieces::kCount];
  [[maybe_unused]] Share<Tile> share;
  Place at;
  for (int segment = team; segment < params.cut.segments(); segment += params.cut.teams) {
    const Segment own(params.cut, segment);
    const int first_input = (own.hd_group * Tile::kCluster + rank) * Tile::kHd;
    const auto first_row_of = [&](int tile) { return tile * kRows + rank * Share<Tile>::kCount; };
    if constexpr (Tile::kGathers) {
      pieces.read(params, own.begin, indices);
      share.read(params, first_row_of(own.begin));
    }
    for (int tile = own.begin; tile < params.cut.row_tiles; tile += own.step) {
      unsigned char* const input = input_stages + at.slot * Tile::kInputBytes;
      uint64_t* const input_full = &barriers.input_full[at.slot];
      uint64_t unnamed = 0;
      wait_for(&barriers.input_empty[at.slot], at.parity ^ 1);
      if constexpr (Tile::kGathers) {
        gather_input<Tile>(params, pieces, indices, input, first_input, own.head);
        cutlass::arch::cpasync_barrier_arrive_noinc(input_full);
        unnamed = share.unnamed(params);
        if (const int next = tile + own.step; next < params.cut.row_tiles) {  // on their way while this tile is brought
          pieces.read(params, next, indices);
          share.read(params, first_row_of(next));
        }
      } else {
        ClusterTransactionBarrier::arrive_and_expect_tx(input_full, Tile::kInputBytes);
        for (int panel = 0; panel < Tile::kHd / 64; ++panel)
          bring(params.input, input_full, input + panel * kPanelBytes, first_input + panel * 64, own.head,
                tile * kRows);
      }
      if (threadIdx.x < kWarp)
        bring_grad_output<Tile>(params, barriers, grad_stages, at, rank, own.head, first_row_of(tile), unnamed);
      at.advance(1, kBackwardStages<Tile>);
    }
  }
}

// Lets go of a piece of grad_output, which the blocks of a cluster fill for one another.
template <class Tile>
__device__ void release_grad(uint64_t* empty) {
  if (threadIdx.x % kWarp != 0) return;
  if constexpr (Tile::kCluster == 1) {
    ClusterBarrier::arrive(empty);
  } else {
    for (int rank = 0; rank < Tile::kCluster; ++rank) ClusterBarrier::arrive(empty, rank, 1);
  }
}

// In place of the next: lets go of what the sums of grad_weight alone are made from.
template <class Tile>
__device__ void skip_grad_input(const BackwardParams& params, BackwardBarriers& barriers, int team) {
  Place at;
  for (int segment = team; segment < params.cut.segments(); segment += params.cut.teams) {
    const Segment own(params.cut, segment);
    for (int tile = own.begin; tile < params.cut.row_tiles; tile += own.step) {
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
        wait_for(&barriers.grad_full[at.slot][chunk], at.parity);
        release_grad<Tile>(&barriers.grad_empty[at.slot][chunk]);
      }
      at.advance(1, kBackwardStages<Tile>);
    }
  }
}

template <class Tile>
__device__ void make_grad_input(const BackwardParams& params, BackwardBarriers& barriers, unsigned char* grad_stages,
                                unsigned char* weight, unsigned char* tile_out, int team, int rank) {
  using namespace cute;
  using Element = typename Tile::Element;
  using Multiply =
      decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<Tile::kHd>, Int<64>>,
                                                   GMMA::Major::K, GMMA::Major::K>()));
  using LayoutA = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                         Shape<_64, Int<Tile::kE>, Int<kBackwardStages<Tile>>>{}));
  using LayoutB = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<Tile::kHd>, Int<Tile::kE>>{}));
  if (!params.wants_input) return skip_grad_input<Tile>(params, barriers, team);
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  Multiply multiply;
  const auto slice = multiply.get_slice(thread);
  const Tensor a_pieces = slice.make_fragment_A(
      slice.partition_A(make_tensor(make_smem_ptr(reinterpret_cast<Element*>(grad_stages)), LayoutA{})));
  const Tensor b_pieces = slice.make_fragment_B(
      slice.partition_B(make_tensor(make_smem_ptr(reinterpret_cast<Element*>(weight)), LayoutB{})));
  Tensor sums = partition_fragment_C(multiply, Shape<_64, Int<Tile::kHd>>{});
  constexpr int kSteps = Tile::kChunk / 16;  // of wgmma's depth

  const auto first_input_of = [&](const Segment& own) { return (own.hd_group * Tile::kCluster + rank) * Tile::kHd; };
  const auto bring_weight = [&](int segment) {
    if (thread != 0 || segment >= params.cut.segments()) return;
    const Segment own(params.cut, segment);
    ClusterTransactionBarrier::arrive_and_expect_tx(&barriers.weight_full, Tile::kWeightBytes);
    for (int panel = 0; panel < Tile::kE / 64; ++panel)
      bring(params.weight, &barriers.weight_full, weight + panel * Tile::kHd * kRowBytes, panel * 64,
            first_input_of(own), own.head);
  };
  bring_weight(team);
  Place at;
  uint32_t weight_parity = 0;
  [[maybe_unused]] const OwnPieces pieces;
  for (int segment = team; segment < params.cut.segments(); segment += params.cut.teams, weight_parity ^= 1) {
    const Segment own(params.cut, segment);
    const int first_input = first_input_of(own);
    wait_for(&barriers.weight_full, weight_parity);
    for (int tile = own.begin; tile < params.cut.row_tiles; tile += own.step) {
      [[maybe_unused]] int64_t indices[OwnPieces::kCount];
      if constexpr (Tile::kGathers) pieces.read(params, tile, indices);  // on their way while the tile is multiplied
      multiply.accumulate_ = GMMA::ScaleOut::Zero;
      warpgroup_fence_operand(sums);
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
        wait_for(&barriers.grad_full[at.slot][chunk], at.parity);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          gemm(multiply, a_pieces(_, _, chunk * kSteps + k, at.slot), b_pieces(_, _, chunk * kSteps + k), sums);
          multiply.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
      }
      if constexpr (Tile::kChunks == 2) {
        warpgroup_wait<1>();
        release_grad<Tile>(&barriers.grad_empty[at.slot][0]);
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(sums);
      release_grad<Tile>(&barriers.grad_empty[at.slot][Tile::kChunks - 1]);
      at.advance(1, kBackwardStages<Tile>);

      if (!Tile::kGathers && thread == 0) tma_store_wait<0>();  // the tile before has been read out of tile_out
      cutlass::arch::NamedBarrier::sync(kGroup, 0);
      if (tile + own.step >= params.cut.row_tiles)
        bring_weight(segment + params.cut.teams);  // all four warps have multiplied
      round_into<Tile>(tile_out, sums, static_cast<int>(threadIdx.x) % kGroup);
      if constexpr (Tile::kGathers) {
        cutlass::arch::NamedBarrier::sync(kGroup, 0);
        auto* const base = static_cast<unsigned char*>(params.grad_input_rows) +
                           (int64_t{own.head} * params.hd + first_input + pieces.piece * 8) * 2;
        const int64_t stride = int64_t{params.cut.heads} * params.hd * 2;
#pragma unroll
        for (int i = 0; i < OwnPieces::kCount; ++i) {
          if (!names_row(params, indices[i])) continue;
#pragma unroll
          for (int panel = 0; panel < Tile::kHd / 64; ++panel)
            if (first_input + panel * 64 + pieces.piece * 8 < params.hd)
              *reinterpret_cast<uint4*>(base + indices[i] * stride + panel * kRowBytes) =
                  *reinterpret_cast<const uint4*>(tile_out + panel * kPanelBytes + pieces.offset(i));
        }
        continue;
      }
      fence_shared_memory();
      cutlass::arch::NamedBarrier::sync(kGroup, 0);
      if (thread == 0) {
        for (int panel = 0; panel < Tile::kHd / 64; ++panel) {
          const int column = first_input + panel * 64;
          if (column < params.hd)
            SM90_TMA_STORE_3D::copy(&params.grad_input, tile_out + panel * kPanelBytes, column, own.head, tile * kRows);
        }
        tma_store_arrive();
      }
    }
  }
  if (thread == 0) tma_store_wait<0>();
}

__device__ inline void store_pair(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(low, high);
}
template <class Element>
__device__ void store_pair(Element* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) = pack(low, high, Element{});
}

template <class Tile>
__device__ void sum_grad_weight(const BackwardParams& params, BackwardBarriers& barriers, unsigned char* input_stages,
                                unsigned char* grad_stages, int team, int rank) {
  using namespace cute;
  using Element = typename Tile::Element;
  // Of one instruction: one that takes all 256 may not have more registers than the kernel is launched with.
  constexpr int kColumns = Tile::kChunk < 128 ? Tile::kChunk : 128, kBlocks = Tile::kChunk / kColumns;
  using Multiply =
      decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kColumns>, Int<kRows>>,
                                                   GMMA::Major::MN, GMMA::Major::MN>()));
  using LayoutA =
      decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{},
                             Shape<Int<Tile::kHd>, Int<kRows>, Int<kBackwardStages<Tile>>>{}, Step<_2, _1, _3>{}));
  using LayoutB =
      decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{},
                             Shape<Int<Tile::kE>, Int<kRows>, Int<kBackwardStages<Tile>>>{}, Step<_2, _1, _3>{}));
  const int thread = static_cast<int>(threadIdx.x) % kGroup, group = static_cast<int>(threadIdx.x) / kGroup - 2;
  const int below = Tile::kSplitsE ? 0 : group, beside = Tile::kSplitsE ? group : 0;  // blocks of 64, of kChunk
  Multiply multiply;
  const auto slice = multiply.get_slice(thread);
  const Tensor a_pieces = slice.make_fragment_A(
      slice.partition_A(make_tensor(make_smem_ptr(reinterpret_cast<Element*>(input_stages)), LayoutA{})));
  const Tensor b_pieces = slice.make_fragment_B(
      slice.partition_B(make_tensor(make_smem_ptr(reinterpret_cast<Element*>(grad_stages)), LayoutB{})));
  Tensor sums = partition_fragment_C(multiply, Shape<_64, Int<Tile::kChunk>>{});

  Place at;
  for (int segment = team; segment < params.cut.segments(); segment += params.cut.teams) {
    const Segment own(params.cut, segment);
    multiply.accumulate_ = GMMA::ScaleOut::Zero;
    for (int tile = own.begin; tile < params.cut.row_tiles; tile += own.step) {
      wait_for(&barriers.input_full[at.slot], at.parity);
      wait_for(&barriers.grad_full[at.slot][beside], at.parity);
      if constexpr (Tile::kGathers) fence_shared_memory();  // cp.async wrote for wgmma to read
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kRows / 16; ++k) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
          gemm(multiply, a_pieces(_, below, k, at.slot), b_pieces(_, beside * kBlocks + n, k, at.slot), sums(_, 0, n));
        multiply.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      // Not kept until the next tile has come: there are few stages, and the other warpgroups keep the units busy.
      warpgroup_wait<0>();
      if (thread % kWarp == 0) ClusterBarrier::arrive(&barriers.input_empty[at.slot]);
      release_grad<Tile>(&barriers.grad_empty[at.slot][beside]);
      at.advance(1, kBackwardStages<Tile>);
    }
    warpgroup_fence_operand(sums);

    const int first_row = (own.hd_group * Tile::kCluster + rank) * Tile::kHd + below * 64 + thread / kWarp * 16;
    const auto write = [&](auto* to) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + half * 8 + thread % kWarp / 4;
        if (row >= params.hd) continue;
        auto* const out = to + (int64_t{own.head} * params.hd + row) * params.e;
#pragma unroll
        for (int j = 0; j < Tile::kChunk / 8; ++j) {
          const int column = beside * Tile::kChunk + j * 8 + thread % 4 * 2;
          if (column < params.e) store_pair(out + column, sums(j * 4 + half * 2), sums(j * 4 + half * 2 + 1));
        }
      }
    };
    if (params.partial) {
      write(params.partial + int64_t{own.split} * params.cut.heads * params.hd * params.e);
    } else {
      write(static_cast<Element*>(params.grad_weight));
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) backward_kernel(const __grid_constant__ BackwardParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  unsigned char* const shared = aligned_shared_memory();
  unsigned char* const input_stages = shared;
  unsigned char* const grad_stages = input_stages + kBackwardStages<Tile> * Tile::kInputBytes;
  unsigned char* const weight = grad_stages + kBackwardStages<Tile> * Tile::kGradBytes;
  unsigned char* const tile_out = weight + Tile::kWeightBytes;
  auto& barriers = *reinterpret_cast<BackwardBarriers*>(tile_out + Tile::kCBytes);
  const int rank = Tile::kCluster == 1 ? 0 : static_cast<int>(cute::block_rank_in_cluster());
  const int team = static_cast<int>(blockIdx.x) / Tile::kCluster;

  if (threadIdx.x == 0) {
    constexpr int kWarps = kGroup / kWarp;
    constexpr int kReadersOfGrad = (Tile::kSplitsE ? 2 : 1 + Tile::kSummingGroups) * Tile::kCluster;
    for (int i = 0; i < kBackwardStages<Tile>; ++i) {
      ClusterBarrier::init(&barriers.input_full[i], Tile::kGathers ? kGroup : 1);
      ClusterBarrier::init(&barriers.input_empty[i], Tile::kSummingGroups * kWarps);
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
        ClusterBarrier::init(&barriers.grad_full[i][chunk], 1);
        ClusterBarrier::init(&barriers.grad_empty[i][chunk], kReadersOfGrad * kWarps);
      }
    }
    ClusterBarrier::init(&barriers.weight_full, 1);
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (Tile::kCluster == 1) {
    __syncthreads();
  } else {
    cute::cluster_sync();
  }
  follow_kernel_before();

  constexpr bool kIsFull = Tile::kThreads == 4 * kGroup;  // 128 registers a thread at launch, else 168
  // Nobody leaves while another may still signal to it. Said three times: registers are dealt out only where the
  // warpgroups' ways do not meet again.
  const auto leave = [] {
    __syncwarp();  // one lane of a warp may have worked alone
    if constexpr (Tile::kCluster > 1) cute::cluster_sync();
  };
  const int group = static_cast<int>(threadIdx.x) / kGroup;
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kIsFull ? (Tile::kGathers ? 56 : 40) : 72>();
    if (Tile::kGathers || threadIdx.x == 0) bring_rows<Tile>(params, barriers, input_stages, grad_stages, team, rank);
    leave();
  } else if (group == 1) {
    cutlass::arch::warpgroup_reg_dealloc<kIsFull ? 120 : 160>();
    make_grad_input<Tile>(params, barriers, grad_stages, weight, tile_out, team, rank);
    leave();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kIsFull ? (Tile::kGathers ? 168 : 176) : 232>();
    sum_grad_weight<Tile>(params, barriers, input_stages, grad_stages, team, rank);
    leave();
  }
#else
  __trap();  // machine code for another architecture: takes_backward_sm90 keeps the host from launching it
#endif
}

// to[i] = the sum over the splits of partial[split, i], in order, rounded once.
template <class Element>
__global__ void add_splits_kernel(const float4* partial, int splits, int64_t count, uint2* to) {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  float4 sum = partial[i];
  for (int split = 1; split < splits; ++split) {
    const float4 next = partial[split * count + i];
    sum = make_float4(sum.x + next.x, sum.y + next.y, sum.z + next.z, sum.w + next.w);
  }
  to[i] = make_uint2(pack(sum.x, sum.y, Element{}), pack(sum.z, sum.w, Element{}));
}

}  // namespace mhmatmul::cuda::sm90
