#include "introspection.h"

#include "cpu/gemm.h"

const char* mhmatmul_cpu_capability() { return mhmatmul::cpu::capability(); }
bool mhmatmul_set_cpu_capability(const char* name) { return mhmatmul::cpu::set_capability(name); }
