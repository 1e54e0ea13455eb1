// The kernels for x86-64 with AVX-512 BF16: bfloat16 products by its dot products of pairs, everything else as with
// AVX-512.
//
// An instruction adds the products of two consecutive elements of the reduction to a float32 sum, so an element's sum
// has again one order: pairs from zero on, whatever rows stand beside it. Like PyTorch's own products on these units it
// takes subnormal numbers for zeros.
#if defined(__x86_64__)
#include "gemm_portable.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics warn of themselves
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "gemm_target.h"
MHMATMUL_TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "gemm_bfloat16.h"

namespace mhmatmul::cpu {
namespace {

struct Avx512Bf16 {
  struct Registers {};  // nothing to set up: the instructions know one way of rounding
  using Rounding = Registers;

  // a's pair to all sums
  static __m512bh broadcast(const T* a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }

  // sums[M, 32] (+)= a b over `pairs` pairs, a's rows a tile's.
  template <int M>
  static __attribute__((noinline)) void multiply_rows(int64_t pairs, const T* a, const T* b, float* sums, bool add) {
    __m512 sum[M][2];
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
        sum[i][v] = add ? _mm512_loadu_ps(sums + i * kBlock + v * kTile) : _mm512_setzero_ps();
    for (int64_t done = 0; done < pairs; done += kTile, a += 2 * kTileSize, b += 2 * kTileSize) {
      const int64_t count = smaller(kTile, pairs - done);
      for (int64_t pair = 0; pair < count; ++pair) {
        const __m512bh low = (__m512bh)_mm512_loadu_si512(b + pair * kStep);
        const __m512bh high = (__m512bh)_mm512_loadu_si512(b + kTileSize + pair * kStep);
#pragma GCC unroll 32
        for (int i = 0; i < M; ++i) {
          const __m512bh both = broadcast(a + i * kStep + 2 * pair);
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, low);
          sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, high);
        }
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) _mm512_storeu_ps(sums + i * kBlock + v * kTile, sum[i][v]);
  }

  // sums[32, 32] (+)= a b over k elements, for the first `rows` rows and those beside them.
  static void multiply(int64_t k, int64_t rows, const T* a, const T* b, float* sums, bool add) {
    constexpr int kRows = 8;
    for (int64_t i = 0; i < smaller(rows, kBlock); i += kRows)
      multiply_rows<kRows>(ceil_div(k, 2), a + i / kTile * kTileSize + i % kTile * kStep, b, sums + i * kBlock, add);
  }

  // In whole pairs.
  static const T* read_row(const T* from, int64_t stride, int64_t k, float* memory) {
    if (stride == 1 && k % 2 == 0) return from;
    T* const to = reinterpret_cast<T*>(memory);
    for (int64_t p = 0; p < k; ++p) to[p] = from[p * stride];
    if (k % 2 == 1) to[k] = T(0);
    return to;
  }

  // A row times V vectors of columns of B where it lies.
  template <int V>
  static void multiply_row(int64_t k, const T* a, const T* b, int64_t b_step, float* sums) {
    __m512 sum[V];
    for (int v = 0; v < V; ++v) sum[v] = _mm512_setzero_ps();
    for (int64_t p = 0; p < k; p += 2, b += 2 * b_step) {
      const __m512bh both = broadcast(a + p);
      for (int v = 0; v < V; v += 2) {
        const __m512i odd = p + 1 < k ? _mm512_loadu_si512(b + b_step + v * kTile) : _mm512_setzero_si512();
        const Pairs pairs(_mm512_loadu_si512(b + v * kTile), odd);
        sum[v] = _mm512_dpbf16_ps(sum[v], both, (__m512bh)pairs.low);
        sum[v + 1] = _mm512_dpbf16_ps(sum[v + 1], both, (__m512bh)pairs.high);
      }
    }
    for (int v = 0; v < V; ++v) Avx512::store(sums + v * kTile, sum[v]);
  }
};

}  // namespace

const KernelTable& avx512_bf16_kernels() { return kTable<Avx512Bf16>; }

}  // namespace mhmatmul::cpu
MHMATMUL_TARGET_END
#endif
