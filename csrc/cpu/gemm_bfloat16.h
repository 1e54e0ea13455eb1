// bfloat16 products on units that multiply pairs of elements: AMX's tiles and AVX-512's dot products. Include it inside
// a target region, after <immintrin.h>.
//
// A `Unit` gives: multiply, for a block of 32 by 32 sums; multiply_row, for a row by B where it lies, to the same bits,
// and read_row, what it takes that row as; and objects that live while the one and the other are called, Registers and
// Rounding.
#pragma once

#include "gemm_avx512.h"
#include "gemm_kernel.h"

namespace mhmatmul::cpu {

const KernelTable& avx512_kernels();

namespace {

using T = c10::BFloat16;
using G = Gemm<Avx512>;

// A and B are packed in tiles of 16 rows of 64 bytes: 16 rows by 32 elements of A; or 32 elements by 16 columns of B,
// in which the two elements of a pair of rows lie side by side. A block is two by two tiles of 16 by 16 sums.
constexpr int64_t kTile = 16, kStep = 32, kBlock = 2 * kTile, kTileSize = kTile * kStep;
static_assert(G::kColumns == kBlock);

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

// Few rows, and columns of B in whole blocks that lie side by side: packing B would cost more than the product.
template <class Unit>
void forward_few(const ForwardProblem& problem, const G::Part& part, const G::Rows<T>& rows, const float* bias,
                 const T* b, float* memory) {
  [[maybe_unused]] const typename Unit::Rounding rounding;
  constexpr int64_t kWide = 4 * kTile;
  float sums[kWide];
  for (int64_t head = 0; head < part.heads; ++head)
    for (int64_t i = 0; i < rows.count; ++i) {
      const auto* const a =
          Unit::read_row(rows.a[i] + head * problem.a_strides.head, problem.a_strides.column, problem.k, memory);
      const T* const b_head = b + head * problem.b_strides.head;
      int64_t column = 0;
      for (; column + kWide <= part.columns; column += kWide) {
        Unit::template multiply_row<4>(problem.k, a, b_head + column, problem.b_strides.row, sums);
        G::finish(problem, part, rows, bias, head, column).put_row(i, sums, kWide);
      }
      for (; column < part.columns; column += kBlock) {
        Unit::template multiply_row<2>(problem.k, a, b_head + column, problem.b_strides.row, sums);
        G::finish(problem, part, rows, bias, head, column).put_row(i, sums, kBlock);
      }
    }
}

template <class Unit>
void forward(const ForwardProblem& problem, const Tasks& tasks, int64_t task) {
  const G::Part part(tasks, task, problem.heads, problem.m, problem.n);
  const int64_t depth = ceil_div(problem.k, kStep) * kStep, head_size = depth * part.width;
  const int64_t packed_size = part.heads * head_size;
  Arena arena(G::Rows<T>::bytes(part.rows) + G::bias_bytes(problem, part) + Arena::bytes<float>(problem.k) +
              Arena::bytes<T>(kBlock * depth) + Arena::bytes<T>(packed_size) + Arena::bytes<float>(kBlock * kBlock));
  const G::Rows<T> rows(arena, problem, part);
  if (rows.count == 0) return;
  const float* const bias = G::convert_bias<T>(arena, problem, part);
  T* const a = arena.take<T>(kBlock * depth);
  T* const packed = arena.take<T>(packed_size);
  float* const sums = arena.take<float>(kBlock * kBlock);
  const T* const b = static_cast<const T*>(problem.b) + part.first_head * problem.b_strides.head +
                     part.first_column * problem.b_strides.column;
  if (rows.count <= kFewRows && problem.b_strides.column == 1 && part.columns % kBlock == 0)
    return forward_few<Unit>(problem, part, rows, bias, b, arena.take<float>(problem.k));
  for (int64_t head = 0; head < part.heads; ++head)
    for (int64_t column = 0; column < part.columns; column += kBlock)
      pack_panel(b + head * problem.b_strides.head + column * problem.b_strides.column, problem.b_strides.row,
                 problem.b_strides.column, problem.k, part.columns - column,
                 packed + head * head_size + column * depth);

  const int64_t turns = problem.k <= kShortK ? part.width / kBlock : 0;  // longer rows come by themselves
  [[maybe_unused]] const typename Unit::Registers registers;
  for (int64_t i0 = 0; i0 < rows.count; i0 += kBlock) {
    const int64_t count = smaller(kBlock, rows.count - i0);
    for (int64_t head = 0; head < part.heads; ++head) {
      for (int64_t i = 0; i < count; ++i)
        pack_row(rows.a[i0 + i] + head * problem.a_strides.head, problem.a_strides.column, problem.k, i, a);
      auto next = G::announce_rows(problem, rows, i0, kBlock, head, part.heads, 0, problem.k, turns);
      for (int64_t column = 0; column < part.columns; column += kBlock) {
        next();
        Unit::multiply(problem.k, count, a, packed + head * head_size + column * depth, sums, false);
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

template <class Unit>
void wgrad(const WgradProblem& problem, const Tasks& tasks, int64_t task) {
  const G::Part part(tasks, task, problem.heads, problem.m, problem.n);
  const int64_t blocks = ceil_div(part.rows, kBlock), panels = part.width / kBlock;
  constexpr int64_t kDeep = kBlockTokens * kBlock;  // of 32 columns of A or G
  constexpr int64_t kSums = kBlock * kBlock;
  static_assert(kBlockTokens % kStep == 0);
  const int64_t packed_size = part.heads * (blocks + panels) * kDeep, sums_size = part.heads * blocks * panels * kSums;
  Arena arena(Arena::bytes<G::Tokens<T>>(1) + Arena::bytes<T>(packed_size) + Arena::bytes<float>(sums_size));
  auto* const tokens = arena.take<G::Tokens<T>>(1);
  T* const a = arena.take<T>(packed_size);
  T* const g = a + part.heads * blocks * kDeep;
  float* const sums = arena.take<float>(sums_size);
  if (problem.t == 0) fill(sums, sums_size, 0.0f);

  [[maybe_unused]] const typename Unit::Registers registers;
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
          Unit::multiply(tokens->count, part.rows - block * kBlock, a + (head * blocks + block) * kDeep,
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

// The kernels of a machine that has the unit.
template <class Unit>
constexpr KernelTable kTable{choose<forward<Unit>, &KernelTable::forward, ForwardProblem>,
                             choose<wgrad<Unit>, &KernelTable::wgrad, WgradProblem>};

}  // namespace
}  // namespace mhmatmul::cpu
