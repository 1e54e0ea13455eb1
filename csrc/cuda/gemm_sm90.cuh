// C_i[m, n] = A_i[m, k] B_i[k, n] for one Hopper SM at a time, bound by the bytes of A and C.
//
// A block stays on its SM and works through tiles [kM, kN] of C. Tiles that share a piece of B (one head, one block of
// columns) follow one another, and B's piece stays in shared memory for all of them where it fits: from then on a tile
// reads kM rows of A and writes kM rows of C, and nothing else. Blocks side by side work on the same rows, in different
// columns, so that A comes from device memory once, and what is written at one time lies together.
//
// Three warpgroups. The first brings A and B: by the bulk copy engine, or, when rows are gathered, A by cp.async, one
// thread per 16 bytes. The other two take tiles in turn (ping-pong): while one multiplies, the other rounds its sums
// and writes them to C: straight from its registers, or through a tile in shared memory, of its own or, where A needs
// the room, one that both take in turn.
//
// Two rings of stages of kDepth along k, A's and B's, each with a barrier `full` (bytes have come) and one `empty`
// (their readers have gone). A stage of A is read by one warpgroup. A stage of B that stays is read by both and freed
// by both, after the last tile of its group; a B that does not stay is brought again for each tile, like A.
//
// Heads of 32 or 16 are packed: the tile is 64 columns of A and of C, which belong to two or four heads side by side,
// and each head's columns are multiplied by its own rows of B, nothing by zeros.
//
// Loose operands, at no multiples of 16 bytes, are moved by threads (loose_sm90.cuh).
//
// Every row is summed over k in steps of 16 from the lowest, into one float32 sum, whatever the tile: the same bits.
#pragma once

#include "loose_sm90.cuh"
#include "sm90.cuh"
#include "tile_walk.h"

namespace mhmatmul::cuda::sm90 {

constexpr int kThreads = 3 * kGroup;
constexpr int kMaxStages = 16;   // of one ring
constexpr int kRegisters = 168;  // of a thread, at launch: what kThreads leave it

template <class Element_, int m, int n, bool gathers, bool b_is_transposed, int heads = 1, bool is_loose = false>
struct Tile {
  using Element = Element_;
  static constexpr int kM = m, kN = n;
  static constexpr int kHeads = heads, kHeadN = n / heads, kHeadK = kDepth / heads;  // packed side by side
  static constexpr bool kGathers = gathers, kTransposed = b_is_transposed, kLoose = is_loose;
  // Registers of a thread that brings and of one that multiplies.
  static constexpr int kBringing = is_loose ? 128 : (gathers ? 72 : 40);
  static constexpr int kMultiplying = is_loose ? 184 : (gathers ? 216 : 232);
  static_assert(kBringing + 2 * kMultiplying <= 3 * kRegisters);
  static_assert(!gathers || !is_loose);
  static_assert(heads == 1 || (n == kDepth && !b_is_transposed));
  static constexpr int kBoxRowsOfB = n;  // when transposed
  static constexpr int kABytes = m * kRowBytes, kBBytes = kHeadN * kRowBytes;
  static constexpr int kCBytes = m * n * 2;                  // where C goes through shared memory
  static constexpr int kPanels = (n + kDepth - 1) / kDepth;  // of C and of B: 64 columns each
};

struct Params {
  CUtensorMap a, b, c;
  const void* rows;  // A, when gathered
  void* c_rows;      // C, when threads write it
  const int64_t* indices;
  int64_t a_stride, a_batch_stride, a_rows, c_stride, c_batch_stride;
  const int32_t* rows_given;  // null, or how many of the m rows are there
  const void* bias;
  int64_t bias_batch_stride;
  LooseOperands loose;
  int m, n, k;
  bool c_leaves_cache;  // C is first to be evicted from L2
  Cut cut;
};

// Shared memory, in this order: stages of A, stages of B, tiles of C, barriers.
struct Barriers {
  uint64_t a_full[kMaxStages], a_empty[kMaxStages], b_full[kMaxStages], b_empty[kMaxStages];
};
constexpr int kFixedBytes = static_cast<int>(sizeof(Barriers)) + kSharedAlignment;

// How many tiles, one below the other, have m rows.
template <class Tile>
__device__ int blocks_of(int m) {
  return m / Tile::kM + (m % Tile::kM != 0);
}

// A tile of C, rounded into panels. Called by one thread.
template <class Tile>
__device__ void store_tile(const Params& params, const unsigned char* tile, int head, int n_block, int m_block) {
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    const int column = n_block * Tile::kN + panel * kDepth;
    if (column < params.n)
      store(params.c, params.c_leaves_cache, tile + panel * Tile::kM * kRowBytes, column, head, m_block * Tile::kM);
  }
  cute::tma_store_arrive();
}

