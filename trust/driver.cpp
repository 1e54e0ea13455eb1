// Runs the CPU kernels as their bindings do, without a Tensor, on operands between guard pages, over shapes at the
// edges of their blocks; compares every result with plain loops in float64. trust/sanitize.py builds it once for each
// tool.
//
//   driver [--capability name] [--cases n] [--first n] [--threads n] [--callers n] [--sizes] [--plant defect]
//
// Prints `ran <what> <cases>` for every kind of case. A wrong result, a touched surrounding or a fault ends it with 1.
#include "guarded.h"

#include "cpu/combine.h"
#include "cpu/gemm.h"
#include "cpu/gemm_kernel.h"
#include "cpu/rows.h"
#include "cpu/select.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include <csignal>

#if defined(LACKS_AVX512)  // this machine: their sources are left out
namespace mhmatmul::cpu {
const KernelTable& avx512_kernels() { std::abort(); }
const KernelTable& avx512_bf16_kernels() { std::abort(); }
const KernelTable& amx_kernels() { std::abort(); }
}  // namespace mhmatmul::cpu
#endif

using namespace mhmatmul;
using namespace mhmatmul::cpu;
using trust::fail;
using trust::Guarded;
using trust::Layout;
using trust::Operand;
using trust::Side;

namespace {

struct Options {
  std::string capability, plant;
  int64_t cases = 100, first = 0;
  int threads = 3, callers = 1;
  bool sizes = false;
} options;

// What a thread works on, for a message from a signal handler.
thread_local char doing[256] = "";
std::mutex counts_mutex;
std::map<std::string, int64_t> counts;

void count(const std::string& what) {
  const std::lock_guard lock(counts_mutex);
  ++counts[what];
}

void require(bool good, const std::string& what) {
  if (!good) fail("driver: " + what + ": " + doing);
}

// Reproducible from the case's number alone.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15 + 1) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>(bits() >> 11) / (1LL << 53) * 2 - 1; }
  template <class List>
  auto pick(const List& list) {
    return list[below(std::size(list))];
  }

 private:
  uint64_t state_;
};

template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
double number(T x) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<float>(x);
  } else {
    return x;
  }
}

template <class T>
constexpr double kEps = std::is_same_v<T, double>          ? 0x1p-52
                        : std::is_same_v<T, float>         ? 0x1p-23
                        : std::is_same_v<T, c10::BFloat16> ? 0x1p-7
                                                           : 0x1p-10;
template <class T>
constexpr Dtype kDtype = std::is_same_v<T, double>          ? Dtype::kFloat64
                         : std::is_same_v<T, float>         ? Dtype::kFloat32
                         : std::is_same_v<T, c10::BFloat16> ? Dtype::kBFloat16
                                                            : Dtype::kFloat16;

// `length` products, whose magnitudes add up to `magnitude`, summed in Sum and rounded to T.
template <class T>
void require_near(T got, double exact, double magnitude, int64_t length) {
  const double allowed = (static_cast<double>(length) + 8) * kEps<SumOf<T>> * magnitude + kEps<T> * std::abs(exact) +
                         (sizeof(T) == 2 ? 0x1p-24 : 0x1p-100);
  if (std::abs(number(got) - exact) <= allowed) return;
  char text[128];
  std::snprintf(text, sizeof(text), "a wrong result, %.9g, exact %.9g", number(got), exact);
  require(false, text);
}

