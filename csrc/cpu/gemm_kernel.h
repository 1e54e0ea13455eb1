// The kernels, as templates over an instruction set. Each gemm_<isa>.cpp includes this inside its target region and
// instantiates it once; nothing here may be called from outside that file but through its table.
//
// An instruction set `Isa` gives: a Vector of kWidth elements of `Sum`; the register block, kRows by kVectors vectors,
// or kWide vectors of a single row; and load (from any element type), broadcast, zero, add, fma, store (to any element
// type, rounding once) and transpose (of a square of kWidth).
#pragma once

#include "gemm.h"
#include "gemm_tuning.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>

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

template <class T>
inline void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

template <int value_>
struct Size {
  static constexpr int value = value_;
};

// Scratch memory of one task, carved from what its thread keeps.
class Arena {
 public:
  explicit Arena(int64_t bytes) : next_(static_cast<char*>(thread_scratch(bytes))) {}

  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
  }
  template <class T>
  T* take(int64_t count) {
    char* const taken = next_;
    next_ += bytes<T>(count);
    return reinterpret_cast<T*>(taken);
  }

 private:
  static constexpr int64_t kAlignment = 64;
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

  // The register block: tile[i, j] = sum over p in [0, k) of a(i, p) b(p, j), for M rows and V vectors of columns,
  // handed vector by vector to `store(i, v, sum)`. a(i, p) lies at a[i * kRowStep + p * a_step].
  template <int M, int V, int64_t kRowStep, class B, class Store>
  static inline __attribute__((always_inline)) void block(int64_t k, const Sum* a, int64_t a_step, const B* b,
                                                          int64_t b_step, const Store& store) {
    Vector sum[M][V];
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) sum[i][v] = Isa::zero();
    for (int64_t p = 0; p < k; ++p) {
      Vector row[V];
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) row[v] = Isa::load(b + v * kWidth);
#pragma GCC unroll 32
      for (int i = 0; i < M; ++i) {
        const Vector scalar = Isa::broadcast(a[i * kRowStep]);
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) sum[i][v] = Isa::fma(scalar, row[v], sum[i][v]);
      }
      a += a_step;
      b += b_step;
    }
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) store(i, v, sum[i][v]);
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
      for (int64_t p = 0; p < k; ++p)
        for (int v = 0; v < Isa::kVectors; ++v)
          Isa::store(panel + p * kColumns + v * kWidth, Isa::load(from + p * row_stride + v * kWidth));
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

  // The rows of a task: where those that name a row of A begin in A and C. The others become zeros.
  template <class T>
  struct Rows {
    const T** a;
    T** c;
    int64_t count = 0;

    static int64_t bytes(int64_t rows) { return Arena::bytes<const T*>(rows) + Arena::bytes<T*>(rows); }

    Rows(Arena& arena, const ForwardProblem& problem, int64_t head, int64_t first, int64_t last, int64_t column,
         int64_t columns)
        : a(arena.take<const T*>(last - first)), c(arena.take<T*>(last - first)) {
      const T* const source = static_cast<const T*>(problem.a) + head * problem.a_strides.head;
      T* const target = static_cast<T*>(problem.c) + head * problem.c_strides.head;
      for (int64_t r = first; r < last; ++r) {
        const int64_t index = problem.indices ? problem.indices[r] : r;
        T* const row = target + r * problem.c_strides.row;
        if (index < 0) {
          fill(row + column, columns, T(0));
        } else {
          a[count] = source + index * problem.a_strides.row;
          c[count++] = row;
        }
      }
    }
  };

  // Stores a vector of sums with the bias added, at columns counted from a task's first; nothing beyond its last.
  template <class T>
  struct Finish {
    T* const* rows;        // of C
    int64_t first_column;  // of the task
    int64_t columns;       // of the task
    const Sum* bias;       // of the task, or nullptr

    // Asks for the cache lines that M rows of a block will be stored to.
    template <int M, int V>
    inline __attribute__((always_inline)) void announce(int64_t i, int64_t column) const {
      for (int r = 0; r < M; ++r)
        for (int64_t byte = 0; byte < V * kWidth * static_cast<int64_t>(sizeof(T)); byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(rows[i + r] + first_column + column) + byte, 1);
    }

    inline __attribute__((always_inline)) void operator()(int64_t i, int64_t column, Vector sum) const {
      if (bias) sum = Isa::add(sum, Isa::load(bias + column));
      T* const to = rows[i] + first_column + column;
      if (column + kWidth <= columns) {
        Isa::store(to, sum);
      } else if (column < columns) {
        T whole[kWidth];
        Isa::store(whole, sum);
        std::memcpy(to, whole, (columns - column) * sizeof(T));
      }
    }
  };

  template <class T>
  static void forward(const ForwardProblem& problem, const Tasks& tasks, int64_t task) {
    if (problem.k <= kShortK) {
      forward_with_step<T, kShortRowStep>(problem, tasks, task);
    } else {
      forward_with_step<T, kRowStep>(problem, tasks, task);
    }
  }

  // A task packs its columns of B once and keeps them in L2; then a register block's rows of A, converted, stay in L1
  // while the panels of B stream by.
  template <class T, int64_t kStep>
  static void forward_with_step(const ForwardProblem& problem, const Tasks& tasks, int64_t task) {
    const int64_t column_tasks = (problem.n + tasks.columns_per_task - 1) / tasks.columns_per_task;
    const int64_t first_column = task % column_tasks * tasks.columns_per_task;
    const int64_t head = task / column_tasks % problem.heads;
    const int64_t first_row = task / column_tasks / problem.heads * tasks.rows_per_task;
    const int64_t columns = smaller(tasks.columns_per_task, problem.n - first_column);
    const int64_t end_row = smaller(first_row + tasks.rows_per_task, problem.m);
    const int64_t width = (columns + kColumns - 1) / kColumns * kColumns;
    const bool one_block = problem.k <= kBlockK;

    const int64_t most_rows = end_row - first_row;
    const int64_t packed_size = smaller(problem.k, kBlockK) * width;
    const int64_t partial_size = one_block ? 0 : most_rows * width;
    Arena arena(Rows<T>::bytes(most_rows) + Arena::bytes<Sum>(kRows * kStep) + Arena::bytes<Sum>(packed_size) +
                Arena::bytes<Sum>(partial_size) + Arena::bytes<Sum>(width));
    const Rows<T> rows(arena, problem, head, first_row, end_row, first_column, columns);
    if (rows.count == 0) return;
    Sum* const a = arena.take<Sum>(kRows * kStep);
    Sum* const packed = arena.take<Sum>(packed_size);
    Sum* const partial = arena.take<Sum>(partial_size);
    Sum* const bias_sums = arena.take<Sum>(width);

    const T* const b =
        static_cast<const T*>(problem.b) + head * problem.b_strides.head + first_column * problem.b_strides.column;
    const Sum* bias = nullptr;
    if (problem.bias) {
      convert(static_cast<const T*>(problem.bias) + head * problem.n + first_column, 1, columns, bias_sums);
      fill(bias_sums + columns, width - columns, Sum(0));
      bias = bias_sums;
    }
    const Finish<T> finish{rows.c, first_column, columns, bias};
    const bool reads_in_place = rows.count <= kDirectRows && problem.b_strides.column == 1;
    const int64_t in_place = reads_in_place ? columns / kColumns * kColumns : 0;  // columns of B not packed

    for (int64_t k0 = 0; k0 == 0 || k0 < problem.k; k0 += kBlockK) {
      const int64_t k = smaller(kBlockK, problem.k - k0);
      const T* const b_block = b + k0 * problem.b_strides.row;
      for (int64_t column = in_place; column < columns; column += kColumns)
        pack(b_block + column * problem.b_strides.column, problem.b_strides.row, problem.b_strides.column, k,
             smaller(kColumns, columns - column), packed + column * k);
      for_pieces(rows.count, [&](auto size, int64_t i0) {
        constexpr int M = decltype(size)::value;
        for (int64_t i = 0; i < M; ++i)
          convert(rows.a[i0 + i] + k0 * problem.a_strides.column, problem.a_strides.column, k, a + i * kStep);
        const auto multiply = [&](auto vectors, int64_t column, const auto* b_rows, int64_t b_step) {
          constexpr int V = decltype(vectors)::value;
          if (one_block) {
            block<M, V, kStep>(k, a, 1, b_rows, b_step,
                               [&](int i, int v, Vector sum) { finish(i0 + i, column + v * kWidth, sum); });
          } else {
            Sum* const sums = partial + i0 * width + column;
            block<M, V, kStep>(k, a, 1, b_rows, b_step, [&](int i, int v, Vector sum) {
              Sum* const to = sums + i * width + v * kWidth;
              Isa::store(to, k0 == 0 ? sum : Isa::add(Isa::load(to), sum));
            });
          }
        };
        int64_t column = 0;
        if constexpr (M == 1)  // wider blocks keep enough sums in flight
          for (; column + Isa::kWide * kWidth <= in_place; column += Isa::kWide * kWidth)
            multiply(Size<Isa::kWide>(), column, b_block + column, problem.b_strides.row);
        for (; column < in_place; column += kColumns)
          multiply(Size<Isa::kVectors>(), column, b_block + column, problem.b_strides.row);
        for (; column < columns; column += kColumns)
          multiply(Size<Isa::kVectors>(), column, static_cast<const Sum*>(packed + column * k), kColumns);
      });
    }
    if (one_block) return;
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t column = 0; column < columns; column += kWidth)
        finish(i, column, Isa::load(partial + i * width + column));
  }

  template <class T>
  static void wgrad(const WgradProblem& problem, const Tasks& tasks, int64_t task) {
    const int64_t column_tasks = (problem.n + tasks.columns_per_task - 1) / tasks.columns_per_task;
    const int64_t row_tasks = (problem.m + tasks.rows_per_task - 1) / tasks.rows_per_task;
    const int64_t first_column = task % column_tasks * tasks.columns_per_task;
    const int64_t first_row = task / column_tasks % row_tasks * tasks.rows_per_task;
    const int64_t head = task / column_tasks / row_tasks;
    const int64_t columns = smaller(tasks.columns_per_task, problem.n - first_column);
    const int64_t rows = smaller(tasks.rows_per_task, problem.m - first_row);
    const int64_t width = (columns + kColumns - 1) / kColumns * kColumns;

    const T* const a =
        static_cast<const T*>(problem.a) + head * problem.a_strides.head + first_row * problem.a_strides.column;
    const T* const g =
        static_cast<const T*>(problem.g) + head * problem.g_strides.head + first_column * problem.g_strides.column;
    Arena arena(Arena::bytes<Sum>(kBlockK * rows) + Arena::bytes<Sum>(kBlockK * kColumns) +
                Arena::bytes<Sum>(rows * width) + Arena::bytes<T*>(rows));
    Sum* const a_block = arena.take<Sum>(kBlockK * rows);
    Sum* const panel = arena.take<Sum>(kBlockK * kColumns);
    Sum* const sums = arena.take<Sum>(rows * width);
    T** const c_rows = arena.take<T*>(rows);
    fill(sums, rows * width, Sum(0));
    int64_t kept[kBlockK];
    for (int64_t r0 = 0; r0 < problem.t; r0 += kBlockK) {
      int64_t count = 0;
      for (int64_t r = r0; r < smaller(r0 + kBlockK, problem.t); ++r) {
        const int64_t index = problem.indices ? problem.indices[r] : r;
        if (index < 0) continue;
        convert(a + index * problem.a_strides.row, problem.a_strides.column, rows, a_block + count * rows);
        kept[count++] = r;
      }
      for (int64_t column = 0; column < columns; column += kColumns) {
        const int64_t here = smaller(kColumns, columns - column);
        if (here < kColumns) fill(panel, count * kColumns, Sum(0));
        for (int64_t p = 0; p < count; ++p)
          convert(g + kept[p] * problem.g_strides.row + column * problem.g_strides.column, problem.g_strides.column,
                  here, panel + p * kColumns);
        for_pieces(rows, [&](auto size, int64_t i0) {
          Sum* const to = sums + i0 * width + column;
          block<decltype(size)::value, Isa::kVectors, 1>(count, a_block + i0, rows, static_cast<const Sum*>(panel),
                                                         kColumns, [&](int i, int v, Vector sum) {
                                                           Sum* const place = to + i * width + v * kWidth;
                                                           Isa::store(place, Isa::add(Isa::load(place), sum));
                                                         });
        });
      }
    }
    T* const c = static_cast<T*>(problem.c) + (head * problem.m + first_row) * problem.n + first_column;
    for (int64_t i = 0; i < rows; ++i) c_rows[i] = c + i * problem.n;
    const Finish<T> finish{c_rows, 0, columns, nullptr};
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t column = 0; column < columns; column += kWidth)
        finish(i, column, Isa::load(sums + i * width + column));
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
