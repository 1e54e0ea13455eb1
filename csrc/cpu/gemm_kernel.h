// The kernels, as templates over an instruction set. Each gemm_<isa>.cpp includes this inside its target region and
// instantiates it once; nothing here may be called from outside that file but through its table.
//
// An instruction set `Isa` gives: a Vector of kWidth elements of `Sum`; the register block, kRows by kVectors vectors,
// or kWide vectors of a single row; kFetchedSize, the size of elements of B that are fetched ahead where it is read in
// place for a single row (0: none); and load (from any element type), broadcast, zero, add, fma, store (to any element
// type, rounding once) and transpose (of a square of kWidth).
#pragma once

#include "gemm.h"
#include "gemm_tuning.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace mhmatmul::cpu {

struct KernelTable {
  void (*forward)(const ForwardProblem&, const Tasks&, int64_t task);
  void (*wgrad)(const WgradProblem&, const Tasks&, int64_t task);
};

// At least so many bytes, aligned to cache lines, the calling thread's own until its next call; kept until it ends.
void* thread_scratch(int64_t bytes);

namespace {

// No function templates of the standard library in here: one that is instantiated for this instruction set and not
// inlined could be the copy that the linker keeps for everybody.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kCacheLine = 64;

template <class T>
inline void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

template <int value_>
struct Size {
  static constexpr int value = value_;
};

// Scratch memory of one task, carved from what its thread keeps. AddressSanitizer sees each piece as one of its own.
class Arena {
 public:
  explicit Arena(int64_t bytes) : next_(static_cast<char*>(thread_scratch(bytes))) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(next_, bytes);
#endif
  }

  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment + kRedZone;
  }
  template <class T>
  T* take(int64_t count) {
    char* const taken = next_;
    next_ += bytes<T>(count);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(taken, count * sizeof(T));
#endif
    return reinterpret_cast<T*>(taken);
  }

 private:
  static constexpr int64_t kAlignment = 64;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kRedZone = 64;
#else
  static constexpr int64_t kRedZone = 0;
#endif
  char* next_;
};

template <class Isa>
struct Gemm {
  using Sum = typename Isa::Sum;
  using Vector = typename Isa::Vector;
  static constexpr int kWidth = Isa::kWidth;
  static constexpr int kRows = Isa::kRows;
  static constexpr int kColumns = Isa::kVectors * kWidth;

  // `count` elements, `stride` apart, converted to sums.
  template <class T>
  static void convert(const T* from, int64_t stride, int64_t count, Sum* to) {
    int64_t i = 0;
    if (stride == 1)
      for (; i + kWidth <= count; i += kWidth) Isa::store(to + i, Isa::load(from + i));
    for (; i < count; ++i) to[i] = static_cast<Sum>(from[i * stride]);
  }

  template <int kCount, class T>
  static inline __attribute__((always_inline)) void convert_whole(const T* from, Sum* to) {
    for (int i = 0; i < kCount; i += kWidth) Isa::store(to + i, Isa::load(from + i));
  }

