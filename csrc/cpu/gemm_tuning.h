// The numbers that shape the CPU kernels, and how they were found.
//
// Found on a 2-core Xeon (Sapphire Rapids: AVX-512, AMX, 2 MiB of L2 a core) with variants of these files taking turns
// in one process, 7 rounds of 7 shapes, since its clock moves by a tenth within seconds. Gains are of the mean rate.
//
// Kept, float32:
// - Register blocks as functions of their own: inlined, compilers kept sums on the stack or spilled addresses. 7 %.
// - Heads of a row block one after the other (short heads), and their rows of A fetched ahead, spread over the
//   arithmetic: heads of 64 run 1.8 times as fast, 4 % in the mean. Fetched all at once they stall the arithmetic.
// - Half a MiB of packed B instead of a quarter. 2 %.
// - Threads that take tasks one by one instead of halves of all: 4 to 13 % where a core is disturbed.
// - wgrad in strips and panels, 128 tokens at a time: 3 to 12 %; the next tokens fetched ahead, a few lines a register
//   block: a third at heads of 64, 4 to 8 % at 128. (With blocks of 256 tokens it gained nothing.)
// - Nine rows and more, float32: B packed instead of read in place. 16 % at 16 rows.
// Not kept: register blocks of 14x2, 9x3, 6x4 (the same); fetching ahead the lines to be stored, at once or spread (up
// to 3 % slower); kBlockK 256 (the same); 1 MiB of packed B (slower); rows of A in place of B in L2 (slower from
// head_dim 128 on); non-temporal stores (a fifth faster at heads of 64, but what is read next then comes from memory).
// What is left: with A and C in L1 the kernels run at 0.8 to 0.9 of the multiply-add rate, from memory at 0.65 to 0.75.
//
// bfloat16 on AMX runs at 2.5 to 4 times the float32 multiply-add rate and is bound by memory; at heads of 64 at 1.5.
// AVX2, on the same machine: for a single row of half types, fetching the next columns of B ahead gains 12 % (float32:
// 5 % slower; AVX-512: nothing); wider rows of it are slower. Otherwise as AVX-512. The portable kernels have not been
// tuned.
//
// bfloat16 with AVX-512 BF16 (2 cores of an EPYC, Zen 4), predicted from the instruction, which does two multiply-adds:
// twice float32's speed. Found: 1.9 times in the geometric mean, 1.5 to 2.2, and 0.91 to 3.05 times the speed of einsum
// on oneDNN, which uses it, too. Register blocks are 8 rows by 2 vectors: the 16 rows of a tile are two of them.
#pragma once

#include <cstdint>

namespace mhmatmul::cpu {

// Elements of a sum that are added up one after the other before the result joins the sum: part of the meaning of a sum
// (gemm.h), so one number for all machines. Longer chains were less exact than twice PyTorch's error where its own
// products of few rows sum in many lanes.
constexpr int64_t kChunk = 128;

// Elements of the reduction per block: part of the meaning of a sum (gemm.h), so one number for all machines. 512 keeps
// a packed panel (512 x 32 float32 = 64 KiB) in L2 and error growth that of a blocked sum.
constexpr int64_t kBlockK = 512;

// Distance between converted rows of A. Not a power of two, so that rows do not meet in one cache set.
constexpr int64_t kRowStep = kBlockK + 16;

// The same for reductions up to kShortK, so that short rows lie close together.
constexpr int64_t kShortK = 128;
constexpr int64_t kShortRowStep = kShortK + 16;

// Bytes of B that a task packs: a quarter of L2, where with what passes by they should stay, within these bounds.
constexpr int64_t kPackedBytesLeast = 128 * 1024;
constexpr int64_t kPackedBytesMost = 512 * 1024;

// Rows per task: many, to pack B seldom; fewer where their sums have to be kept over several blocks of k.
constexpr int64_t kTaskRows = 1536;
constexpr int64_t kTaskRowsWithSums = 384;
constexpr int64_t kFewestRows = 192;

// Up to this many rows B is read where it lies: packing a panel would cost more than it saves.
constexpr int64_t kDirectRows = 8;
constexpr int64_t kDirectRowsOfHalves = 16;
constexpr int64_t kFewRows = 2;  // likewise, of bfloat16 in pairs

// Tokens per block of wgrad, part of the meaning of its sums; a panel of so many stays in L1.
constexpr int64_t kBlockTokens = kChunk;

// Rows and columns per task of wgrad: its sums, and a block of tokens, stay in L2. Heads shorter than kWgradGroup share
// a task, which so reads longer stretches of memory.
constexpr int64_t kWgradRows = 512;
constexpr int64_t kWgradColumns = 512;
constexpr int64_t kWgradGroup = 256;

// Tasks per thread that balance uneven progress; and the fewest multiply-adds worth a second thread.
constexpr int64_t kTasksPerThread = 4;
constexpr double kWorkPerThread = 1 << 16;

}  // namespace mhmatmul::cpu
