// The kernels for x86-64 with AMX: bfloat16 products on its tiles, everything else as with AVX-512.
//
// A tile instruction adds the products of 32 consecutive elements of the reduction to a tile of float32 sums, so an
// element's sum has again one order: steps of 32 from zero, whatever rows stand beside it. Like PyTorch's own products
// on these units it takes subnormal numbers for zeros.
#if defined(__x86_64__)
#include "gemm_portable.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics warn of themselves
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "gemm_target.h"
MHMATMUL_TARGET_BEGIN("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "gemm_avx512.h"
#include "gemm_kernel.h"

namespace mhmatmul::cpu {

const KernelTable& avx512_kernels();

namespace {

using T = c10::BFloat16;
using G = Gemm<Avx512>;

// A tile is 16 rows of 64 bytes: 16x16 sums; 16 rows by 32 elements of A; or 32 elements by 16 columns of B, in which
// the two elements of a pair of rows lie side by side. A block is two by two tiles of sums.
constexpr int64_t kTile = 16, kStep = 32, kBlock = 2 * kTile, kTileSize = kTile * kStep;
constexpr int64_t kTileBytes = 64;  // of a tile's row
static_assert(G::kColumns == kBlock);

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  Config() {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = kTileBytes;
      rows[i] = kTile;
    }
  }
};

// The calling thread's tiles, configured while this lives.
class Tiles {
 public:
  Tiles() {
    const Config config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Compilers do not see what tile instructions read and write.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

// sums[32, 32] (+)= a b over `steps` steps: a holds two tiles a step, rows above each other, b two, columns side by
// side. Without `both` only the upper half.
template <bool both>
inline void multiply_tiles(int64_t steps, const T* a, const T* b, float* sums, bool add) {
  constexpr int64_t kRowBytes = kBlock * sizeof(float);
  float* const lower = sums + kTile * kBlock;
  memory_barrier();
  if (add) {
    _tile_loadd(0, sums, kRowBytes);
    _tile_loadd(1, sums + kTile, kRowBytes);
    if constexpr (both) {
      _tile_loadd(2, lower, kRowBytes);
      _tile_loadd(3, lower + kTile, kRowBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, a += 2 * kTileSize, b += 2 * kTileSize) {
    _tile_loadd(4, a, kTileBytes);
    _tile_loadd(6, b, kTileBytes);
    _tile_loadd(7, b + kTileSize, kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (both) {
      _tile_loadd(5, a + kTileSize, kTileBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kTile, kRowBytes);
  if constexpr (both) {
    _tile_stored(2, lower, kRowBytes);
    _tile_stored(3, lower + kTile, kRowBytes);
  }
  memory_barrier();
}

// For the first `rows` rows of a block.
inline void multiply(int64_t steps, int64_t rows, const T* a, const T* b, float* sums, bool add) {
  const auto tiles = rows > kTile ? multiply_tiles<true> : multiply_tiles<false>;
  tiles(steps, a, b, sums, add);
}

// `count` elements from `from` on, at most 32, then zeros.
inline __m512i load(const T* from, int64_t stride, int64_t count) {
  if (stride == 1) return _mm512_maskz_loadu_epi16(count >= kStep ? ~0u : (1u << count) - 1, from);
  alignas(64) T elements[kStep];
  for (int64_t i = 0; i < kStep; ++i) elements[i] = i < count ? from[i * stride] : T(0);
  return _mm512_load_si512(elements);
}

// Two rows of 32 columns with their elements in pairs: columns 0 to 15, and 16 to 31.
struct Pairs {
  __m512i low, high;
  Pairs(__m512i even, __m512i odd) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    low = _mm512_permutex2var_epi16(even, order, odd);
    high = _mm512_permutex2var_epi16(even, _mm512_add_epi16(order, _mm512_set1_epi16(16)), odd);
  }
};

// A tile of which row i holds the pairs that are the i-th of each of 16 rows.
inline void transpose_pairs(const __m512i (&rows)[kTile], T* tile) {
  alignas(64) float square[kTile][kTile];
  for (int i = 0; i < kTile; ++i) _mm512_store_si512(square[i], rows[i]);
  Avx512::transpose(square, reinterpret_cast<float*>(tile), kTile);
}

// A panel of B: 32 columns of k rows, zeros beyond `columns` and up to whole steps.
void pack_panel(const T* from, int64_t row_stride, int64_t column_stride, int64_t k, int64_t columns, T* panel) {
  for (int64_t step = 0; step < k; step += kStep, panel += 2 * kTileSize) {
    if (row_stride == 1) {  // pairs lie side by side already
      for (int64_t half = 0; half < kBlock; half += kTile) {
        __m512i rows[kTile];
        for (int64_t j = 0; j < kTile; ++j)
          rows[j] =
              half + j < columns ? load(from + step + (half + j) * column_stride, 1, k - step) : _mm512_setzero_si512();
        transpose_pairs(rows, panel + half / kTile * kTileSize);
      }
      continue;
    }
    for (int64_t pair = 0; pair < kTile; ++pair) {
      const int64_t p = step + 2 * pair;
      const auto row = [&](int64_t q) {
        return q < k ? load(from + q * row_stride, column_stride, columns) : _mm512_setzero_si512();
      };
      const Pairs pairs(row(p), row(p + 1));
      _mm512_store_si512(panel + pair * kStep, pairs.low);
      _mm512_store_si512(panel + kTileSize + pair * kStep, pairs.high);
    }
  }
}

// Row i of a block of A: k elements, zeros up to whole steps.
void pack_row(const T* from, int64_t stride, int64_t k, int64_t i, T* block) {
  T* to = block + i / kTile * kTileSize + i % kTile * kStep;
  for (int64_t p = 0; p < k; p += kStep, to += 2 * kTileSize)
    _mm512_store_si512(to, load(from + p * stride, stride, k - p));
}

// Subnormal numbers are zeros in the calling thread's vector arithmetic while this lives, as they are on tiles.
class FlushSubnormals {
 public:
  FlushSubnormals() { _mm_setcsr(before_ | kFlushResults | kFlushOperands); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  static constexpr unsigned kFlushResults = 0x8000, kFlushOperands = 0x0040;
  const unsigned before_ = _mm_getcsr();
};

// A row times V vectors of columns of B where it lies, in float32 arithmetic, to the bits that tiles would give: in
// every step they add up the even and the odd elements' products apart, from zero, and then add both to the sum.
template <int V>
void multiply_row(int64_t k, const float* a, const T* b, int64_t b_step, float* sums) {
  __m512 sum[V];
  for (int v = 0; v < V; ++v) sum[v] = _mm512_setzero_ps();
  for (int64_t step = 0; step < k; step += kStep) {
    __m512 partial[2][V];
    for (int v = 0; v < V; ++v) partial[0][v] = partial[1][v] = _mm512_setzero_ps();
    const int64_t count = smaller(kStep, k - step);
    for (int64_t p = 0; p + 2 <= count; p += 2, a += 2, b += 2 * b_step)
      for (int odd = 0; odd < 2; ++odd)
        for (int v = 0; v < V; ++v)
          partial[odd][v] =
              _mm512_fmadd_ps(_mm512_set1_ps(a[odd]), Avx512::load(b + odd * b_step + v * kTile), partial[odd][v]);
    if (count % 2 == 1)
      for (int v = 0; v < V; ++v)
        partial[0][v] = _mm512_fmadd_ps(_mm512_set1_ps(a[0]), Avx512::load(b + v * kTile), partial[0][v]);
    for (int odd = 0; odd < 2; ++odd)  // tiles are filled up with zeros, whose sum with -0 is +0
      for (int v = 0; v < V && count + 1 - odd < kStep; ++v)
        partial[odd][v] = _mm512_add_ps(partial[odd][v], _mm512_setzero_ps());
    for (int v = 0; v < V; ++v) sum[v] = _mm512_add_ps(sum[v], _mm512_add_ps(partial[0][v], partial[1][v]));
  }
  for (int v = 0; v < V; ++v) Avx512::store(sums + v * kTile, sum[v]);
}

// Few rows, and columns of B in whole blocks that lie side by side: packing B would cost more than the product.
void forward_few(const ForwardProblem& problem, const G::Part& part, const G::Rows<T>& rows, const float* bias,
                 const T* b, float* a) {
  const FlushSubnormals flush;
  constexpr int64_t kWide = 4 * kTile;
  float sums[kWide];
  for (int64_t head = 0; head < part.heads; ++head)
    for (int64_t i = 0; i < rows.count; ++i) {
      G::convert(rows.a[i] + head * problem.a_strides.head, problem.a_strides.column, problem.k, a);
      const T* const b_head = b + head * problem.b_strides.head;
      int64_t column = 0;
      for (; column + kWide <= part.columns; column += kWide) {
        multiply_row<4>(problem.k, a, b_head + column, problem.b_strides.row, sums);
        G::finish(problem, part, rows, bias, head, column).put_row(i, sums, kWide);
      }
      for (; column < part.columns; column += kBlock) {
        multiply_row<2>(problem.k, a, b_head + column, problem.b_strides.row, sums);
        G::finish(problem, part, rows, bias, head, column).put_row(i, sums, kBlock);
      }
    }
}

void forward(const ForwardProblem& problem, const Tasks& tasks, int64_t task) {
  const G::Part part(tasks, task, problem.heads, problem.m, problem.n);
  const int64_t depth = ceil_div(problem.k, kStep) * kStep, head_size = depth * part.width;
  Arena arena(G::Rows<T>::bytes(part.rows) + G::bias_bytes(problem, part) + Arena::bytes<float>(problem.k) +
              Arena::bytes<T>(kBlock * depth) + Arena::bytes<T>(part.heads * head_size) +
              Arena::bytes<float>(kBlock * kBlock));
  const G::Rows<T> rows(arena, problem, part);
  if (rows.count == 0) return;
  const float* const bias = G::convert_bias<T>(arena, problem, part);
  T* const a = arena.take<T>(kBlock * depth);
  T* const packed = arena.take<T>(part.heads * head_size);
  float* const sums = arena.take<float>(kBlock * kBlock);
  const T* const b = static_cast<const T*>(problem.b) + part.first_head * problem.b_strides.head +
                     part.first_column * problem.b_strides.column;
  if (rows.count <= kFewRows && problem.b_strides.column == 1 && part.columns % kBlock == 0)
    return forward_few(problem, part, rows, bias, b, arena.take<float>(problem.k));
  for (int64_t head = 0; head < part.heads; ++head)
    for (int64_t column = 0; column < part.columns; column += kBlock)
      pack_panel(b + head * problem.b_strides.head + column * problem.b_strides.column, problem.b_strides.row,
                 problem.b_strides.column, problem.k, part.columns - column,
                 packed + head * head_size + column * depth);

  const int64_t turns = problem.k <= kShortK ? part.width / kBlock : 0;  // longer rows come by themselves
  const Tiles tiles;
  for (int64_t i0 = 0; i0 < rows.count; i0 += kBlock) {
    const int64_t count = smaller(kBlock, rows.count - i0);
    for (int64_t head = 0; head < part.heads; ++head) {
      for (int64_t i = 0; i < count; ++i)
        pack_row(rows.a[i0 + i] + head * problem.a_strides.head, problem.a_strides.column, problem.k, i, a);
      auto next = G::announce_rows(problem, rows, i0, kBlock, head, part.heads, 0, problem.k, turns);
      for (int64_t column = 0; column < part.columns; column += kBlock) {
        next();
        multiply(depth / kStep, count, a, packed + head * head_size + column * depth, sums, false);
        const auto finish = G::finish(problem, part, rows, bias, head, column);
        if (finish.takes_vectors(2)) {
          for (int64_t i = 0; i < count; ++i)
            for (int v = 0; v < 2; ++v) finish.put(i0 + i, v, Avx512::load(sums + i * kBlock + v * kTile));
        } else {
          for (int64_t i = 0; i < count; ++i) finish.put_row(i0 + i, sums + i * kBlock, kBlock);
        }
      }
    }
  }
}

void wgrad(const WgradProblem& problem, const Tasks& tasks, int64_t task) {
  const G::Part part(tasks, task, problem.heads, problem.m, problem.n);
  const int64_t blocks = ceil_div(part.rows, kBlock), panels = part.width / kBlock;
  constexpr int64_t kDeep = kBlockTokens * kBlock;  // of 32 columns of A or G
  constexpr int64_t kSums = kBlock * kBlock;
  static_assert(kBlockTokens % kStep == 0);
  Arena arena(Arena::bytes<G::Tokens<T>>(1) + Arena::bytes<T>(part.heads * (blocks + panels) * kDeep) +
              Arena::bytes<float>(part.heads * blocks * panels * kSums));
  auto* const tokens = arena.take<G::Tokens<T>>(1);
  T* const a = arena.take<T>(part.heads * (blocks + panels) * kDeep);
  T* const g = a + part.heads * blocks * kDeep;
  float* const sums = arena.take<float>(part.heads * blocks * panels * kSums);
  if (problem.t == 0) fill(sums, part.heads * blocks * panels * kSums, 0.0f);

  const Tiles tiles;
  for (int64_t first = 0; first < problem.t; first += kBlockTokens) {
    tokens->read(problem, part, first);
    // 32 columns of the `pair`-th two tokens of a step
    const auto pairs = [&](const T* const* rows, const Strides& strides, int64_t head, int64_t column, int64_t columns,
                           int64_t step, int64_t pair) {
      const auto row = [&](int64_t p) {
        return p < tokens->count
                   ? load(rows[p] + head * strides.head + column * strides.column, strides.column, columns - column)
                   : _mm512_setzero_si512();
      };
      return Pairs(row(step + 2 * pair), row(step + 2 * pair + 1));
    };
    for (int64_t step = 0; step < tokens->count; step += kStep)
      for (int64_t head = 0; head < part.heads; ++head) {
        for (int64_t block = 0; block < blocks; ++block) {
          __m512i low[kTile], high[kTile];
          for (int64_t pair = 0; pair < kTile; ++pair) {
            const Pairs both = pairs(tokens->a, problem.a_strides, head, block * kBlock, part.rows, step, pair);
            low[pair] = both.low;
            high[pair] = both.high;
          }
          T* const to = a + (head * blocks + block) * kDeep + step * kBlock;
          transpose_pairs(low, to);
          transpose_pairs(high, to + kTileSize);
        }
        for (int64_t panel = 0; panel < panels; ++panel) {
          T* const to = g + (head * panels + panel) * kDeep + step * kBlock;
          for (int64_t pair = 0; pair < kTile; ++pair) {
            const Pairs both = pairs(tokens->g, problem.g_strides, head, panel * kBlock, part.columns, step, pair);
            _mm512_store_si512(to + pair * kStep, both.low);
            _mm512_store_si512(to + kTileSize + pair * kStep, both.high);
          }
        }
      }
    for (int64_t head = 0; head < part.heads; ++head)
      for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t block = 0; block < blocks; ++block)
          multiply(ceil_div(tokens->count, kStep), part.rows - block * kBlock, a + (head * blocks + block) * kDeep,
                   g + (head * panels + panel) * kDeep, sums + ((head * blocks + block) * panels + panel) * kSums,
                   first > 0);
  }

  for (int64_t head = 0; head < part.heads; ++head)
    for (int64_t i = 0; i < part.rows; ++i) {
      T* const row = G::row_of<T>(problem, part, head, i);
      for (int64_t panel = 0; panel < panels; ++panel)
        G::Finish<T>{&row, panel * kBlock, part.columns - panel * kBlock, nullptr}.put_row(
            0, sums + ((head * blocks + i / kBlock) * panels + panel) * kSums + i % kBlock * kBlock, kBlock);
    }
}

// bfloat16 here, every other type as with AVX-512.
template <auto bfloat16, auto KernelTable::* other, class Problem>
void choose(const Problem& problem, const Tasks& tasks, int64_t task) {
  const auto kernel = problem.dtype == Dtype::kBFloat16 ? bfloat16 : avx512_kernels().*other;
  kernel(problem, tasks, task);
}

}  // namespace

const KernelTable& amx_kernels() {
  static constexpr KernelTable table{choose<forward, &KernelTable::forward, ForwardProblem>,
                                     choose<wgrad, &KernelTable::wgrad, WgradProblem>};
  return table;
}

}  // namespace mhmatmul::cpu
MHMATMUL_TARGET_END
#endif