  // The register block: sum[i, j] over p in [0, k) of a(i, p) b(p, j), for M rows and V vectors of columns, handed
  // to `store`; `meanwhile` is called once a chunk. a(i, p) lies at a[i * kRowStep + p * a_step]. Not inlined: with
  // the caller's variables in registers as well, compilers spill inside the loop.
  template <int M, int V, int64_t kRowStep, class B, class Store, class Meanwhile>
  static __attribute__((noinline)) void block(int64_t k, const Sum* a, int64_t a_step, const B* b, int64_t b_step,
                                              const Store& store, Meanwhile& meanwhile) {
    alignas(64) Sum tile[M * V * kWidth];  // of the chunks before
    Vector sum[M][V];
    for (int64_t chunk = 0;;) {
      const int64_t chunk_end = smaller(chunk + kChunk, k);
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) sum[i][v] = Isa::zero();
      meanwhile();
      for (int64_t p = chunk; p < chunk_end; ++p) {
        Vector row[V];
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) row[v] = Isa::load(b + v * kWidth);
        if constexpr (M == 1 && sizeof(B) == Isa::kFetchedSize)
          for (int next = V * kWidth; next < 2 * V * kWidth; next += kCacheLine / sizeof(B))
            __builtin_prefetch(b + next);
#pragma GCC unroll 32
        for (int i = 0; i < M; ++i) {
          const Vector scalar = Isa::broadcast(a[i * kRowStep]);
#pragma GCC unroll 32
          for (int v = 0; v < V; ++v) sum[i][v] = Isa::fma(scalar, row[v], sum[i][v]);
        }
        a += a_step;
        b += b_step;
      }
      if (chunk > 0) {
#pragma GCC unroll 32
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
          for (int v = 0; v < V; ++v) sum[i][v] = Isa::add(Isa::load(tile + (i * V + v) * kWidth), sum[i][v]);
      }
      chunk = chunk_end;
      if (chunk == k) break;
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) Isa::store(tile + (i * V + v) * kWidth, sum[i][v]);
    }
    bool takes_vectors = true;
    if constexpr (!Store::kTakesAll) takes_vectors = store.takes_vectors(V);
    if (takes_vectors) {
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) store.put(i, v, sum[i][v]);
      return;
    }
    if constexpr (!Store::kTakesAll) {
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) Isa::store(tile + (i * V + v) * kWidth, sum[i][v]);
      for (int i = 0; i < M; ++i) store.put_row(i, tile + i * V * kWidth, V * kWidth);
    }
  }

  // Cuts `rows` rows into register blocks: calls piece(size, first row), size a compile-time constant.
  template <class Piece>
  static inline __attribute__((always_inline)) void for_pieces(int64_t rows, const Piece& piece) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) piece(Size<kRows>(), i);
    const auto rest = [&](auto size) {
      if constexpr (decltype(size)::value < kRows) {
        for (; i + size.value <= rows; i += size.value) piece(size, i);
      }
    };
    rest(Size<8>());
    rest(Size<4>());
    rest(Size<2>());
    rest(Size<1>());
  }

  // panel[p, j] = from(p, j) for p in [0, k), j in [0, columns), zeros up to kColumns.
  template <class T>
  static void pack(const T* from, int64_t row_stride, int64_t column_stride, int64_t k, int64_t columns, Sum* panel) {
    if (column_stride == 1 && columns == kColumns) {
      for (int64_t p = 0; p < k; ++p) convert_whole<kColumns>(from + p * row_stride, panel + p * kColumns);
      return;
    }
    if (columns < kColumns) fill(panel, k * kColumns, Sum(0));
    if (row_stride == 1) {  // a transposed operand: read along k, a square of columns at a time
      Sum square[kWidth][kWidth];
      int64_t p = 0;
      for (; p + kWidth <= k; p += kWidth)
        for (int64_t j0 = 0; j0 < kColumns; j0 += kWidth) {
          for (int64_t j = 0; j < kWidth; ++j)
            Isa::store(square[j], j0 + j < columns ? Isa::load(from + p + (j0 + j) * column_stride) : Isa::zero());
          Isa::transpose(square, panel + p * kColumns + j0, kColumns);
        }
      for (; p < k; ++p) convert(from + p, column_stride, columns, panel + p * kColumns);
      return;
    }
    for (int64_t p = 0; p < k; ++p) convert(from + p * row_stride, column_stride, columns, panel + p * kColumns);
  }

  // A task's part of a problem: so many heads, rows and columns from the first of each on.
  struct Part {
    int64_t first_head, heads, first_row, rows, first_column, columns;
    int64_t width;  // columns, rounded up to whole panels

    // The columns change fastest from task to task, then the heads.
    Part(const Tasks& tasks, int64_t task, int64_t all_heads, int64_t all_rows, int64_t all_columns) {
      const int64_t column_tasks = ceil_div(all_columns, tasks.columns_per_task);
      const int64_t head_tasks = ceil_div(all_heads, tasks.heads_per_task);
      first_column = task % column_tasks * tasks.columns_per_task;
      first_head = task / column_tasks % head_tasks * tasks.heads_per_task;
      first_row = task / column_tasks / head_tasks * tasks.rows_per_task;
      columns = smaller(tasks.columns_per_task, all_columns - first_column);
      heads = smaller(tasks.heads_per_task, all_heads - first_head);
      rows = smaller(tasks.rows_per_task, all_rows - first_row);
      width = ceil_div(columns, kColumns) * kColumns;
    }
  };

  // The rows of a task: where those that name a row of A begin, in A and C, for its first head. The others become
  // zeros.
  template <class T>
  struct Rows {
    const T** a;
    T** c;
    int64_t count = 0;

    static int64_t bytes(int64_t rows) { return Arena::bytes<const T*>(rows) + Arena::bytes<T*>(rows); }

    Rows(Arena& arena, const ForwardProblem& problem, const Part& part)
        : a(arena.take<const T*>(part.rows)), c(arena.take<T*>(part.rows)) {
      const T* const source = static_cast<const T*>(problem.a) + part.first_head * problem.a_strides.head;
      T* const target = static_cast<T*>(problem.c) + part.first_head * problem.c_strides.head + part.first_column;
      for (int64_t r = part.first_row; r < part.first_row + part.rows; ++r) {
        const int64_t index = problem.indices ? problem.indices[r] : r;
        T* const row = target + r * problem.c_strides.row;
        if (index < 0) {
          for (int64_t head = 0; head < part.heads; ++head)
            fill(row + head * problem.c_strides.head, part.columns, T(0));
        } else {
          a[count] = source + index * problem.a_strides.row;
          c[count++] = row;
        }
      }
    }
  };

  // Asks for the rows of A that come next, a few cache lines at a time, while there is arithmetic to hide them.
  template <class T>
  struct Announcement {
    const T* const* rows;
    int64_t offset;  // into each row
    int64_t count;   // of rows
    int64_t bytes;   // of each row
    int64_t lines;   // at a time
    int64_t row = 0, byte = 0;

    inline __attribute__((always_inline)) void operator()() {
      for (int64_t n = lines; n > 0 && row < count; --n) {
        __builtin_prefetch(reinterpret_cast<const char*>(rows[row] + offset) + byte, 0, 2);
        byte += kCacheLine;
        if (byte >= bytes) {
          byte = 0;
          ++row;
        }
      }
    }
  };

  // Of what follows rows [i, i + count) of a head, k elements each from k0 on: the next head's, or the next rows'. All
  // of it in `turns` turns.
  template <class T>
  static Announcement<T> announce_rows(const ForwardProblem& problem, const Rows<T>& rows, int64_t i, int64_t count,
                                       int64_t head, int64_t heads, int64_t k0, int64_t k, int64_t turns) {
    const bool same_rows = head + 1 < heads;
    const int64_t first = same_rows ? i : i + count;
    const int64_t offset = k0 * problem.a_strides.column + (same_rows ? (head + 1) * problem.a_strides.head : 0);
    const bool dense = problem.a_strides.column == 1 && turns > 0;
    const int64_t next_count = dense ? smaller(count, rows.count - first) : 0;
    const int64_t bytes = k * static_cast<int64_t>(sizeof(T));
    return {rows.a + first, offset, next_count, bytes,
            dense ? ceil_div(next_count * ceil_div(bytes, kCacheLine), turns) : 0};
  }

  // Rounds and stores sums with the bias added; nothing beyond the last column of C.
  template <class T>
  struct Finish {
    static constexpr bool kTakesAll = false;  // whole vectors, always

    T* const* rows;   // of C
    int64_t offset;   // of the first column, into each row
    int64_t columns;  // of C from there on
    const Sum* bias;  // of those columns, or nullptr

    bool takes_vectors(int vectors) const { return columns >= vectors * kWidth && !bias; }
    inline __attribute__((always_inline)) void put(int64_t i, int v, Vector sum) const {
      Isa::store(rows[i] + offset + v * kWidth, sum);
    }
    // `count` sums, in whole vectors.
    __attribute__((noinline)) void put_row(int64_t i, const Sum* sums, int64_t count) const {
      for (int64_t j = 0; j < count && j < columns; j += kWidth) {
        Vector sum = Isa::load(sums + j);
        if (bias) sum = Isa::add(sum, Isa::load(bias + j));
        T* const to = rows[i] + offset + j;
        if (j + kWidth <= columns) {
          Isa::store(to, sum);
        } else {
          T whole[kWidth];
          Isa::store(whole, sum);
          std::memcpy(to, whole, (columns - j) * sizeof(T));
        }
      }
    }
  };

  // Adds sums to those of the blocks before, in memory of whole panels.
  struct Accumulate {
    static constexpr bool kTakesAll = true;

    Sum* to;
    int64_t step;
    bool first;  // there are none before

    inline __attribute__((always_inline)) void put(int64_t i, int v, Vector sum) const {
      Sum* const place = to + i * step + v * kWidth;
      Isa::store(place, first ? sum : Isa::add(Isa::load(place), sum));
    }
  };

  // The bias of a task's columns as sums, head after head, zeros up to whole panels; nullptr where there is none.
  static int64_t bias_bytes(const ForwardProblem& problem, const Part& part) {
    return problem.bias ? Arena::bytes<Sum>(part.heads * part.width) : 0;
  }
  template <class T>
  static const Sum* convert_bias(Arena& arena, const ForwardProblem& problem, const Part& part) {
    if (!problem.bias) return nullptr;
    Sum* const sums = arena.take<Sum>(part.heads * part.width);
    fill(sums, part.heads * part.width, Sum(0));
    for (int64_t head = 0; head < part.heads; ++head)
      convert(static_cast<const T*>(problem.bias) + (part.first_head + head) * problem.n + part.first_column, 1,
              part.columns, sums + head * part.width);
    return sums;
  }

  // For the columns of a head from `column` on.
  template <class T>
  static Finish<T> finish(const ForwardProblem& problem, const Part& part, const Rows<T>& rows, const Sum* bias,
                          int64_t head, int64_t column) {
    return {rows.c, head * problem.c_strides.head + column, part.columns - column,
            bias ? bias + head * part.width + column : nullptr};
  }

  // Where row i of a task begins in the output of wgrad.
  template <class T>
  static T* row_of(const WgradProblem& problem, const Part& part, int64_t head, int64_t i) {
    return static_cast<T*>(problem.c) + ((part.first_head + head) * problem.m + part.first_row + i) * problem.n +
           part.first_column;
  }

  template <class T>
  static void forward(const ForwardProblem& problem, const Tasks& tasks, int64_t task) {
    if (problem.k <= kShortK) {
      forward_with_step<T, kShortRowStep>(problem, tasks, task);
    } else {
      forward_with_step<T, kRowStep>(problem, tasks, task);
    }
  }

  // A task packs its columns of B, for all of its heads, once and keeps them in L2. Then come the rows, a register
  // block of them at a time, head after head: in that order short heads are read and written as long streams. A
  // block's rows of one head, converted, stay in L1 while that head's panels of B pass by.
  template <class T, int64_t kStep>
  static void forward_with_step(const ForwardProblem& problem, const Tasks& tasks, int64_t task) {
    const Part part(tasks, task, problem.heads, problem.m, problem.n);
    const bool one_block = problem.k <= kBlockK;
    const int64_t head_size = smaller(problem.k, kBlockK) * part.width;  // of packed B
    const int64_t partial_size = one_block ? 0 : part.heads * part.rows * part.width;
    Arena arena(Rows<T>::bytes(part.rows) + bias_bytes(problem, part) + Arena::bytes<Sum>(kRows * kStep) +
                Arena::bytes<Sum>(part.heads * head_size) + Arena::bytes<Sum>(partial_size));
    const Rows<T> rows(arena, problem, part);
    if (rows.count == 0) return;
    const Sum* const bias = convert_bias<T>(arena, problem, part);
    Sum* const a = arena.take<Sum>(kRows * kStep);
    Sum* const packed = arena.take<Sum>(part.heads * head_size);
    Sum* const partial = arena.take<Sum>(partial_size);

    const T* const b = static_cast<const T*>(problem.b) + part.first_head * problem.b_strides.head +
                       part.first_column * problem.b_strides.column;
    const int64_t direct_rows = sizeof(T) == 2 ? kDirectRowsOfHalves : kDirectRows;
    const bool reads_in_place = rows.count <= direct_rows && problem.b_strides.column == 1;
    const int64_t in_place = reads_in_place ? part.columns / kColumns * kColumns : 0;  // columns of B not packed

    for (int64_t k0 = 0; k0 == 0 || k0 < problem.k; k0 += kBlockK) {
      const int64_t k = smaller(kBlockK, problem.k - k0);
      const auto b_block = [&](int64_t head) { return b + head * problem.b_strides.head + k0 * problem.b_strides.row; };
      for (int64_t head = 0; head < part.heads; ++head)
        for (int64_t column = in_place; column < part.columns; column += kColumns)
          pack(b_block(head) + column * problem.b_strides.column, problem.b_strides.row, problem.b_strides.column, k,
               smaller(kColumns, part.columns - column), packed + head * head_size + column * k);
      const int64_t turns = part.width / kColumns * ceil_div(k, kChunk);

      for_pieces(rows.count, [&](auto size, int64_t i0) {
        constexpr int M = decltype(size)::value;
        for (int64_t head = 0; head < part.heads; ++head) {
          const int64_t a_offset = head * problem.a_strides.head + k0 * problem.a_strides.column;
          for (int64_t i = 0; i < M; ++i)
            convert(rows.a[i0 + i] + a_offset, problem.a_strides.column, k, a + i * kStep);
          auto next = announce_rows(problem, rows, i0, M, head, part.heads, k0, k, turns);
          const auto multiply = [&](auto vectors, int64_t column, const auto* b_rows, int64_t b_step) {
            constexpr int V = decltype(vectors)::value;
            if (one_block) {
              Finish<T> store = finish(problem, part, rows, bias, head, column);
              store.rows += i0;
              block<M, V, kStep>(k, a, 1, b_rows, b_step, store, next);
            } else {
              Sum* const sums = partial + (head * rows.count + i0) * part.width + column;
              block<M, V, kStep>(k, a, 1, b_rows, b_step, Accumulate{sums, part.width, k0 == 0}, next);
            }
          };
          int64_t column = 0;
          if constexpr (M == 1)  // wider blocks keep enough sums in flight
            for (; column + Isa::kWide * kWidth <= in_place; column += Isa::kWide * kWidth)
              multiply(Size<Isa::kWide>(), column, b_block(head) + column, problem.b_strides.row);
          for (; column < in_place; column += kColumns)
            multiply(Size<Isa::kVectors>(), column, b_block(head) + column, problem.b_strides.row);
          for (; column < part.columns; column += kColumns)
            multiply(Size<Isa::kVectors>(), column, static_cast<const Sum*>(packed + head * head_size + column * k),
                     kColumns);
        }
      });
    }
    if (one_block) return;
    for (int64_t head = 0; head < part.heads; ++head)
      for (int64_t i = 0; i < rows.count; ++i)
        finish(problem, part, rows, bias, head, 0)
            .put_row(i, partial + (head * rows.count + i) * part.width, part.width);
  }

  // The tokens of one block of wgrad: where their rows begin in A and G, for a task's first head. Those without a row
  // of A are left out.
  template <class T>
  struct Tokens {
    const T* a[kBlockTokens];
    const T* g[kBlockTokens];
    int64_t count = 0;

    void read(const WgradProblem& problem, const Part& part, int64_t first) {
      const T* const a_first = static_cast<const T*>(problem.a) + part.first_head * problem.a_strides.head +
                               part.first_row * problem.a_strides.column;
      const T* const g_first = static_cast<const T*>(problem.g) + part.first_head * problem.g_strides.head +
                               part.first_column * problem.g_strides.column;
      count = 0;
      for (int64_t r = first; r < smaller(first + kBlockTokens, problem.t); ++r) {
        const int64_t index = problem.indices ? problem.indices[r] : r;
        if (index < 0) continue;
        a[count] = a_first + index * problem.a_strides.row;
        g[count++] = g_first + r * problem.g_strides.row;
      }
    }
  };

  // A task keeps its sums in L2 while blocks of tokens pass by, each converted and packed once: A into strips of kRows
  // of its columns, G into panels. A panel and a strip at a time are in L1.
  template <class T>
  static void wgrad(const WgradProblem& problem, const Tasks& tasks, int64_t task) {
    const Part part(tasks, task, problem.heads, problem.m, problem.n);
    constexpr int kStripWidth = (kRows + kWidth - 1) / kWidth * kWidth;
    constexpr int64_t kStrip = kBlockTokens * kRows + kStripWidth, kPanel = kBlockTokens * kColumns;
    const int64_t strips = ceil_div(part.rows, kRows), panels = part.width / kColumns;
    const int64_t sums_size = part.heads * part.rows * part.width;
    Arena arena(2 * Arena::bytes<Tokens<T>>(1) + Arena::bytes<Sum>(part.heads * strips * kStrip) +
                Arena::bytes<Sum>(part.heads * panels * kPanel) + Arena::bytes<Sum>(sums_size));
    Tokens<T>* tokens = arena.take<Tokens<T>>(1);
    Tokens<T>* next_tokens = arena.take<Tokens<T>>(1);
    Sum* const a = arena.take<Sum>(part.heads * strips * kStrip);
    Sum* const g = arena.take<Sum>(part.heads * panels * kPanel);
    Sum* const sums = arena.take<Sum>(sums_size);
    if (problem.t == 0) fill(sums, sums_size, Sum(0));
    next_tokens->read(problem, part, 0);
    for (int64_t first = 0; first < problem.t; first += kBlockTokens) {
      Tokens<T>* const passed = tokens;
      tokens = next_tokens;
      next_tokens = passed;
      next_tokens->read(problem, part, first + kBlockTokens);
      for (int64_t p = 0; p < tokens->count; ++p)
        for (int64_t head = 0; head < part.heads; ++head) {
          const T* const from = tokens->a[p] + head * problem.a_strides.head;
          Sum* const to = a + head * strips * kStrip + p * kRows;
          int64_t strip = 0;
          if (problem.a_strides.column == 1)  // the next token overwrites what is stored beyond a strip's kRows
            for (; strip * kRows + kStripWidth <= part.rows; ++strip)
              convert_whole<kStripWidth>(from + strip * kRows, to + strip * kStrip);
          for (; strip < strips; ++strip)
            convert(from + strip * kRows * problem.a_strides.column, problem.a_strides.column,
                    smaller(kRows, part.rows - strip * kRows), to + strip * kStrip);
        }
      for (int64_t p = 0; p < tokens->count; ++p)
        for (int64_t head = 0; head < part.heads; ++head)
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t column = panel * kColumns;
            Sum* const to = g + (head * panels + panel) * kPanel + p * kColumns;
            const T* const from = tokens->g[p] + head * problem.g_strides.head + column * problem.g_strides.column;
            if (column + kColumns <= part.columns && problem.g_strides.column == 1) {
              convert_whole<kColumns>(from, to);
            } else {
              fill(to, kColumns, Sum(0));
              convert(from, problem.g_strides.column, smaller(kColumns, part.columns - column), to);
            }
          }

      const int64_t turns = part.heads * panels * strips;
      const auto announce = [&](const T* const* rows, const Strides& strides, int64_t columns) {
        const int64_t bytes = ((part.heads - 1) * strides.head + columns) * static_cast<int64_t>(sizeof(T));
        const bool dense = strides.column == 1 && strides.head <= 2 * columns;
        const int64_t lines = ceil_div(next_tokens->count * ceil_div(bytes, kCacheLine), turns);
        return Announcement<T>{rows, 0, dense ? next_tokens->count : 0, bytes, lines};
      };
      auto next_a = announce(next_tokens->a, problem.a_strides, part.rows);
      auto next_g = announce(next_tokens->g, problem.g_strides, part.columns);
      auto next = [&] {
        next_a();
        next_g();
      };
      for (int64_t head = 0; head < part.heads; ++head)
        for (int64_t panel = 0; panel < panels; ++panel)
          for_pieces(part.rows, [&](auto size, int64_t i0) {
            constexpr int M = decltype(size)::value;
            const Sum* const strip = a + (head * strips + i0 / kRows) * kStrip + i0 % kRows;
            const Sum* const columns = g + (head * panels + panel) * kPanel;
            Sum* const to = sums + (head * part.rows + i0) * part.width + panel * kColumns;
            block<M, Isa::kVectors, 1>(tokens->count, strip, kRows, columns, kColumns,
                                       Accumulate{to, part.width, first == 0}, next);
          });
    }

    for (int64_t head = 0; head < part.heads; ++head)
      for (int64_t i = 0; i < part.rows; ++i) {
        T* const row = row_of<T>(problem, part, head, i);
        Finish<T>{&row, 0, part.columns, nullptr}.put_row(0, sums + (head * part.rows + i) * part.width, part.width);
      }
  }
};

