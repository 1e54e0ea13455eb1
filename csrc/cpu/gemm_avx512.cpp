// The kernels for x86-64 with AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#include "gemm_portable.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics warn of themselves
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "gemm_target.h"
MHMATMUL_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "gemm_avx512.h"
#include "gemm_kernel.h"

namespace mhmatmul::cpu {

const KernelTable& avx512_kernels() { return Table<Avx512, PortableDouble>::table; }

}  // namespace mhmatmul::cpu
MHMATMUL_TARGET_END
#endif
