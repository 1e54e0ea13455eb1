// Memory that runs out is told as PyTorch tells it of its own operators.
#pragma once

#include <c10/util/Exception.h>

#include <new>
#include <utility>

namespace mhmatmul::cpu {

// A kernel whose std::bad_alloc, which Python would see as MemoryError, is the RuntimeError of PyTorch's allocator:
// scratch memory is no different from an output's.
template <auto kernel>
struct WithMemoryErrors;
template <class Result, class... Arguments, Result (*kernel)(Arguments...)>
struct WithMemoryErrors<kernel> {
  static Result call(Arguments... arguments) {
    try {
      return kernel(std::forward<Arguments>(arguments)...);
    } catch (const std::bad_alloc&) {
      TORCH_CHECK(false, "mhmatmul: not enough memory on the CPU");
    }
  }
};

}  // namespace mhmatmul::cpu
