// A selection whose size is on its way: launched, and waited for when the host has nothing else to do.
#pragma once

#include "../ops.h"

#include <c10/cuda/CUDAStream.h>

namespace mhmatmul::cuda {

class PackedSelection {
 public:
  // Launches the selection on the current stream. Its arguments have been checked, its threshold is a number or a 0-d
  // tensor; refused where a CUDA graph is captured.
  PackedSelection(const Tensor& probs, std::optional<double> top_p_value, const OptionalTensor& top_p,
                  std::optional<int64_t> top_k);

  // The device must not write `total_` when it is somebody else's.
  ~PackedSelection();
  PackedSelection(const PackedSelection&) = delete;
  PackedSelection& operator=(const PackedSelection&) = delete;

  // Waits until the device has counted, for what was launched after the selection only if that takes long: how many
  // tokens are kept.
  int64_t wait();

  Tensor places;      // [b * min(k, s)] int64: the positions kept, then whatever lay there
  Tensor cu_seqlens;  // [b + 1] int32; the last one is how many are kept, on the device

 private:
  int64_t counted() const;

  Tensor total_;  // one int64 of the host's: kUnknown until the device has counted
  c10::cuda::CUDAStream stream_;
};

// The first t rows of what was allocated for the most that can be kept: a copy where they would hold on to more than as
// much again.
Tensor first_rows(const Tensor& rows, int64_t t);

}  // namespace mhmatmul::cuda