// The part of gathered rows that one thread of the first warpgroup copies: one 16-byte piece of every 16th row.
template <class Tile>
struct GatheredRows {
  static constexpr int kPieces = kRowBytes / 16, kStep = kGroup / kPieces, kRows = Tile::kM / kStep;
  int64_t next[kRows];                 // indices of the tile to come, as they were read: looked at when they have come
  const unsigned char* source[kRows];  // of this tile's pieces, in A's first stage
  uint32_t named = 0;                  // bit i: row i names a row of A

  __device__ static int piece() { return static_cast<int>(threadIdx.x) % kPieces; }
  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / kPieces; }

  __device__ void read(const Params& params, int m, const Walk& walk) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = walk.m_block * Tile::kM + first_row() + i * kStep;
      next[i] = -1;
      if (!walk.at_end() && row < m) next[i] = params.indices[row];
    }
  }

  // Turns to the tile whose indices were read.
  __device__ void turn_to(const Params& params, int head) {
    const auto* const base =
        static_cast<const unsigned char*>(params.rows) + head * params.a_batch_stride * 2 + piece() * 16;
    named = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool is_named = next[i] >= 0 && next[i] < params.a_rows;
      named |= (is_named ? 1u : 0u) << i;
      source[i] = base + (is_named ? next[i] * params.a_stride * 2 : 0);
    }
  }

  __device__ void copy(const Params& params, int k_block, uint32_t stage) const {
    const bool inside = k_block * kDepth + piece() * 8 < params.k;
    // Rows are a multiple of 8 apart: one swizzle for all.
    const uint32_t to = stage + place_in_panel(first_row(), piece() * 8);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      copy_16_bytes(to + i * kStep * kRowBytes, source[i] + k_block * kRowBytes, !inside || !(named >> i & 1));
  }
};

// A stage of B.
template <class Tile>
__device__ void bring_b(const Params& params, uint64_t* full, unsigned char* stage, int head, int n_block,
                        int k_block) {
  if constexpr (Tile::kTransposed) {
    bring(params.b, full, stage, k_block * kDepth, n_block * Tile::kN, head);
  } else {
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      bring(params.b, full, stage + panel * kDepth * kRowBytes, n_block * Tile::kN + panel * kDepth, k_block * kDepth,
            head);
  }
}

// A stage of a loose B. Called by a warpgroup.
template <class Tile>
__device__ void bring_loose_b(const Params& params, uint64_t* full, unsigned char* stage, int head, int n_block,
                              int k_block) {
  const int k = k_block * kDepth, n = n_block * Tile::kN;
  if constexpr (Tile::kTransposed) {
    bring_box<Tile::kN>(box_of(params.loose.b, head, n, params.n, k, params.k), stage);
  } else {
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      bring_box<kDepth>(box_of(params.loose.b, head, k, params.k, n + panel * kDepth, params.n),
                        stage + panel * kDepth * kRowBytes);
  }
  tell_of_box(params.loose.b.in_words, full);
}

// Whether all threads of the first warpgroup bring something, or one asks the copy engine for everything.
template <class Tile>
__device__ bool threads_bring(const Params& params) {
  return Tile::kGathers || (Tile::kLoose && (params.loose.a.data || params.loose.b.data));
}