// As the bindings do it: threads take tasks one by one. They begin together, and relaxed: an order of the shared
// counter would pass for one of what the tasks write.
template <class Body>
void for_tasks(int64_t tasks, int threads, const Body& body) {
  if (threads == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<int> begun{0};
  std::vector<std::thread> pool;
  pool.reserve(threads);
  const std::string caller = doing;
  for (int i = 0; i < threads; ++i)
    pool.emplace_back([&] {
      std::snprintf(doing, sizeof(doing), "%s", caller.c_str());
      begun.fetch_add(1, std::memory_order_relaxed);
      while (begun.load(std::memory_order_relaxed) < threads) std::this_thread::yield();
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
    });
  for (auto& thread : pool) thread.join();
}

template <class Problem>
void run_all(const Problem& problem, const Tasks& tasks, int threads) {
  for_tasks(tasks.count, threads, [&](int64_t task) { run(problem, tasks, task); });
}

// The finest cut that kernels are given, however small the problem.
Tasks finest(int64_t heads, int64_t m, int64_t n) { return {heads * ceil_div(m, 96) * ceil_div(n, 128), 1, 96, 128}; }

constexpr int64_t kRowsList[] = {1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 31, 33, 95, 97, 193};
constexpr int64_t kColumnsList[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 261};
constexpr int64_t kDepthList[] = {0, 1, 2, 3, 7, 8, 9, 16, 31, 32, 33, 63, 64, 127, 128, 129, 200};
constexpr int64_t kLongDepthList[] = {257, 511, 512, 513, 1023, 1025};
constexpr int64_t kTokensList[] = {0, 1, 2, 5, 31, 32, 33, 63, 127, 128, 129, 255, 257};
constexpr int64_t kHeadsList[] = {1, 1, 2, 3, 5};

constexpr int64_t kFar = int64_t{1} << 31;  // elements

// Of [rows, heads, columns]. The last of them step by more elements than 32 bits count.
const Layout kRowLayouts[] = {
    {"contiguous", {0, 1, 2}, 1, 0, 0, false},           {"rows apart", {0, 1, 2}, 1, 1, 0, false},
    {"rows and heads apart", {0, 1, 2}, 1, 2, 0, false}, {"heads first", {1, 0, 2}, 1, 0, 0, false},
    {"every other column", {0, 1, 2}, 2, 0, 0, false},   {"rows expanded", {0, 1, 2}, 1, 0, 0, true},
    {"columns first", {2, 1, 0}, 1, 0, 0, false},        {"rows far apart", {0, 1, 2}, 1, 1, kFar, false},
};
constexpr int kFarLayout = 7;
// Of [heads, k, n].
const Layout kWeightLayouts[] = {
    {"contiguous", {0, 1, 2}, 1, 0, 0, false},         {"rows apart", {0, 1, 2}, 1, 2, 0, false},
    {"transposed", {0, 2, 1}, 1, 0, 0, false},         {"transposed, apart", {0, 2, 1}, 1, 2, 0, false},
    {"every other column", {0, 1, 2}, 2, 0, 0, false}, {"one for all heads", {0, 1, 2}, 1, 0, 0, true},
    {"heads inside", {1, 0, 2}, 1, 1, 0, false},       {"heads far apart", {0, 1, 2}, 1, 1, kFar, false},
};
// Of outputs [rows, heads, columns], columns side by side.
const Layout kOutputLayouts[] = {
    {"contiguous", {0, 1, 2}, 1, 0, 0, false},           {"rows apart", {0, 1, 2}, 1, 1, 0, false},
    {"rows and heads apart", {0, 1, 2}, 1, 2, 0, false}, {"heads first", {1, 0, 2}, 1, 0, 0, false},
    {"rows far apart", {0, 1, 2}, 1, 1, kFar, false},
};
const Layout kContiguous = kRowLayouts[0];

// A layout for so many rows; of those far apart there is address space for a few.
template <class Layouts>
const Layout& pick_layout(Random& random, const Layouts& layouts, int64_t rows) {
  const Layout& layout = layouts[random.below(std::size(layouts))];
  return layout.least > 0 && rows > 17 ? layouts[0] : layout;
}

enum class Naming { kAll, kSome, kDistinct };

// Names of t of m rows: with -1 among them and repeated, or distinct as those of a selection's inverse are.
std::vector<int64_t> names(Random& random, Naming naming, int64_t t, int64_t m) {
  std::vector<int64_t> indices(t);
  for (int64_t r = 0; r < t; ++r)
    indices[r] = naming == Naming::kDistinct ? (random.below(3) == 0 || r >= m ? -1 : r) : random.below(m + 1) - 1;
  return indices;
}

// A vector's elements in guarded memory.
template <class T>
class Column {
 public:
  Column(const std::vector<T>& from, Side side)
      : operand_({1, 1, static_cast<int64_t>(from.size())}, kContiguous, side) {
    for (size_t i = 0; i < from.size(); ++i) operand_.at(0, 0, static_cast<int64_t>(i)) = from[i];
  }
  T* data() const { return operand_.data(); }
  T& operator[](int64_t i) const { return operand_.at(0, 0, i); }
  bool surroundings_untouched() const { return operand_.surroundings_untouched(); }

 private:
  Operand<T> operand_;
};

template <class T>
std::vector<T> random_values(Random& random, int64_t count) {
  std::vector<T> values(count);
  for (auto& value : values) value = static_cast<T>(random.uniform());
  return values;
}

Strides strides(const std::array<int64_t, 3>& of) { return {of[0], of[1], of[2]}; }

// Two ways to run one problem must give the same bits.
template <class T>
class SameBits {
 public:
  void compare(const Operand<T>& output) {
    std::vector<T> values;
    output.for_each([&](T& element) { values.push_back(element); });
    if (before_.empty()) before_ = values;
    require(values.empty() || std::memcmp(values.data(), before_.data(), values.size() * sizeof(T)) == 0,
            "other bits in another place or on other threads");
  }

 private:
  std::vector<T> before_;
};

// Either side of the guard, one thread and several, the whole problem at once and finely cut.
template <class Body>
void in_every_way(const Body& body) {
  body(Side::kFront, 1, false);
  body(Side::kBack, options.threads, true);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  body(Side::kFront, options.threads, false);
  body(Side::kBack, 1, true);
#endif
}

template <class T>
void forward_case(int64_t number_of_case) {
  Random random(number_of_case);
  const int64_t heads = random.pick(kHeadsList), m = random.pick(kRowsList), n = random.pick(kColumnsList);
  const int64_t k = random.below(5) == 0 ? random.pick(kLongDepthList) : random.pick(kDepthList);
  const auto naming = static_cast<Naming>(random.below(3));
  const int64_t sources = naming == Naming::kAll ? m : 1 + random.below(2 * m);
  const Layout& a_layout = pick_layout(random, kRowLayouts, sources);
  const Layout& b_layout = random.pick(kWeightLayouts);
  const Layout& c_layout = pick_layout(random, kOutputLayouts, m);
  const bool has_bias = random.below(2) == 0;
  std::snprintf(
      doing, sizeof(doing),
      "case %lld: forward, element size %zu, %lld rows of %lld, %lld heads, k %lld, n %lld, a %s, b %s, c %s%s",
      static_cast<long long>(number_of_case), sizeof(T), static_cast<long long>(m), static_cast<long long>(sources),
      static_cast<long long>(heads), static_cast<long long>(k), static_cast<long long>(n), a_layout.name, b_layout.name,
      c_layout.name, has_bias ? ", bias" : "");
  const auto named = names(random, naming, m, sources);
  const auto seed = random.bits();
  SameBits<T> same;
  in_every_way([&](Side side, int threads, bool finely) {
    Random values(seed);
    const auto value = [&] { return static_cast<T>(values.uniform()); };
    const Operand<T> a({sources, heads, k}, a_layout, side), b({heads, k, n}, b_layout, side);
    const Operand<T> bias({1, heads, n}, kContiguous, side), c({m, heads, n}, c_layout, side);
    const Column<int64_t> indices(named, side);
    a.fill(value), b.fill(value), bias.fill(value);
    const auto bs = b.strides();
    const ForwardProblem problem{kDtype<T>,
                                 heads,
                                 m,
                                 n,
                                 k,
                                 a.data(),
                                 strides(a.strides()),
                                 naming == Naming::kAll ? nullptr : indices.data(),
                                 b.data(),
                                 {bs[1], bs[0], bs[2]},
                                 has_bias ? bias.data() : nullptr,
                                 c.data(),
                                 strides(c.strides())};
    run_all(problem, finely ? finest(heads, m, n) : cut(problem, threads), threads);
    for (int64_t r = 0; r < m; ++r)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t j = 0; j < n; ++j) {
          const int64_t row = naming == Naming::kAll ? r : named[r];
          double exact = 0, magnitude = 0;
          for (int64_t p = 0; row >= 0 && p < k; ++p) {
            const double product = number(a.at(row, head, p)) * number(b.at(head, p, j));
            exact += product;
            magnitude += std::abs(product);
          }
          if (has_bias && row >= 0) {
            exact += number(bias.at(0, head, j));
            magnitude += std::abs(number(bias.at(0, head, j)));
          }
          require_near(c.at(r, head, j), exact, magnitude, k);
        }
    for (const auto* const operand : {&a, &b, &bias, &c})
      require(operand->surroundings_untouched(), "something written outside of an operand");
    require(indices.surroundings_untouched(), "something written outside of the indices");
    same.compare(c);
  });
  count(std::string(naming == Naming::kAll ? "product" : "gathered product"));
}

