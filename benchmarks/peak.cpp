// The rate of fused multiply-adds in float32 that one thread reaches on registers alone: the limit of any matrix product.
#include <chrono>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / sizeof(float);
constexpr int kChains = 12;  // independent: two units of latency 4 need 8; 16 registers hold 12 and the operands
constexpr int kSteps = 100000;
using Vector __attribute__((vector_size(kBytes))) = float;

// Runs for the given time and returns FLOP per second; `sink` keeps the compiler from leaving the work out.
extern "C" double fma_rate(double seconds, float* sink) {
  using Clock = std::chrono::steady_clock;
  const Vector factor = Vector{} + *sink, term = Vector{} + 0.5F;  // *sink below 1: the chains converge
  Vector chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = Vector{} + static_cast<float>(i);  // alike, they would be merged
  const auto start = Clock::now();
  double elapsed = 0, flop = 0;
  while (elapsed < seconds) {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * factor + term;
    }
    flop += 2.0 * kLanes * kChains * kSteps;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  for (int i = 1; i < kChains; ++i) chain[0] += chain[i];
  *sink = chain[0][0];
  return flop / elapsed;
}