// Called by the threads that bring.
template <class Tile>
__device__ void produce(const Params& params, int m, Barriers& barriers, unsigned char* a_stages,
                        unsigned char* b_stages) {
  const Cut& cut = params.cut;
  const bool leads = threadIdx.x == 0;
  const bool loose_a = Tile::kLoose && params.loose.a.data, loose_b = Tile::kLoose && params.loose.b.data;
  Place a, b;
  Walk walk(cut, blocks_of<Tile>(m), static_cast<int>(blockIdx.x));
  [[maybe_unused]] GatheredRows<Tile> rows;
  if constexpr (Tile::kGathers) rows.read(params, m, walk);
  while (!walk.at_end()) {
    const int head = walk.head, m_block = walk.m_block, n_block = walk.n_block;
    const bool brings_b = !cut.b_stays || walk.is_first_of_group();
    walk.next();
    if constexpr (Tile::kGathers) {
      rows.turn_to(params, head);
      rows.read(params, m, walk);  // on their way while this tile is copied
    }
    for (int k_block = 0; k_block < cut.k_blocks; ++k_block) {
      if (brings_b && (leads || loose_b)) {
        wait_for(&barriers.b_empty[b.slot], b.parity ^ 1);
        uint64_t* const full = &barriers.b_full[b.slot];
        unsigned char* const stage = b_stages + b.slot * Tile::kBBytes;
        if (loose_b) {
          bring_loose_b<Tile>(params, full, stage, head, n_block, k_block);
        } else {
          ClusterTransactionBarrier::arrive_and_expect_tx(full, Tile::kBBytes);
          bring_b<Tile>(params, full, stage, head, n_block, k_block);
        }
        b.advance(1, cut.b_stages);
      }
      if (!leads && !Tile::kGathers && !loose_a) continue;
      wait_for(&barriers.a_empty[a.slot], a.parity ^ 1);
      uint64_t* const full = &barriers.a_full[a.slot];
      unsigned char* const stage = a_stages + a.slot * Tile::kABytes;
      if constexpr (Tile::kGathers) {
        rows.copy(params, k_block, cute::cast_smem_ptr_to_uint(stage));
        cutlass::arch::cpasync_barrier_arrive_noinc(full);
      } else if (loose_a) {
        bring_box<Tile::kM>(box_of(params.loose.a, head, m_block * Tile::kM, m, k_block * kDepth, params.k), stage);
        tell_of_box(params.loose.a.in_words, full);
      } else {
        ClusterTransactionBarrier::arrive_and_expect_tx(full, Tile::kABytes);
        bring(params.a, full, stage, k_block * kDepth, head, m_block * Tile::kM);
      }
      a.advance(1, cut.a_stages);
    }
  }
}

// The rows of a tile of C that one thread holds sums of: two in each 64, lane / 4 and 8 below it of its warp's 16.
template <class Tile>
struct SummedRows {
  static constexpr int kBlocks = Tile::kM / 64;
  int64_t index[2 * kBlocks];  // when gathered

  __device__ static int row(int i) {
    const int warp = static_cast<int>(threadIdx.x) % kGroup / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    return i / 2 * 64 + warp * 16 + i % 2 * 8 + lane / 4;
  }

  __device__ void read(const Params& params, int m, int m_block) {
    if constexpr (Tile::kGathers) {
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        index[i] = -1;
        if (m_block * Tile::kM + row(i) < m) index[i] = params.indices[m_block * Tile::kM + row(i)];
      }
    }
  }

  // Adds the bias, and clears rows that name no row of A: zeros by a B that is not finite are not zeros.
  template <class Sums>
  __device__ void finish(const Params& params, int head, int n_block, Sums& sums) const {
    using Element = typename Tile::Element;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto* const bias = static_cast<const Element*>(params.bias) + head * params.bias_batch_stride;
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      bool names_row = true;
      if constexpr (Tile::kGathers) names_row = index[i] >= 0 && index[i] < params.a_rows;
#pragma unroll
      for (int j = 0; j < Tile::kN / 8; ++j) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          float& sum = sums(place_of_sums<Tile>(i / 2, j) + i % 2 * 2 + side);
          const int column = n_block * Tile::kN + j * 8 + lane % 4 * 2 + side;
          if (params.bias && column < params.n) sum += static_cast<float>(bias[column]);
          if (!names_row) sum = 0;
        }
      }
    }
  }
};

