// Functions defined between BEGIN and END are compiled for the named instruction sets, in either compiler's words.
#pragma once

#define MHMATMUL_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MHMATMUL_TARGET_BEGIN(isa) \
  MHMATMUL_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define MHMATMUL_TARGET_END MHMATMUL_PRAGMA(clang attribute pop)
#else
#define MHMATMUL_TARGET_BEGIN(isa) MHMATMUL_PRAGMA(GCC push_options) MHMATMUL_PRAGMA(GCC target(isa))
#define MHMATMUL_TARGET_END MHMATMUL_PRAGMA(GCC pop_options)
#endif
