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
#include "gemm_bfloat16.h"

namespace mhmatmul::cpu {
namespace {

constexpr int64_t kTileBytes = 64;  // of a tile's row

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

struct Amx {
  using Registers = Tiles;
  using Rounding = FlushSubnormals;

  // sums[32, 32] (+)= a b over `steps` steps: a holds two tiles a step, rows above each other, b two, columns side by
  // side. Without `both` only the upper half.
  template <bool both>
  static void multiply_tiles(int64_t steps, const T* a, const T* b, float* sums, bool add) {
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

  // The same over k elements, for the first `rows` rows.
  static void multiply(int64_t k, int64_t rows, const T* a, const T* b, float* sums, bool add) {
    const auto tiles = rows > kTile ? multiply_tiles<true> : multiply_tiles<false>;
    tiles(ceil_div(k, kStep), a, b, sums, add);
  }

  static const float* read_row(const T* from, int64_t stride, int64_t k, float* memory) {
    G::convert(from, stride, k, memory);
    return memory;
  }

  // A row times V vectors of columns of B where it lies, in float32 arithmetic, to the bits that tiles would give: in
  // every step they add up the even and the odd elements' products apart, from zero, and then add both to the sum.
  template <int V>
  static void multiply_row(int64_t k, const float* a, const T* b, int64_t b_step, float* sums) {
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
};

}  // namespace

const KernelTable& amx_kernels() { return kTable<Amx>; }

}  // namespace mhmatmul::cpu
MHMATMUL_TARGET_END
#endif