// Rounds a tile's sums, `thread`'s of a warpgroup, and writes those that C has room for. Four threads hold two columns
// each of every 8; they exchange what they hold of 32, for 8 side by side each. Nothing branches here: between branches
// each exchange would wait for the one before.
template <class Tile, class Sums>
__device__ void write_sums(const Params& params, const Sums& sums, int m, int head, int n_block, int m_block,
                           int thread) {
  using Element = typename Tile::Element;
  const int warp = thread / kWarp, lane = thread % kWarp, column = n_block * Tile::kN + lane % 4 * 8;
  Element* const to = static_cast<Element*>(params.c_rows) + head * params.c_batch_stride + column;
#pragma unroll
  for (int i = 0; i < 2 * (Tile::kM / 64); ++i) {
    const int row = m_block * Tile::kM + i / 2 * 64 + warp * 16 + i % 2 * 8 + lane / 4;
    Element* const at = to + row * params.c_stride;
#pragma unroll
    for (int j = 0; j < Tile::kN / 32; ++j) {
      uint32_t words[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int place = place_of_sums<Tile>(i / 2, j * 4 + x) + i % 2 * 2;
        words[x] = pack(sums(place), sums(place + 1), Element{});
      }
      transpose(words, lane);
      if (row >= m || column + j * 32 >= params.n) continue;
      const uint4 whole = make_uint4(words[0], words[1], words[2], words[3]);
      if constexpr (Tile::kN == 64) {  // of wider tiles it is not faster
        write_past_l1(at + j * 32, whole);
      } else {
        *reinterpret_cast<uint4*>(at + j * 32) = whole;
      }
    }
  }
}

// The warpgroup's product, and how `produce` lays the stages: rows of A and columns of a transposed B 128 bytes apart;
// else B in panels.
template <class Tile>
struct Product {
  using Element = typename Tile::Element;
  static constexpr auto kB = Tile::kTransposed ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
  using Multiply = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::Int<Tile::kHeadN>, cute::Int<kDepth>>,
                                 cute::GMMA::Major::K, kB>()));
  using LayoutA =
      decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                   cute::Shape<cute::Int<Tile::kM>, cute::Int<kDepth>, cute::Int<kMaxStages>>{}));
  using AtomB = cute::conditional_t<Tile::kHeadN == 16, cute::GMMA::Layout_MN_SW32_Atom<Element>,
                                    cute::conditional_t<Tile::kHeadN == 32, cute::GMMA::Layout_MN_SW64_Atom<Element>,
                                                        cute::GMMA::Layout_MN_SW128_Atom<Element>>>;
  using ShapeB = cute::Shape<cute::Int<Tile::kHeadN>, cute::Int<kDepth>, cute::Int<kMaxStages>>;
  using LayoutB =
      cute::conditional_t<Tile::kTransposed,
                          decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{}, ShapeB{})),
                          decltype(cute::tile_to_shape(AtomB{}, ShapeB{}, cute::Step<cute::_2, cute::_1, cute::_3>{}))>;
};

