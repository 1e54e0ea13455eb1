// The instruction set AVX-512 (F, BW, VL, DQ). Include it inside a target region, after <immintrin.h>.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace mhmatmul::cpu {
namespace {

struct Avx512 {
  using Sum = float;
  using Vector = __m512;
  static constexpr int kWidth = 16, kRows = 12, kVectors = 2, kWide = 8, kFetchedSize = 0;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector broadcast(float x) { return _mm512_set1_ps(x); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

  static Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static Vector load(const c10::Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Vector load(const c10::BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  static void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
  static void store(c10::Half* to, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // To nearest, ties to even; NaN becomes PyTorch's. The CPU's own conversion would flush subnormals.
  static void store(c10::BFloat16* to, Vector v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(result));
  }

  // to[p * step + j] = square[j][p]
  static void transpose(const float (&square)[16][16], float* to, int64_t step) {
    __m512 fours[16];  // [4 i + c]: lane l holds column 4 l + c of rows 4 i to 4 i + 3
    for (int i = 0; i < 4; ++i) {
      const __m512 r0 = load(square[4 * i]), r1 = load(square[4 * i + 1]);
      const __m512 r2 = load(square[4 * i + 2]), r3 = load(square[4 * i + 3]);
      const __m512d a0 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1)),
                    a1 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
      const __m512d a2 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3)),
                    a3 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
      fours[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a0, a2));
      fours[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a0, a2));
      fours[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(a1, a3));
      fours[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(a1, a3));
    }
    for (int c = 0; c < 4; ++c) {
      const __m512 even01 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
      const __m512 odd01 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xDD);
      const __m512 even23 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
      const __m512 odd23 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xDD);
      store(to + c * step, _mm512_shuffle_f32x4(even01, even23, 0x88));
      store(to + (4 + c) * step, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
      store(to + (8 + c) * step, _mm512_shuffle_f32x4(even01, even23, 0xDD));
      store(to + (12 + c) * step, _mm512_shuffle_f32x4(odd01, odd23, 0xDD));
    }
  }
};

}  // namespace
}  // namespace mhmatmul::cpu
