// From a dtype to the FloatFormat that the selection kernels are instantiated for; the one list of scores'
// dtypes.
#pragma once

#include "selection_rule.h"

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cstring>
#include <type_traits>

namespace mhmatmul {

// Calls body(FloatFormat<...>{}) for the dtype of the scores.
template <class Body>
auto with_score_format(c10::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return body(Float64{});
    case c10::ScalarType::Float:
      return body(Float32{});
    case c10::ScalarType::Half:
      return body(Float16{});
    case c10::ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      TORCH_INTERNAL_ASSERT(false, "select_important: scores of dtype ", dtype, " passed the checks");
  }
}

// The bits of `value` rounded to the format, as PyTorch rounds a number that is compared with a tensor.
template <class Format>
typename Format::Bits score_bits(double value) {
  using Rounded = std::conditional_t<
      std::is_same_v<Format, Float64>, double,
      std::conditional_t<std::is_same_v<Format, Float32>, float,
                         std::conditional_t<std::is_same_v<Format, Float16>, c10::Half, c10::BFloat16>>>;
  static_assert(sizeof(Rounded) == sizeof(typename Format::Bits));
  const auto rounded = static_cast<Rounded>(value);
  typename Format::Bits bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  return bits;
}

}  // namespace mhmatmul
