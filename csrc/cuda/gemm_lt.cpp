#include "gemm_lt.h"

#include <c10/cuda/CUDACachingAllocator.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace mhmatmul::cuda {
namespace {

constexpr size_t kWorkspace = 32 << 20;  // bytes, at most: what PyTorch gives cuBLAS on Hopper
constexpr int kOffered = 16;             // algorithms to choose from
// Timed one after another in a warm cache, which says little of short ones: another than the first must be clearly
// faster, and what the host takes to launch a product cannot be told from the product.
constexpr int kRepeats = 10;
constexpr float kClearly = 0.93f;       // of the first one's time
constexpr float kTooShort = 20 * 1e-3;  // ms of one product
constexpr size_t kRemembered = 4096;    // problems

void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string(call) + ": " + cublasGetStatusString(status));
}
void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

// Column-major, `batch` matrices `stride` apart.
class Layout {
 public:
  Layout(cudaDataType_t type, int64_t rows, int64_t columns, int64_t ld, int64_t batch, int64_t stride) {
    check(cublasLtMatrixLayoutInit(&layout_, type, rows, columns, ld), "cublasLtMatrixLayoutInit");
    set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, static_cast<int32_t>(batch));
    set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, stride);
  }
  cublasLtMatrixLayout_t get() const { return &layout_; }

 private:
  template <class Value>
  void set(cublasLtMatrixLayoutAttribute_t attribute, const Value& value) {
    check(cublasLtMatrixLayoutSetAttribute(&layout_, attribute, &value, sizeof value),
          "cublasLtMatrixLayoutSetAttribute");
  }
  mutable cublasLtMatrixLayoutOpaque_t layout_{};
};

class Description {
 public:
  Description(cublasComputeType_t compute, cudaDataType_t scale) {
    check(cublasLtMatmulDescInit(&description_, compute, scale), "cublasLtMatmulDescInit");
  }
  template <class Value>
  void set(cublasLtMatmulDescAttributes_t attribute, const Value& value) {
    check(cublasLtMatmulDescSetAttribute(&description_, attribute, &value, sizeof value),
          "cublasLtMatmulDescSetAttribute");
  }
  cublasLtMatmulDesc_t get() const { return &description_; }

 private:
  mutable cublasLtMatmulDescOpaque_t description_{};
};

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_{};
};

struct Algorithm {
  cublasLtMatmulAlgo_t algorithm;
  size_t workspace;
};

// Bytes to which an address is aligned, as far as algorithms care.
uint32_t alignment_of(const void* data) {
  constexpr uintptr_t kMost = 256;
  const auto address = reinterpret_cast<uintptr_t>(data) | kMost;
  return static_cast<uint32_t>(address & (~address + 1));
}

