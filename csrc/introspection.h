// The C interface through which `_C`, which knows no torch, asks the loaded operators' library about itself.
#pragma once

extern "C" {
// The instruction set of the CPU kernels (cpu/gemm.h).
__attribute__((visibility("default"))) const char* mhmatmul_cpu_capability();
// Forces one that this machine has, for all threads; false for any other name.
__attribute__((visibility("default"))) bool mhmatmul_set_cpu_capability(const char* name);
}