template <class T>
void wgrad_case(int64_t number_of_case) {
  Random random(number_of_case);
  const int64_t heads = random.pick(kHeadsList), t = random.pick(kTokensList);
  const int64_t m = random.pick(kColumnsList), n = random.pick(kColumnsList);
  const auto naming = static_cast<Naming>(random.below(3));
  const int64_t sources = naming == Naming::kAll ? t : 1 + random.below(2 * t + 1);
  const Layout& a_layout = pick_layout(random, kRowLayouts, sources);
  const Layout& g_layout = pick_layout(random, kRowLayouts, t);
  std::snprintf(doing, sizeof(doing),
                "case %lld: wgrad, element size %zu, %lld tokens of %lld, %lld heads, m %lld, n %lld, a %s, g %s",
                static_cast<long long>(number_of_case), sizeof(T), static_cast<long long>(t),
                static_cast<long long>(sources), static_cast<long long>(heads), static_cast<long long>(m),
                static_cast<long long>(n), a_layout.name, g_layout.name);
  const auto named = names(random, naming, t, sources);
  const auto seed = random.bits();
  SameBits<T> same;
  in_every_way([&](Side side, int threads, bool finely) {
    Random values(seed);
    const auto value = [&] { return static_cast<T>(values.uniform()); };
    const Operand<T> a({sources, heads, m}, a_layout, side), g({t, heads, n}, g_layout, side);
    const Operand<T> c({heads, m, n}, kContiguous, side);
    const Column<int64_t> indices(named, side);
    a.fill(value), g.fill(value);
    const WgradProblem problem{kDtype<T>,
                               heads,
                               t,
                               m,
                               n,
                               a.data(),
                               strides(a.strides()),
                               naming == Naming::kAll ? nullptr : indices.data(),
                               g.data(),
                               strides(g.strides()),
                               c.data()};
    run_all(problem, finely ? finest(heads, m, n) : cut(problem, threads), threads);
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
          double exact = 0, magnitude = 0;
          for (int64_t r = 0; r < t; ++r) {
            const int64_t row = naming == Naming::kAll ? r : named[r];
            if (row < 0) continue;
            const double product = number(a.at(row, head, i)) * number(g.at(r, head, j));
            exact += product;
            magnitude += std::abs(product);
          }
          require_near(c.at(head, i, j), exact, magnitude, t);
        }
    for (const auto* const operand : {&a, &g, &c})
      require(operand->surroundings_untouched(), "something written outside of an operand");
    require(indices.surroundings_untouched(), "something written outside of the indices");
    same.compare(c);
  });
  count("gradient of the weight");
}

