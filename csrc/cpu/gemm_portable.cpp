// The kernels for any machine.
#include "gemm_portable.h"

#include "gemm_kernel.h"

namespace mhmatmul::cpu {

const KernelTable& portable_kernels() { return Table<PortableSingle, PortableDouble>::table; }

}  // namespace mhmatmul::cpu