template <class Tile>
__device__ void consume(const Params& params, int m, Barriers& barriers, unsigned char* a_stages,
                        unsigned char* b_stages, unsigned char* c_tiles) {
  using namespace cute;
  using Element = typename Tile::Element;
  const Cut& cut = params.cut;
  const int group = static_cast<int>(threadIdx.x) / kGroup - 1, thread = static_cast<int>(threadIdx.x) % kGroup;
  const bool signals = thread % kWarp == 0;
  const bool shares_c = cut.c_tiles == 1;

  typename Product<Tile>::Multiply multiply;
  const auto slice = multiply.get_slice(thread);
  const Tensor a_pieces = slice.make_fragment_A(slice.partition_A(
      make_tensor(make_smem_ptr(reinterpret_cast<Element*>(a_stages)), typename Product<Tile>::LayoutA{})));
  const Tensor b_pieces = slice.make_fragment_B(slice.partition_B(
      make_tensor(make_smem_ptr(reinterpret_cast<Element*>(b_stages)), typename Product<Tile>::LayoutB{})));
  Tensor sums = partition_fragment_C(multiply, Shape<Int<Tile::kM>, Int<Tile::kN>>{});

  const auto release = [&](uint64_t* empty) {
    if (signals) ClusterBarrier::arrive(empty);
  };
  // Stages are waited for in the order in which they are filled, by whichever warpgroup's turn it is: a barrier tells
  // one round from the next, but not from the one after.
  const auto begin_turn = [&] { cutlass::arch::NamedBarrier::sync(2 * kGroup, 2 + group); };
  const auto end_turn = [&] { cutlass::arch::NamedBarrier::arrive(2 * kGroup, 2 + (1 - group)); };
  // The same of a tile of C that both share.
  const auto begin_store = [&] { cutlass::arch::NamedBarrier::sync(2 * kGroup, 4 + group); };
  const auto end_store = [&] { cutlass::arch::NamedBarrier::arrive(2 * kGroup, 4 + (1 - group)); };
  if (group == 1) {  // the first turn is warpgroup 0's
    end_turn();
    if (shares_c) end_store();
  }
  Place a, b;
  int turn = 0;
  for (Walk walk(cut, blocks_of<Tile>(m), static_cast<int>(blockIdx.x)); !walk.at_end(); walk.next(), turn ^= 1) {
    const bool is_mine = turn == group;
    const int left_in_group = walk.left_in_group();
    SummedRows<Tile> rows;
    if (is_mine) {
      rows.read(params, m, walk.m_block);  // on their way while the tile is multiplied
      Place a_now = a, b_now = b;
      const auto multiply_stage = [&](GMMA::ScaleOut first) {
        wait_for(&barriers.b_full[b_now.slot], b_now.parity);
        wait_for(&barriers.a_full[a_now.slot], a_now.parity);
        if constexpr (Tile::kGathers || Tile::kLoose) fence_shared_memory();  // cp.async wrote for wgmma to read
        warpgroup_fence_operand(sums);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < size<2>(a_pieces); ++k) {
          constexpr int kSteps = Tile::kHeadK / 16;  // of one head
          if (k % kSteps == 0) multiply.accumulate_ = first;
#pragma unroll
          for (int block = 0; block < Tile::kM / 64; ++block)
            gemm(multiply, a_pieces(_, block, k, a_now.slot), b_pieces(_, 0, k, b_now.slot),
                 sums(_, block, k / kSteps));
          multiply.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
      };
      const auto free_stage = [&](const Place& a_before, const Place& b_before) {
        release(&barriers.a_empty[a_before.slot]);
        if (!cut.b_stays) release(&barriers.b_empty[b_before.slot]);
      };
      begin_turn();
      multiply_stage(GMMA::ScaleOut::Zero);
      for (int k_block = 1; k_block < cut.k_blocks; ++k_block) {
        const Place a_before = a_now, b_before = b_now;
        a_now.advance(1, cut.a_stages);
        b_now.advance(1, cut.b_stages);
        multiply_stage(GMMA::ScaleOut::One);
        warpgroup_wait<1>();  // the stage before has been multiplied
        warpgroup_fence_operand(sums);
        free_stage(a_before, b_before);
      }
      end_turn();
      warpgroup_wait<0>();
      warpgroup_fence_operand(sums);
      free_stage(a_now, b_now);
    }
    // Each warpgroup lets go of a B that stays after its last tile of the group; where it has none, once B is there, so
    // that it never runs a round ahead.
    const bool has_last = is_mine ? left_in_group <= 1 : left_in_group == 0 && walk.is_first_of_group();
    if (cut.b_stays && has_last) {
      Place b_now = b;
      for (int k_block = 0; k_block < cut.k_blocks; ++k_block) {
        if (!is_mine) wait_for(&barriers.b_full[b_now.slot], b_now.parity);
        release(&barriers.b_empty[b_now.slot]);
        b_now.advance(1, cut.b_stages);
      }
    }
    a.advance(cut.k_blocks, cut.a_stages);
    if (!cut.b_stays || left_in_group == 0) b.advance(cut.k_blocks, cut.b_stages);
    if (!is_mine) continue;

    if (Tile::kGathers || params.bias) rows.finish(params, walk.head, walk.n_block, sums);
    const int as_thread = Tile::kLoose ? thread_anew() : thread;
    if (cut.c_tiles == 0) {
      write_sums<Tile>(params, sums, m, walk.head, walk.n_block, walk.m_block, as_thread);
      continue;
    }
    unsigned char* const c_tile = c_tiles + (shares_c ? 0 : group) * Tile::kCBytes;
    if (shares_c) {
      begin_store();
    } else {
      if (!Tile::kLoose && thread == 0) tma_store_wait<0>();
      cutlass::arch::NamedBarrier::sync(kGroup, group);  // the tile before has been read out of c_tile
    }
    round_into<Tile>(c_tile, sums, as_thread);
    if (!Tile::kLoose) fence_shared_memory();
    cutlass::arch::NamedBarrier::sync(kGroup, group);
    if constexpr (Tile::kLoose) {
      const int row = walk.m_block * Tile::kM, column = walk.n_block * Tile::kN;
      store_box<Tile::kM, Tile::kN>(box_of(params.loose.c, walk.head, row, m, column, params.n), c_tile);
    } else if (thread == 0) {
      store_tile<Tile>(params, c_tile, walk.head, walk.n_block, walk.m_block);
      if (shares_c) tma_store_wait<0>();
    }
    if (shares_c) {
      __syncwarp();
      end_store();
    }
  }
  if (thread == 0) tma_store_wait<0>();
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, 1) head_gemm_kernel(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Cut& cut = params.cut;
  unsigned char* const shared = aligned_shared_memory();
  unsigned char* const a_stages = shared;
  unsigned char* const b_stages = a_stages + cut.a_stages * Tile::kABytes;
  unsigned char* const c_tiles = b_stages + cut.b_stages * Tile::kBBytes;
  auto& barriers = *reinterpret_cast<Barriers*>(c_tiles + cut.c_tiles * Tile::kCBytes);

  const bool loose_a = Tile::kLoose && params.loose.a.data, loose_b = Tile::kLoose && params.loose.b.data;
  if (threadIdx.x == kGroup) {
    if (!Tile::kGathers && !loose_a) cute::prefetch_tma_descriptor(&params.a);
    if (!loose_b) cute::prefetch_tma_descriptor(&params.b);
    if (!Tile::kLoose && cut.c_tiles > 0) cute::prefetch_tma_descriptor(&params.c);
  }
  // One thread: the fence costs a microsecond and a half when sixteen share the work.
  if (threadIdx.x == 0) {
    constexpr int kWarps = kGroup / kWarp;
    for (int i = 0; i < cut.a_stages; ++i) {
      ClusterBarrier::init(&barriers.a_full[i], Tile::kGathers || loose_a ? kGroup : 1);
      ClusterBarrier::init(&barriers.a_empty[i], kWarps);
    }
    for (int i = 0; i < cut.b_stages; ++i) {
      ClusterBarrier::init(&barriers.b_full[i], loose_b ? kGroup : 1);
      ClusterBarrier::init(&barriers.b_empty[i], cut.b_stays ? 2 * kWarps : kWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  follow_kernel_before();
  int m = params.m;
  if (Tile::kGathers && params.rows_given) m = min(m, *params.rows_given);

  if (threadIdx.x < kGroup) {
    cutlass::arch::warpgroup_reg_dealloc<Tile::kBringing>();
    if (threads_bring<Tile>(params) || threadIdx.x == 0) produce<Tile>(params, m, barriers, a_stages, b_stages);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tile::kMultiplying>();
    consume<Tile>(params, m, barriers, a_stages, b_stages, c_tiles);
  }
#else
  __trap();  // machine code for another architecture: takes_sm90 keeps the host from launching it
#endif
}

}  // namespace mhmatmul::cuda::sm90