template <class T, class Format>
void select_case(int64_t number_of_case) {
  using Bits = typename Format::Bits;
  Random random(number_of_case);
  constexpr int64_t kSizes[] = {0, 1, 2, 3, 7, 8, 63, 64, 65, 300};
  const int64_t s = random.pick(kSizes), k = random.below(s + 2), first = random.below(2) * (int64_t{1} << 40);
  constexpr int64_t kSteps[] = {1, 3, kFar};
  const int64_t step = s > 17 ? 1 + random.below(2) : random.pick(kSteps);
  std::snprintf(doing, sizeof(doing), "case %lld: selection of %lld of %lld scores of %zu bytes, %lld apart",
                static_cast<long long>(number_of_case), static_cast<long long>(k), static_cast<long long>(s), sizeof(T),
                static_cast<long long>(step));
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double values[] = {0.0, -0.0, 0.25, 0.5, 0.5, 1.0, -1.0, kInfinity, -kInfinity, std::nan(""), 0x1p-24};
  const bool few = random.below(2) == 0;
  const auto score = [&] { return static_cast<T>(few ? random.pick(values) : random.uniform()); };
  const T threshold = score();
  const auto bits = [](T value) {
    Bits raw;
    std::memcpy(&raw, &value, sizeof(raw));
    return raw;
  };
  const Layout layout{"", {0, 1, 2}, step == kFar ? 1 : step, step == kFar ? 1 : 0, kFar, false};
  SelectionScratch<Format> scratch;
  for (const Side side : {Side::kFront, Side::kBack}) {
    const auto sizes = step == kFar ? std::array<int64_t, 3>{s, 1, 1} : std::array<int64_t, 3>{1, 1, s};
    const Operand<T> row(sizes, layout, side);
    row.fill(score);
    const auto got = select_row<Format>(reinterpret_cast<const Bits*>(row.data()), row.strides()[step == kFar ? 0 : 2],
                                        s, bits(threshold), k, first, scratch);
    std::vector<double> scores;
    row.for_each([&](T& element) { scores.push_back(number(element)); });
    std::vector<int64_t> ranked;
    for (int64_t j = 0; j < s; ++j)
      if (scores[j] >= number(threshold)) ranked.push_back(j);
    require(got.candidates == static_cast<int64_t>(ranked.size()), "other candidates");
    std::stable_sort(ranked.begin(), ranked.end(), [&](int64_t i, int64_t j) { return scores[i] > scores[j]; });
    ranked.resize(std::min<int64_t>(k, static_cast<int64_t>(ranked.size())));
    std::sort(ranked.begin(), ranked.end());
    for (auto& position : ranked) position += first;
    require(got.kept == ranked, "another selection");
    require(row.surroundings_untouched(), "something written outside of the scores");
  }
  count("selection");
}

