#include "gemm.h"

#include "gemm_kernel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <string_view>
#include <vector>

#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif

namespace mhmatmul::cpu {

const KernelTable& portable_kernels();
#if defined(__x86_64__)
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512_bf16_kernels();
const KernelTable& amx_kernels();
#endif

namespace {

struct Capability {
  const char* name;
  const KernelTable* kernels;
};

#if defined(__x86_64__)
// Whether the processor has bfloat16 tiles and the system lets this process use them, which it has to be asked for.
bool has_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;  // of EDX, leaf 7
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBFloat16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// What this machine has, best first.
const std::vector<Capability>& capabilities() {
  static const std::vector<Capability> list = [] {
    std::vector<Capability> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && has_amx()) found.push_back({"amx", &amx_kernels()});
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back({"avx512_bf16", &avx512_bf16_kernels()});
    if (avx512) found.push_back({"avx512", &avx512_kernels()});
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

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What a task may pack of B.
int64_t packed_bytes() {
  static const int64_t bytes = [] {
    int64_t l2 = 0;  // not known
#if defined(_SC_LEVEL2_CACHE_SIZE)
    l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::clamp(l2 / 4, kPackedBytesLeast, kPackedBytesMost);
  }();
  return bytes;
}

constexpr int64_t kPanel = 32;        // columns of the widest panel of packed B
constexpr int64_t kRowUnit = 96;      // a multiple of every instruction set's register block
constexpr int64_t kColumnUnit = 128;  // likewise, and of whole cache lines in every dtype

// The size of each part when `whole` is cut into as few even parts as fit in `most`, in units.
int64_t even_part(int64_t whole, int64_t most, int64_t unit) {
  return round_up(ceil_div(whole, ceil_div(whole, most)), unit);
}

// From the largest tasks that fit, cuts rows, then heads, then columns in halves until every thread has several.
Tasks cut(int64_t heads, int64_t m, int64_t n, const Tasks& most, double work, int threads) {
  const int64_t wanted = threads == 1 || work < 2 * kWorkPerThread ? 1 : threads * kTasksPerThread;
  int64_t heads_per_task = even_part(heads, most.heads_per_task, 1);
  int64_t rows = even_part(m, most.rows_per_task, kRowUnit);
  int64_t columns = even_part(n, most.columns_per_task, kColumnUnit);
  const auto count = [&] { return ceil_div(heads, heads_per_task) * ceil_div(m, rows) * ceil_div(n, columns); };
  while (count() < wanted && rows > kFewestRows) rows = even_part(m, rows / 2, kRowUnit);
  while (count() < wanted && heads_per_task > 1) heads_per_task = even_part(heads, heads_per_task / 2, 1);
  while (count() < wanted && columns > kColumnUnit) columns = even_part(n, columns / 2, kColumnUnit);
  return {count(), heads_per_task, rows, columns};
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
#if defined(__SANITIZE_ADDRESS__)
  const bool suits = bytes == size;  // nothing behind it that an earlier task would have made room for
#else
  const bool suits = bytes <= size;
#endif
  if (!suits) {
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
  const int64_t column_bytes = std::max<int64_t>(1, std::min(problem.k, kBlockK)) * static_cast<int64_t>(sizeof(float));
  const int64_t columns = std::max(kColumnUnit, packed_bytes() / column_bytes);
  const int64_t heads =
      std::max<int64_t>(1, packed_bytes() / (column_bytes * std::min(columns, round_up(problem.n, kPanel))));
  const double work = 1.0 * problem.heads * problem.m * problem.n * problem.k;
  const Tasks most =
      problem.k <= kBlockK ? Tasks{0, heads, kTaskRows, columns} : Tasks{0, 1, kTaskRowsWithSums, columns};
  return cut(problem.heads, problem.m, problem.n, most, work, threads);
}

Tasks cut(const WgradProblem& problem, int threads) {
  const double work = 1.0 * problem.heads * problem.t * problem.m * problem.n;
  const int64_t longest = std::max<int64_t>({1, problem.m, problem.n});
  const Tasks most{0, std::max<int64_t>(1, kWgradGroup / longest), kWgradRows, kWgradColumns};
  return cut(problem.heads, problem.m, problem.n, most, work, threads);
}

void run(const ForwardProblem& problem, const Tasks& tasks, int64_t task) {
  current().load()->kernels->forward(problem, tasks, task);
}

void run(const WgradProblem& problem, const Tasks& tasks, int64_t task) {
  current().load()->kernels->wgrad(problem, tasks, task);
}

}  // namespace mhmatmul::cpu
