// The head-wise products on CPU. No Tensor: pointers, strides in elements, problems cut into tasks that may run on any
// thread in any order.
//
// Every element's sum has one order, whatever else is computed beside it: over k in blocks of kBlockK, a block in
// chunks of kChunk, a chunk's products one fused multiply-add (portable code: multiply and add) after the other from
// zero; chunks and blocks are added in order; over tokens (wgrad) in blocks of kBlockTokens. (bfloat16 with AMX or
// AVX-512 BF16: gemm_amx.cpp, gemm_avx512_bf16.cpp.) So a row's bits depend neither on its neighbours, nor on how rows
// are split into calls or tasks, nor on threads. Half types are converted to float32 once per block and rounded once,
// at the store; float64 is summed in float64.
#pragma once

#include <cstdint>

namespace mhmatmul::cpu {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct Strides {
  int64_t row, head, column;
};

// c[r, n, :] = a[i_r, n, :] b[n, :, :] + bias[n, :] for every head n and row r. Rows whose index is -1 are zeros.
struct ForwardProblem {
  Dtype dtype;  // of every operand
  int64_t heads, m, n, k;
  const void* a;
  Strides a_strides;
  const int64_t* indices;  // of the rows of a; nullptr: r itself
  const void* b;
  Strides b_strides;  // row: along k
  const void* bias;   // [heads, n] contiguous, or nullptr
  void* c;
  Strides c_strides;  // column: 1
};

// c[n, :, :] = the sum over r of a[i_r, n, :]^T g[r, n, :], a [.., heads, m], g [t, heads, n], c [heads, m, n]
// contiguous. Rows whose index is -1 count for nothing.
struct WgradProblem {
  Dtype dtype;
  int64_t heads, t, m, n;
  const void* a;
  Strides a_strides;
  const int64_t* indices;
  const void* g;
  Strides g_strides;
  void* c;
};

// How a problem is cut; tasks [0, count) write disjoint parts of c.
struct Tasks {
  int64_t count;
  int64_t heads_per_task, rows_per_task, columns_per_task;
};
Tasks cut(const ForwardProblem& problem, int threads);
Tasks cut(const WgradProblem& problem, int threads);
void run(const ForwardProblem& problem, const Tasks& tasks, int64_t task);
void run(const WgradProblem& problem, const Tasks& tasks, int64_t task);

// The instruction set in use: "amx", "avx512_bf16", "avx512", "avx2" or "portable".
const char* capability();
// Forces one that this machine has; false for any other.
bool set_capability(const char* name);

}  // namespace mhmatmul::cpu