// Entry points of one instruction set: `Single` sums in float32, `Double` in float64.
template <class Single, class Double>
struct Table {
  static void forward(const ForwardProblem& problem, const Tasks& tasks, int64_t task) {
    switch (problem.dtype) {
      case Dtype::kFloat32:
        return Gemm<Single>::template forward<float>(problem, tasks, task);
      case Dtype::kFloat16:
        return Gemm<Single>::template forward<c10::Half>(problem, tasks, task);
      case Dtype::kBFloat16:
        return Gemm<Single>::template forward<c10::BFloat16>(problem, tasks, task);
      case Dtype::kFloat64:
        return Gemm<Double>::template forward<double>(problem, tasks, task);
    }
  }
  static void wgrad(const WgradProblem& problem, const Tasks& tasks, int64_t task) {
    switch (problem.dtype) {
      case Dtype::kFloat32:
        return Gemm<Single>::template wgrad<float>(problem, tasks, task);
      case Dtype::kFloat16:
        return Gemm<Single>::template wgrad<c10::Half>(problem, tasks, task);
      case Dtype::kBFloat16:
        return Gemm<Single>::template wgrad<c10::BFloat16>(problem, tasks, task);
      case Dtype::kFloat64:
        return Gemm<Double>::template wgrad<double>(problem, tasks, task);
    }
  }
  static constexpr KernelTable table{forward, wgrad};
};

}  // namespace
}  // namespace mhmatmul::cpu