template <class T>
void rows_case(int64_t number_of_case) {
  using Sum = SumOf<T>;
  Random random(number_of_case);
  constexpr int64_t kWidths[] = {0, 1, 2, 15, 16, 17, 33, 64};
  const int64_t m = 1 + random.below(20), t = random.below(30), d = random.pick(kWidths);
  const auto named = names(random, Naming::kSome, t, m);
  const bool has_gates = random.below(2) == 0;
  std::snprintf(doing, sizeof(doing), "case %lld: %lld rows put back into %lld of %lld elements of %zu bytes%s",
                static_cast<long long>(number_of_case), static_cast<long long>(t), static_cast<long long>(m),
                static_cast<long long>(d), sizeof(T), has_gates ? ", gates" : "");
  in_every_way([&](Side side, int threads, bool finely) {
    const Column<T> base(random_values<T>(random, m * d), side), updates(random_values<T>(random, t * d), side);
    const Column<T> gates(random_values<T>(random, t), side);
    const Column<int64_t> indices(named, side);
    const Column<T> combined(std::vector<T>(m * d), side), scaled(std::vector<T>(t * d), side);
    const Column<T> dots(std::vector<T>(t), side);
    const T* const factors = has_gates ? gates.data() : nullptr;
    const int64_t part = finely ? 3 : 1000;
    const auto in_parts = [&](int64_t rows, const auto& body) {
      for_tasks(ceil_div(rows, part), threads,
                [&](int64_t task) { body(task * part, std::min(rows, (task + 1) * part)); });
    };
    const PlacesByRow places(indices.data(), t, m);
    in_parts(m, [&](int64_t begin, int64_t end) {
      combine_rows<T, Sum>(base.data(), updates.data(), factors, places, begin, end, d, combined.data());
    });
    in_parts(t, [&](int64_t begin, int64_t end) {
      scale_rows<T, Sum>(base.data(), indices.data(), factors, begin, end, d, scaled.data());
      dot_rows<T, Sum>(base.data(), indices.data(), updates.data(), begin, end, d, dots.data());
    });
    const auto gate = [&](int64_t r) { return has_gates ? number(gates[r]) : 1.0; };
    for (int64_t j = 0; j < m; ++j)
      for (int64_t c = 0; c < d; ++c) {
        double exact = number(base[j * d + c]), magnitude = std::abs(exact);
        for (int64_t r = 0; r < t; ++r) {
          if (named[r] != j) continue;
          exact += gate(r) * number(updates[r * d + c]);
          magnitude += std::abs(gate(r) * number(updates[r * d + c]));
        }
        require_near(combined[j * d + c], exact, magnitude, t);
      }
    for (int64_t r = 0; r < t; ++r) {
      double dot = 0, magnitude = 0;
      for (int64_t c = 0; c < d; ++c) {
        const double source = named[r] < 0 ? 0.0 : number(base[named[r] * d + c]);
        require_near(scaled[r * d + c], gate(r) * source, std::abs(gate(r) * source), 1);
        dot += source * number(updates[r * d + c]);
        magnitude += std::abs(source * number(updates[r * d + c]));
      }
      require_near(dots[r], dot, magnitude, d);
    }
    if constexpr (sizeof(T) >= 4) {  // repeated rows of a gradient are added up in the dtype of sums
      const Column<T> sums(std::vector<T>(m * d), side);
      for_tasks(ceil_div(d, part), threads, [&](int64_t task) {
        add_rows(updates.data(), indices.data(), t, task * part, std::min(d, (task + 1) * part), d, sums.data());
      });
      for (int64_t j = 0; j < m; ++j)
        for (int64_t c = 0; c < d; ++c) {
          double exact = 0, magnitude = 0;
          for (int64_t r = 0; r < t; ++r) {
            if (named[r] != j) continue;
            exact += number(updates[r * d + c]);
            magnitude += std::abs(number(updates[r * d + c]));
          }
          require_near(sums[j * d + c], exact, magnitude, t);
        }
      require(sums.surroundings_untouched(), "something written outside of the sums");
    }
    for (const auto* const column : {&base, &updates, &gates, &combined, &scaled, &dots})
      require(column->surroundings_untouched(), "something written outside of an operand");
  });
  count("rows put back");
}

