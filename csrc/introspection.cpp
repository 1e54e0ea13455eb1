#include "introspection.h"

#include "cpu/head_gemm.h"

const char* mhmatmul_cpu_half_path() { return mhmatmul::cpu::half_path(); }
bool mhmatmul_set_cpu_half_path(const char* name) { return mhmatmul::cpu::set_half_path(name); }
