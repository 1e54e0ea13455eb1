// Which tokens of a row are kept: the one rule that CPU and CUDA share.
//
// A score is turned into an unsigned key whose order is the order of the scores: NaN is 0, below everything;
// -0.0 and +0.0 are one key. A row's rule is then a key, and how many scores equal to it may stay: a token is
// kept when its key is above the rule's, or equal with a place left, places going to the lowest positions
// first.
//
// Scores are read as raw bits, so nothing here knows a half type or a Tensor.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace mhmatmul {

// A binary floating-point format by the unsigned integer of its size and the bits of its +infinity.
template <class Bits_, uint64_t kInfinity_>
struct FloatFormat {
  using Bits = Bits_;
  static constexpr Bits kInfinity = static_cast<Bits>(kInfinity_);
  static constexpr int kBits = 8 * sizeof(Bits);
  static constexpr Bits kSign = static_cast<Bits>(Bits{1} << (kBits - 1));
};
using Float64 = FloatFormat<uint64_t, 0x7FF0000000000000>;
using Float32 = FloatFormat<uint32_t, 0x7F800000>;
using Float16 = FloatFormat<uint16_t, 0x7C00>;
using BFloat16 = FloatFormat<uint16_t, 0x7F80>;

template <class Format>
MHMATMUL_HOST_DEVICE inline typename Format::Bits score_key(typename Format::Bits score) {
  using Bits = typename Format::Bits;
  const Bits magnitude = score & static_cast<Bits>(~Format::kSign);
  if (magnitude > Format::kInfinity) return 0;  // NaN
  if (magnitude == 0) return Format::kSign;     // -0.0 and +0.0
  return (score & Format::kSign) ? static_cast<Bits>(~score) : static_cast<Bits>(score | Format::kSign);
}

constexpr int64_t kNoLimit = INT64_MAX;

template <class Format>
struct SelectionRule {
  typename Format::Bits key;  // kept: above this key,
  int64_t ties;               // and the first `ties` equal to it
  int64_t count;              // how many that makes
  int64_t candidates;         // how many reach the threshold, places or not

  // Everything with score >= threshold; nothing when the threshold is NaN.
  MHMATMUL_HOST_DEVICE static SelectionRule from_threshold(typename Format::Bits top_p) {
    const auto key = score_key<Format>(top_p);
    return key == 0 ? nothing() : SelectionRule{key, kNoLimit, 0, 0};
  }

  // No score has the highest key: its bits would be a NaN.
  MHMATMUL_HOST_DEVICE static SelectionRule nothing() {
    return {static_cast<typename Format::Bits>(~typename Format::Bits{0}), 0, 0, 0};
  }

  MHMATMUL_HOST_DEVICE bool admits(typename Format::Bits score_key) const {
    return score_key > key || (score_key == key && ties > 0);
  }
};

}  // namespace mhmatmul
