// The kernels for x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "gemm_portable.h"

#include <immintrin.h>

#include "gemm_target.h"
MHMATMUL_TARGET_BEGIN("avx2,fma,f16c")
#include "gemm_kernel.h"

namespace mhmatmul::cpu {
namespace {

struct Avx2 {
  using Sum = float;
  using Vector = __m256;
  static constexpr int kWidth = 8, kRows = 6, kVectors = 2, kWide = 8, kFetchedSize = 2;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector broadcast(float x) { return _mm256_set1_ps(x); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

  static Vector load(const float* from) { return _mm256_loadu_ps(from); }
  static Vector load(const c10::Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Vector load(const c10::BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  static void store(float* to, Vector v) { _mm256_storeu_ps(to, v); }
  static void store(c10::Half* to, Vector v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // To nearest, ties to even; NaN becomes PyTorch's.
  static void store(c10::BFloat16* to, Vector v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x88);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  }

  // to[p * step + j] = square[j][p]
  static void transpose(const float (&square)[8][8], float* to, int64_t step) {
    __m256 fours[8];  // [4 i + c]: lane l holds column 4 l + c of rows 4 i to 4 i + 3
    for (int i = 0; i < 2; ++i) {
      const __m256 r0 = load(square[4 * i]), r1 = load(square[4 * i + 1]);
      const __m256 r2 = load(square[4 * i + 2]), r3 = load(square[4 * i + 3]);
      const __m256d a0 = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1)),
                    a1 = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
      const __m256d a2 = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3)),
                    a3 = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
      fours[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a0, a2));
      fours[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a0, a2));
      fours[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(a1, a3));
      fours[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(a1, a3));
    }
    for (int c = 0; c < 4; ++c) {
      store(to + c * step, _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20));
      store(to + (4 + c) * step, _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31));
    }
  }
};

}  // namespace

const KernelTable& avx2_kernels() { return Table<Avx2, PortableDouble>::table; }

}  // namespace mhmatmul::cpu
MHMATMUL_TARGET_END
#endif
