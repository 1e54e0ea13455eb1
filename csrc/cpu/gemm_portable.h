// Instruction sets in the compiler's own vectors, for any machine; and what every gemm_<isa>.cpp needs before its
// target region begins.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

namespace mhmatmul::cpu {
namespace {

template <class Sum_, int kWidth_>
struct Portable {
  using Sum = Sum_;
  typedef Sum_ Vector __attribute__((vector_size(kWidth_ * sizeof(Sum_))));
  static constexpr int kWidth = kWidth_, kRows = 4, kVectors = 2, kWide = 4, kFetchedSize = 0;

  static Vector zero() { return Vector{}; }
  static Vector broadcast(Sum x) { return Vector{} + x; }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }

  template <class T>
  static Vector load(const T* from) {
    Vector v;
    for (int i = 0; i < kWidth; ++i) v[i] = static_cast<Sum>(from[i]);
    return v;
  }
  template <class T>
  static void store(T* to, Vector v) {
    for (int i = 0; i < kWidth; ++i) to[i] = static_cast<T>(v[i]);
  }
  // to[p * step + j] = square[j][p]
  static void transpose(const Sum (&square)[kWidth][kWidth], Sum* to, int64_t step) {
    for (int p = 0; p < kWidth; ++p)
      for (int j = 0; j < kWidth; ++j) to[p * step + j] = square[j][p];
  }
};
using PortableSingle = Portable<float, 4>;
using PortableDouble = Portable<double, 2>;

}  // namespace
}  // namespace mhmatmul::cpu
