// tile_walk.h for Python's ctypes: the tiles of one block, a line of five numbers each.
#include "cuda/tile_walk.h"

using namespace mhmatmul::cuda::sm90;

// How many blocks there are.
extern "C" int64_t blocks_of(int heads, int m_blocks, int n_blocks, int multiprocessors) {
  Cut cut{};
  cut.heads = heads;
  cut.m_blocks = m_blocks;
  cut.n_blocks = n_blocks;
  share_out(cut, multiprocessors);
  return int64_t{cut.lanes} * cut.teams;
}

// Of a walk over the first `given` blocks of rows, writes at most `capacity` tiles as (n_block, head, m_block, is first
// of its group, left in its group); how many.
extern "C" int64_t tiles_of(int heads, int m_blocks, int n_blocks, int multiprocessors, int given, int block,
                            int64_t capacity, int64_t* tiles) {
  Cut cut{};
  cut.heads = heads;
  cut.m_blocks = m_blocks;
  cut.n_blocks = n_blocks;
  share_out(cut, multiprocessors);
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