void inverse_case(int64_t number_of_case) {
  Random random(number_of_case);
  const int64_t m = random.below(20), t = random.below(12);
  auto named = names(random, random.below(2) ? Naming::kSome : Naming::kDistinct, t, m);
  std::snprintf(doing, sizeof(doing), "case %lld: inverse of %lld indices of %lld rows",
                static_cast<long long>(number_of_case), static_cast<long long>(t), static_cast<long long>(m));
  for (const Side side : {Side::kFront, Side::kBack}) {
    const Column<int64_t> indices(named, side);
    std::vector<int64_t> expected(m, -1);
    bool repeated = false;
    for (int64_t r = 0; r < t; ++r) {
      if (named[r] < 0) continue;
      repeated |= expected[named[r]] >= 0;
      expected[named[r]] = r;
    }
    const auto got = inverse(indices.data(), t, m);
    require(got.has_value() != repeated, "repeated indices");
    require(!got || *got == expected, "another inverse");
  }
  count("inverse of a selection");
}

// The kinds of cases take turns, each in every dtype.
void run_case(int64_t i) {
  const auto with_dtype = [&](int64_t which, const auto& body) {
    switch (which % 4) {
      case 0:
        return body(float{});
      case 1:
        return body(c10::BFloat16{});
      case 2:
        return body(c10::Half{});
      default:
        return body(double{});
    }
  };
  with_dtype(i / 5, [&](auto element) {
    using T = decltype(element);
    using Format =
        std::conditional_t<std::is_same_v<T, float>, Float32,
                           std::conditional_t<std::is_same_v<T, double>, Float64,
                                              std::conditional_t<std::is_same_v<T, c10::Half>, Float16, BFloat16>>>;
    switch (i % 5) {
      case 0:
      case 1:
        return forward_case<T>(i);
      case 2:
        return wgrad_case<T>(i);
      case 3:
        return i % 2 ? select_case<T, Format>(i) : inverse_case(i);
      default:
        return rows_case<T>(i);
    }
  });
}

// Memory of which only the elements [begin, end) of `count` exist.
template <class T>
class Window {
 public:
  Window(int64_t count, int64_t begin, int64_t end) {
    bytes_ = trust::up(count * static_cast<int64_t>(sizeof(T)));
    base_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) fail("no address space for a large operand");
    const int64_t from = begin * static_cast<int64_t>(sizeof(T)) / trust::kPage * trust::kPage;
    if (mprotect(base_ + from, trust::up(end * static_cast<int64_t>(sizeof(T))) - from, PROT_READ | PROT_WRITE) != 0)
      fail("no memory for a window");
    for (int64_t i = begin; i < end; ++i) data()[i] = static_cast<T>(static_cast<float>(i % 5) - 2);
  }
  ~Window() { munmap(base_, bytes_); }
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;
  T* data() const { return reinterpret_cast<T*>(base_); }
  double operator[](int64_t i) const { return number(data()[i]); }

 private:
  int64_t bytes_;
  char* base_;
};

