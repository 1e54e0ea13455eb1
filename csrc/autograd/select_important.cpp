// Selection has integers for outputs: nothing to differentiate, so Autograd passes straight through.
#include <torch/library.h>

namespace mhmatmul {

TORCH_LIBRARY_IMPL(mhmatmul, Autograd, m) {
  m.impl("select_important", torch::CppFunction::makeFallthrough());
  m.impl("_select_important_tensor", torch::CppFunction::makeFallthrough());
  m.impl("select_important_static", torch::CppFunction::makeFallthrough());
}

}  // namespace mhmatmul
