#include "gemm.h"

#include "gemm_kernel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <string_view>
#include <vector>

namespace mhmatmul::cpu {

const KernelTable& portable_kernels();
#if defined(__x86_64__)
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
#endif

namespace {

struct Capability {
  const char* name;
  const KernelTable* kernels;
};

// What this machine has, best first.
const std::vector<Capability>& capabilities() {
  static const std::vector<Capability> list = [] {
    std::vector<Capability> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      found.push_back({"avx512", &avx512_kernels()});
    if (avx2) found.push_back({"avx2", &avx2_kernels()});
#endif
    found.push_back({"portable", &portable_kernels()});
    return found;
  }();
  return list;
}

const Capability* find(std::string_view name) {
  if (name == "default") name = "portable";  // torch's word for it
  for (const auto& capability : capabilities())
    if (name == capability.name) return &capability;
  return nullptr;
}

// The best, unless the environment asks for a lower one that is here.
const Capability* initial() {
  for (const char* variable : {"MHMATMUL_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY"})
    if (const char* const name = std::getenv(variable))
      if (const Capability* const capability = find(name)) return capability;
  return &capabilities().front();
}

std::atomic<const Capability*>& current() {
  static std::atomic<const Capability*> capability{initial()};
  return capability;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t kRowUnit = 12;      // a multiple of every instruction set's register block
constexpr int64_t kColumnUnit = 128;  // likewise, and of whole cache lines in every dtype

// Halves the larger side of the tasks until there are enough of them or they are small.
Tasks cut(int64_t heads, int64_t m, int64_t n, int64_t rows, int64_t columns, double work, int threads) {
  const int64_t wanted = work < 2 * kWorkPerThread ? 1 : threads > 1 ? threads * kTasksPerThread : 1;
  const auto count = [&] { return heads * ceil_div(m, rows) * ceil_div(n, columns); };
  while (count() < wanted && rows > 4 * kRowUnit) rows = round_up(rows / 2, kRowUnit);
  while (count() < wanted && columns > kColumnUnit) columns = round_up(columns / 2, kColumnUnit);
  return {count(), rows, columns, work};
}

}  // namespace

// Bounded by the sizes in gemm_tuning.h, a few MiB a thread: fresh memory for every task would be page faults instead.
void* thread_scratch(int64_t bytes) {
  constexpr std::align_val_t kCacheLine{64};
  struct Release {
    void operator()(void* memory) const { ::operator delete(memory, kCacheLine); }
  };
  thread_local std::unique_ptr<void, Release> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(::operator new(bytes, kCacheLine));
    size = bytes;
  }
  return memory.get();
}

const char* capability() { return current().load()->name; }

bool set_capability(const char* name) {
  const Capability* const found = find(name);
  if (found) current() = found;
  return found != nullptr;
}

Tasks cut(const ForwardProblem& problem, int threads) {
  const int64_t k = std::max<int64_t>(1, std::min(problem.k, kBlockK));
  const int64_t fitting = kTaskBytes / (k * static_cast<int64_t>(sizeof(float)));
  const int64_t rows = round_up(std::clamp<int64_t>(fitting, 4 * kRowUnit, 32 * kRowUnit), kRowUnit);
  const int64_t columns = problem.k <= kBlockK ? problem.n : std::min(problem.n, kTaskColumns);
  const double work = 1.0 * problem.heads * problem.m * problem.n * problem.k;
  return cut(problem.heads, problem.m, problem.n, rows, columns, work, threads);
}

Tasks cut(const WgradProblem& problem, int threads) {
  const double work = 1.0 * problem.heads * problem.t * problem.m * problem.n;
  return cut(problem.heads, problem.m, problem.n, std::min<int64_t>(problem.m, 32 * kRowUnit),
             std::min(problem.n, kTaskColumns), work, threads);
}

void run(const ForwardProblem& problem, const Tasks& tasks, int64_t task) {
  current().load()->kernels->forward(problem, tasks, task);
}

void run(const WgradProblem& problem, const Tasks& tasks, int64_t task) {
  current().load()->kernels->wgrad(problem, tasks, task);
}

}  // namespace mhmatmul::cpu