// Contiguous operands of more than 2^32 elements, of which only those exist that the last task needs.
template <class T>
void large_products() {
  std::snprintf(doing, sizeof(doing), "rows beyond 2^32 elements, element size %zu", sizeof(T));
  constexpr int64_t kRows = (int64_t{1} << 27) + 5, kDepth = 33, kColumns = 35;
  const Window<T> b(kDepth * kColumns, 0, kDepth * kColumns);
  Tasks tasks{0, 1, 96, 128};
  tasks.count = ceil_div(kRows, tasks.rows_per_task);
  const int64_t first = (tasks.count - 1) * tasks.rows_per_task;
  {
    const Window<T> a(kRows * kDepth, first * kDepth, kRows * kDepth);
    const Window<T> c(kRows * kColumns, first * kColumns, kRows * kColumns);
    run(ForwardProblem{kDtype<T>,
                       1,
                       kRows,
                       kColumns,
                       kDepth,
                       a.data(),
                       {kDepth, kDepth, 1},
                       nullptr,
                       b.data(),
                       {kColumns, 0, 1},
                       nullptr,
                       c.data(),
                       {kColumns, kColumns, 1}},
        tasks, tasks.count - 1);
    for (int64_t r = first; r < kRows; ++r)
      for (int64_t j = 0; j < kColumns; ++j) {
        double exact = 0;
        for (int64_t p = 0; p < kDepth; ++p) exact += a[r * kDepth + p] * b[p * kColumns + j];
        require_near(c.data()[r * kColumns + j], exact, 1000, kDepth);
      }
  }
  count("operands beyond 2^32 elements");

  std::snprintf(doing, sizeof(doing), "weights beyond 2^32 elements, element size %zu", sizeof(T));
  constexpr int64_t kWide = (int64_t{1} << 27) + 5, kTokens = 40;
  tasks.count = ceil_div(kWide, tasks.rows_per_task);
  const int64_t from = (tasks.count - 1) * tasks.rows_per_task;
  // The tokens of a lie side by side, so that the last columns of all are one window.
  const Window<T> a(kWide * kTokens, from * kTokens, kWide * kTokens);
  const Window<T> g(kTokens * kColumns, 0, kTokens * kColumns);
  const Window<T> c(kWide * kColumns, from * kColumns, kWide * kColumns);
  run(WgradProblem{kDtype<T>,
                   1,
                   kTokens,
                   kWide,
                   kColumns,
                   a.data(),
                   {1, 0, kTokens},
                   nullptr,
                   g.data(),
                   {kColumns, 0, 1},
                   c.data()},
      tasks, tasks.count - 1);
  for (int64_t i = from; i < kWide; ++i)
    for (int64_t j = 0; j < kColumns; ++j) {
      double exact = 0;
      for (int64_t r = 0; r < kTokens; ++r) exact += a[i * kTokens + r] * g[r * kColumns + j];
      require_near(c.data()[i * kColumns + j], exact, 1000, kTokens);
    }
  count("operands beyond 2^32 elements");
}

void large_rows() {
  std::snprintf(doing, sizeof(doing), "rows put back beyond 2^32 elements");
  constexpr int64_t kWidth = int64_t{1} << 16, kRows = (int64_t{1} << 16) + 7;
  constexpr int64_t kLast = (kRows - 1) * kWidth, kAll = kRows * kWidth;
  const Window<float> base(kAll, kLast, kAll), updates(kAll, kLast, kAll), combined(kAll, kLast, kAll);
  const Window<float> scaled(kAll, kLast, kAll), sums(kAll, kLast, kAll), dots(kRows, kRows - 1, kRows);
  std::vector<int64_t> named(kRows, -1);
  named.back() = kRows - 1;
  const PlacesByRow places(named.data(), kRows, kRows);
  combine_rows<float, float>(base.data(), updates.data(), nullptr, places, kRows - 1, kRows, kWidth, combined.data());
  scale_rows<float, float>(base.data(), named.data(), nullptr, kRows - 1, kRows, kWidth, scaled.data());
  dot_rows<float, float>(base.data(), named.data(), updates.data(), kRows - 1, kRows, kWidth, dots.data());
  const double before = sums[kAll - 1];
  add_rows(updates.data(), named.data(), kRows, 0, kWidth, kWidth, sums.data());
  double dot = 0;
  for (int64_t i = kLast; i < kAll; ++i) {
    dot += base[i] * updates[i];
    require(combined[i] == base[i] + updates[i] && scaled[i] == base[i], "a wrong row");
  }
  require(dots[kRows - 1] == dot && sums[kAll - 1] == before + updates[kAll - 1], "a wrong sum");
  count("operands beyond 2^32 elements");
}

// Tasks of any problem, however large, are even parts that cover it, and their number fits.
void large_cuts() {
  constexpr int64_t kSizes[] = {
      1, 2, 96, 97, 1000, 65537, kFar - 1, kFar, kFar + 1, kFar * 5 / 2 + 1, int64_t{1} << 36};
  for (const int64_t m : kSizes)
    for (const int64_t n : kSizes)
      for (const int64_t k : kSizes)
        for (const int64_t heads : {int64_t{1}, int64_t{3}, int64_t{128}})
          for (const int threads : {1, 2, 64}) {
            if (std::log2(m) + std::log2(n) + std::log2(heads) > 60) continue;  // no address space for the output
            std::snprintf(doing, sizeof(doing), "cut of %lld rows, %lld columns, %lld deep, %lld heads",
                          static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
                          static_cast<long long>(heads));
            const ForwardProblem forward{Dtype::kFloat32, heads,   m,  n,       k,       nullptr, {},
                                         nullptr,         nullptr, {}, nullptr, nullptr, {}};
            const WgradProblem wgrad{Dtype::kFloat32, heads, k, m, n, nullptr, {}, nullptr, nullptr, {}, nullptr};
            for (const Tasks& tasks : {cut(forward, threads), cut(wgrad, threads)}) {
              const auto parts = [](int64_t whole, int64_t part) {
                require(part > 0, "an empty part");
                return ceil_div(whole, part);
              };
              require(tasks.count == parts(heads, tasks.heads_per_task) * parts(m, tasks.rows_per_task) *
                                         parts(n, tasks.columns_per_task),
                      "tasks that do not cover the problem");
            }
            count("cuts");
          }
}

