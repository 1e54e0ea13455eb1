// The numbers that shape the CPU kernels, and how they were found.
//
// Found on a 2-core Xeon with AVX-512 (2 MiB of L2 a core), as multiples of torch.mm's float32 rate measured beside it.
// A register block of 12x2 vectors alone reaches 1.05 to 1.15 with B in L1 or streaming from L2; 14x2, 9x3 and 6x4 are
// no better. Whole products reach 0.8 to 0.9 at head_dim 128 to 1024 and 0.5 at 64. Tried and not kept: converting a
// task's rows of A once and repacking B for every panel (a tenth to a quarter slower from head_dim 128 on: the rows
// stream from L2); prefetching the next rows, or the lines to be stored (up to 8 % slower, no gain beyond the noise);
// non-temporal stores (a fifth faster at head_dim 64, the same elsewhere, but what is read next then comes from
// memory); 512 KiB and 1 MiB for kPackedBytes (the same or slower). The AVX2 and portable kernels have not been tuned.
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

// Bytes of B that a task packs: with what passes by, they should stay in L2.
constexpr int64_t kPackedBytes = 256 * 1024;

// Rows per task: many, to pack B seldom; fewer where their sums have to be kept over several blocks of k.
constexpr int64_t kTaskRows = 1536;
constexpr int64_t kTaskRowsWithSums = 384;
constexpr int64_t kFewestRows = 192;

// Up to this many rows B is read where it lies: packing a panel would cost more than it saves.
constexpr int64_t kDirectRows = 16;

// Columns per task of wgrad, whose sums over blocks of rows have to be kept.
constexpr int64_t kTaskColumns = 512;

// Tasks per thread that balance uneven progress; and the fewest multiply-adds worth a second thread.
constexpr int64_t kTasksPerThread = 4;
constexpr double kWorkPerThread = 1 << 16;

}  // namespace mhmatmul::cpu
