// tile_walk.h, gemm_sm90_tuning.h, tf32_sm90_tuning.h and backward_walk.h for Python's ctypes.
#include "cuda/tile_walk.h"
#include "cuda/backward_walk.h"
#include "cuda/gemm_sm90_tuning.h"
#include "cuda/tf32_sm90_tuning.h"

using namespace mhmatmul::cuda::sm90;
namespace tuning = mhmatmul::cuda::tuning;

namespace {
Cut shared_out(int heads, int m_blocks, int n_blocks, int multiprocessors) {
  Cut cut{};
  cut.heads = heads;
  cut.m_blocks = m_blocks;
  cut.n_blocks = n_blocks;
  share_out(cut, multiprocessors, tuning::kTilesPerPiece, tuning::kStaying);
  return cut;
}
}  // namespace

// How many blocks there are.
extern "C" int64_t blocks_of(int heads, int m_blocks, int n_blocks, int multiprocessors) {
  return shared_out(heads, m_blocks, n_blocks, multiprocessors).blocks;
}

// How many groups of tiles these have.
extern "C" int64_t groups_of(int heads, int m_blocks, int n_blocks, int multiprocessors) {
  return shared_out(heads, m_blocks, n_blocks, multiprocessors).groups();
}

// How many groups and how many tiles has the block that has most of them.
extern "C" int64_t most_groups_of(int heads, int m_blocks, int n_blocks, int multiprocessors) {
  return shared_out(heads, m_blocks, n_blocks, multiprocessors).most_groups();
}
extern "C" int64_t most_tiles_of(int heads, int m_blocks, int n_blocks, int multiprocessors) {
  return shared_out(heads, m_blocks, n_blocks, multiprocessors).most_tiles();
}

// Whether a product is taken; then writes its tile, rows and columns.
extern "C" bool tile_of(int64_t m, int64_t heads, int64_t k, int64_t n, bool gathers, int multiprocessors, int* tile) {
  const auto preferred = tuning::preferred_tile({m, n, k, heads, gathers}, multiprocessors);
  if (!preferred) return false;
  tile[0] = preferred->m;
  tile[1] = preferred->n;
  return true;
}

// The same of float32 rounded to TF32; writes rows, columns and inputs.
extern "C" bool tf32_tile_of(int64_t m, int64_t heads, int64_t k, int64_t n, bool b_is_transposed, int multiprocessors,
                             int* tile) {
  const auto preferred = tuning::preferred_tf32({m, n, k, heads, /*gathers=*/false}, b_is_transposed, multiprocessors);
  if (!preferred) return false;
  tile[0] = preferred->m;
  tile[1] = preferred->n;
  tile[2] = preferred->k;
  return true;
}

// Where tiles are dealt to blocks in turn, how many blocks there are; none: the tiles cannot be counted.
static Deal dealt(int heads, int m_blocks, int n_blocks, int multiprocessors, bool heads_before_rows, bool* counted) {
  Deal deal{};
  deal.heads = heads;
  deal.m_blocks = m_blocks;
  deal.n_blocks = n_blocks;
  deal.heads_before_rows = heads_before_rows;
  *counted = deal_out(deal, multiprocessors);
  return deal;
}
extern "C" int dealt_blocks(int heads, int m_blocks, int n_blocks, int multiprocessors) {
  bool counted = false;
  const Deal deal = dealt(heads, m_blocks, n_blocks, multiprocessors, false, &counted);
  return counted ? deal.blocks : 0;
}

// Writes a block's tiles as (n_block, head, m_block), and of its team how many blocks there are and the most tiles of
// any block; how many.
extern "C" int dealt_tiles(int heads, int m_blocks, int n_blocks, int multiprocessors, bool heads_before_rows,
                           int block, int* tiles, int* team, int* most_tiles) {
  bool counted = false;
  const Deal deal = dealt(heads, m_blocks, n_blocks, multiprocessors, heads_before_rows, &counted);
  *team = deal.team;
  *most_tiles = deal.most_tiles();
  int count = 0;
  for (DealtWalk walk(deal, block); !walk.at_end(); walk.next(), ++count) {
    tiles[3 * count] = walk.n_block;
    tiles[3 * count + 1] = walk.head;
    tiles[3 * count + 2] = walk.m_block;
  }
  return count;
}

// Of a walk over the first `given` blocks of rows, writes at most `capacity` tiles as (n_block, head, m_block, is first
// of its group, left in its group); how many.
extern "C" int64_t tiles_of(int heads, int m_blocks, int n_blocks, int multiprocessors, int given, int block,
                            int64_t capacity, int64_t* tiles) {
  const Cut cut = shared_out(heads, m_blocks, n_blocks, multiprocessors);
  int64_t count = 0;
  for (Walk walk(cut, given, block); !walk.at_end() && count < capacity; walk.next(), ++count) {
    int64_t* const tile = tiles + 5 * count;
    tile[0] = walk.n_block;
    tile[1] = walk.head;
    tile[2] = walk.m_block;
    tile[3] = walk.is_first_of_group();
    tile[4] = walk.left_in_group();
  }
  return count;
}

namespace {
BackwardCut backward_cut(int heads, int hd_groups, int row_tiles, int teams, double tiles_per_partial) {
  BackwardCut cut{};
  cut.heads = heads;
  cut.hd_groups = hd_groups;
  cut.row_tiles = row_tiles;
  cut.teams = teams;
  choose_splits(cut, /*tiles_per_segment=*/3, tiles_per_partial);
  return cut;
}
}  // namespace

extern "C" int splits_of(int heads, int hd_groups, int row_tiles, int teams, double tiles_per_partial) {
  return backward_cut(heads, hd_groups, row_tiles, teams, tiles_per_partial).splits;
}

// Writes each segment as (head, group of inputs, split, first tile, step); how many.
extern "C" int segments_of(int heads, int hd_groups, int row_tiles, int teams, double tiles_per_partial,
                           int64_t* segments) {
  const BackwardCut cut = backward_cut(heads, hd_groups, row_tiles, teams, tiles_per_partial);
  for (int i = 0; i < cut.segments(); ++i) {
    const Segment own(cut, i);
    int64_t* const segment = segments + int64_t{5} * i;
    segment[0] = own.head;
    segment[1] = own.hd_group;
    segment[2] = own.split;
    segment[3] = own.begin;
    segment[4] = own.step;
  }
  return cut.segments();
}