// What the tools must catch. Every defect but that of the scratch memory is in what a real kernel is told.
void plant(const std::string& defect) {
  std::snprintf(doing, sizeof(doing), "planted: %s", defect.c_str());
  constexpr int64_t kSize = 40;
#if defined(__SANITIZE_ADDRESS__)
  const Side side = Side::kFront;  // what is behind is poisoned to the byte, with no page to fault
#else
  const Side side = defect.find("behind") != std::string::npos ? Side::kBack : Side::kFront;
#endif
  Operand<float> a({kSize, 1, kSize}, kContiguous, side), b({1, kSize + 1, kSize + 1}, kContiguous, side);
  Operand<float> c({kSize, 1, kSize}, kContiguous, side);
  a.fill([] { return 1.0f; }), b.fill([] { return 1.0f; });
  ForwardProblem problem{Dtype::kFloat32,
                         1,
                         kSize,
                         kSize,
                         kSize,
                         a.data(),
                         {kSize, kSize, 1},
                         nullptr,
                         b.data(),
                         {kSize + 1, 0, 1},
                         nullptr,
                         c.data(),
                         {kSize, kSize, 1}};
  if (defect == "read-behind") {
    problem.k = kSize + 1;
  } else if (defect == "read-before") {
    problem.a = a.data() - 1;
  } else if (defect == "write-behind") {
    problem.n = kSize + 1;
  } else if (defect == "write-before") {
    problem.c = c.data() - 1;
  } else if (defect == "overflow") {
    problem.a_strides.row = std::numeric_limits<int64_t>::max() / 2;
  } else if (defect == "scratch") {
    Arena arena(2 * Arena::bytes<float>(3));
    float* const piece = arena.take<float>(3);
    arena.take<float>(3)[0] = 0;
    fill(piece, 4, 1.0f);
  } else if (defect == "uninitialised") {
    const std::unique_ptr<float[]> fresh(new float[kSize * kSize]);
    problem.a = fresh.get();
    run_all(problem, cut(problem, 1), 1);
    for (int64_t j = 0; j < kSize; ++j) require_near(c.at(0, 0, j), 0, 0, 0);
  } else if (defect == "race") {
    const Tasks tasks = cut(problem, 1);
    for_tasks(500, 2, [&](int64_t) { run(problem, tasks, 0); });
    return;
  } else {
    fail("driver: no such defect: " + defect);
  }
  run_all(problem, cut(problem, 1), 1);
  require(c.surroundings_untouched(), "something written outside of an operand");
}

void on_fault(int signal, siginfo_t* information, void*) {
  char text[512];
  std::snprintf(text, sizeof(text), "driver: signal %d at %p, outside of every operand: %s", signal,
                information->si_addr, doing);
  fail(text);
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&] { return i + 1 < argc ? argv[++i] : (fail("driver: " + name + " lacks its value"), ""); };
    if (name == "--capability") {
      options.capability = value();
    } else if (name == "--plant") {
      options.plant = value();
    } else if (name == "--cases") {
      options.cases = std::atoll(value());
    } else if (name == "--first") {
      options.first = std::atoll(value());
    } else if (name == "--threads") {
      options.threads = std::atoi(value());
    } else if (name == "--callers") {
      options.callers = std::atoi(value());
    } else if (name == "--sizes") {
      options.sizes = true;
    } else {
      fail("driver: no such option: " + name);
    }
  }
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
#endif
  if (!options.capability.empty() && !set_capability(options.capability.c_str())) {
    std::printf("lacking %s\n", options.capability.c_str());
    return 0;
  }
  if (!options.plant.empty()) {
    plant(options.plant);
    return 0;  // not noticed
  }
  if (options.sizes) {
    large_cuts();
    large_rows();
    large_products<float>();
    large_products<c10::BFloat16>();
    large_products<c10::Half>();
    large_products<double>();
  } else {
    for_tasks(options.cases, options.callers, [](int64_t i) { run_case(options.first + i); });
  }
  for (const auto& [what, cases] : counts) std::printf("ran %lld %s\n", static_cast<long long>(cases), what.c_str());
}
