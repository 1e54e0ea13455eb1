// The numbers that shape the CPU kernels, and how they were found.
#pragma once

#include <cstdint>

namespace mhmatmul::cpu {

// Elements of the reduction per block: part of the meaning of a sum (gemm.h), so one number for all machines. 512 keeps
// a packed panel (512 x 32 float32 = 64 KiB) in L2 and error growth that of a blocked sum.
constexpr int64_t kBlockK = 512;

// Distance between converted rows of A. Not a power of two, so that rows do not meet in one cache set.
constexpr int64_t kRowStep = kBlockK + 16;

// The same for reductions up to kShortK, so that short rows lie close together.
constexpr int64_t kShortK = 128;
constexpr int64_t kShortRowStep = kShortK + 16;

// Bytes of converted rows that a task works on; with a panel of B they should fit in L2.
constexpr int64_t kTaskBytes = 192 * 1024;

// Up to this many rows B is read where it lies: packing a panel would cost more than it saves.
constexpr int64_t kDirectRows = 16;

// Columns per task where sums of several blocks have to be kept (k > kBlockK, and wgrad).
constexpr int64_t kTaskColumns = 512;

// Tasks per thread that balance uneven progress; and the fewest multiply-adds worth a second thread.
constexpr int64_t kTasksPerThread = 4;
constexpr double kWorkPerThread = 1 << 16;

}  // namespace mhmatmul::cpu
