// The C interface through which `_C`, which knows no torch, asks the loaded operators' library about itself.
#pragma once

extern "C" {
// How half types are multiplied on CPU: "float32" or "native" (cpu/head_gemm.h).
__attribute__((visibility("default"))) const char* mhmatmul_cpu_half_path();
// Forces one of them, for all threads; false for an unknown name.
__attribute__((visibility("default"))) bool mhmatmul_set_cpu_half_path(const char* name);
}