// One problem with its operands. cuBLASLt is column-major: there C^T = B^T A^T, and a row-major matrix is read as its
// transpose without moving it.
class Problem {
 public:
  Problem(cublasLtHandle_t handle, const BatchedGemm& gemm, const void* bias, int64_t bias_batch_stride,
          const LtOptions& options)
      : handle_(handle),
        gemm_(gemm),
        options_(options),
        compute_(gemm.operand_type == CUDA_R_64F                          ? CUBLAS_COMPUTE_64F
                 : gemm.operand_type == CUDA_R_32F && options.allows_tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                                          : CUBLAS_COMPUTE_32F),
        description_(compute_, gemm.operand_type == CUDA_R_64F ? CUDA_R_64F : CUDA_R_32F),
        b_(layout(gemm.b, gemm.k, gemm.n)),
        a_(layout(gemm.a, gemm.m, gemm.k)),
        c_(gemm.c_type, gemm.n, gemm.m, gemm.ldc, gemm.batch, gemm.c_batch_stride) {
    description_.set(CUBLASLT_MATMUL_DESC_TRANSA, gemm.b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    description_.set(CUBLASLT_MATMUL_DESC_TRANSB, gemm.a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (bias) {
      description_.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      description_.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
      description_.set(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, bias_batch_stride);
    }
    alignments_ = {alignment_of(gemm.b.data), alignment_of(gemm.a.data), alignment_of(gemm.c)};
    key_ = {gemm.n,
            gemm.k,
            gemm.batch,
            gemm.a.ld,
            gemm.a.batch_stride,
            gemm.b.ld,
            gemm.b.batch_stride,
            gemm.ldc,
            gemm.c_batch_stride,
            gemm.a.transposed,
            gemm.b.transposed,
            gemm.operand_type,
            gemm.c_type,
            compute_,
            alignments_[0],
            alignments_[1],
            alignments_[2],
            bias ? alignment_of(bias) : 0,
            bias_batch_stride};
  }

  // What cuBLASLt offers, the most promising first.
  std::vector<Algorithm> offered(int most) const {
    cublasLtMatmulPreferenceOpaque_t preference{};
    check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      check(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value),
            "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspace);
    // A sum that is split is put together in float32, in one order.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignments_[0]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignments_[1]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignments_[2]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignments_[2]);
    std::array<cublasLtMatmulHeuristicResult_t, kOffered> results{};
    int count = 0;
    const auto status = cublasLtMatmulAlgoGetHeuristic(handle_, description_.get(), b_.get(), a_.get(), c_.get(),
                                                       c_.get(), &preference, most, results.data(), &count);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, "cublasLtMatmulAlgoGetHeuristic");
    std::vector<Algorithm> algorithms;
    for (int i = 0; i < count; ++i)
      if (results[i].state == CUBLAS_STATUS_SUCCESS) algorithms.push_back({results[i].algo, results[i].workspaceSize});
    return algorithms;
  }

  bool accepts(const Algorithm& algorithm) const {
    cublasLtMatmulHeuristicResult_t result{};
    return cublasLtMatmulAlgoCheck(handle_, description_.get(), b_.get(), a_.get(), c_.get(), c_.get(),
                                   &algorithm.algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= algorithm.workspace;
  }

  void run(const Algorithm& algorithm) const {
    const double one_double = 1, zero_double = 0;
    const float one_float = 1, zero_float = 0;
    const bool is_double = gemm_.operand_type == CUDA_R_64F;
    const void* const one = is_double ? static_cast<const void*>(&one_double) : &one_float;
    const void* const zero = is_double ? static_cast<const void*>(&zero_double) : &zero_float;
    at::DataPtr workspace;
    if (algorithm.workspace > 0)
      workspace = c10::cuda::CUDACachingAllocator::get()->allocate(algorithm.workspace);  // the stream's own
    check(cublasLtMatmul(handle_, description_.get(), one, gemm_.b.data, b_.get(), gemm_.a.data, a_.get(), zero,
                         gemm_.c, c_.get(), gemm_.c, c_.get(), &algorithm.algorithm, workspace.get(),
                         algorithm.workspace, options_.stream),
          "cublasLtMatmul");
  }

  // The fastest of those offered, on the operands themselves.
  Algorithm fastest(const std::vector<Algorithm>& algorithms) const {
    const float first = time_of(algorithms[0]);
    if (first < kTooShort) return algorithms[0];
    size_t best = 0;
    float best_time = first * kClearly;
    for (size_t i = 1; i < algorithms.size(); ++i) {
      const float time = time_of(algorithms[i]);
      if (time < best_time) {
        best_time = time;
        best = i;
      }
    }
    return algorithms[best];
  }

  using Key = std::array<int64_t, 22>;

  Key key(bool is_timed) const {
    int64_t rows = gemm_.m;
    if (is_timed)
      for (rows = 1; rows < gemm_.m;) rows *= 2;
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    Key key{rows, is_timed, device};
    std::copy(key_.begin(), key_.end(), key.begin() + 3);
    return key;
  }

 private:
  // Milliseconds.
  float time_of(const Algorithm& algorithm) const {
    const Event begin, end;
    run(algorithm);
    check(cudaEventRecord(begin.get(), options_.stream), "cudaEventRecord");
    for (int repeat = 0; repeat < kRepeats; ++repeat) run(algorithm);
    check(cudaEventRecord(end.get(), options_.stream), "cudaEventRecord");
    check(cudaEventSynchronize(end.get()), "cudaEventSynchronize");
    float time = 0;
    check(cudaEventElapsedTime(&time, begin.get(), end.get()), "cudaEventElapsedTime");
    return time / kRepeats;
  }

  Layout layout(const Operand& operand, int64_t rows, int64_t columns) const {
    return operand.transposed
               ? Layout(gemm_.operand_type, rows, columns, operand.ld, gemm_.batch, operand.batch_stride)
               : Layout(gemm_.operand_type, columns, rows, operand.ld, gemm_.batch, operand.batch_stride);
  }

  cublasLtHandle_t handle_;
  const BatchedGemm& gemm_;
  LtOptions options_;
  cublasComputeType_t compute_;
  Description description_;
  Layout b_, a_, c_;
  std::array<uint32_t, 3> alignments_{};
  std::array<int64_t, 19> key_{};
};

// What was found before, in this process. Full, it forgets everything.
class Memory {
 public:
  std::optional<Algorithm> find(const Problem::Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = algorithms_.find(key);
    return found == algorithms_.end() ? std::nullopt : std::optional(found->second);
  }
  void keep(const Problem::Key& key, const Algorithm& algorithm) {
    const std::lock_guard lock(mutex_);
    if (algorithms_.size() >= kRemembered) algorithms_.clear();
    algorithms_.insert_or_assign(key, algorithm);
  }

 private:
  std::mutex mutex_;
  std::map<Problem::Key, Algorithm> algorithms_;
};

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

std::optional<Algorithm> algorithm_for(const Problem& problem, const LtOptions& options) {
  static Memory memory;
  if (options.times) {
    const auto key = problem.key(/*is_timed=*/true);
    const auto known = memory.find(key);
    if (known && problem.accepts(*known)) return known;
    if (!known && !is_capturing(options.stream)) {
      const auto offered = problem.offered(kOffered);
      if (offered.empty()) return std::nullopt;
      const Algorithm best = problem.fastest(offered);
      memory.keep(key, best);
      return best;
    }
  }
  const auto key = problem.key(/*is_timed=*/false);
  if (const auto known = memory.find(key)) return known;
  const auto offered = problem.offered(1);
  if (offered.empty()) return std::nullopt;
  memory.keep(key, offered[0]);
  return offered[0];
}

}  // namespace

bool run_lt(cublasLtHandle_t handle, const BatchedGemm& gemm, const void* bias, int64_t bias_batch_stride,
            const LtOptions& options) {
  const Problem problem(handle, gemm, bias, bias_batch_stride, options);
  const auto algorithm = algorithm_for(problem, options);
  if (algorithm) problem.run(*algorithm);
  return algorithm.has_value();
}

}  // namespace mhmatmul::cuda
