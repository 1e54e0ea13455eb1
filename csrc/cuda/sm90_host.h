// What the launchers of the kernels for Hopper share: tensor maps for the copy engine, what the device is, launches.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace mhmatmul::cuda::sm90 {

inline void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

// The driver's encoder, found at run time so that the library does not link libcuda.
inline auto encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found),
          "cudaGetDriverEntryPoint");
#endif
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  return encode;
}

// A tensor [outer, middle, inner], inner side by side, strides in elements, read or written in boxes. Rows of a box lie
// one below the other in shared memory, swizzled over their width: 32, 64 or 128 bytes.
struct Layout {
  int64_t inner, middle, outer, middle_stride, outer_stride;
  int box_inner, box_middle, box_outer;
};

constexpr int64_t kElementSize = 2, kAlignment = 16;  // kElementSize: of half types

// `type`: TFLOAT32 is float32 in memory, rounded on its way.
inline CUtensorMap tensor_map(const void* data, const Layout& layout, CUtensorMapDataType type) {
  const bool is_half = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int64_t element_size = is_half ? kElementSize : 4, width = layout.box_inner * element_size;
  // A stride that is never taken may be anything: the encoder wants it aligned all the same.
  const auto bytes = [&](int64_t stride, int64_t size) {
    return static_cast<cuuint64_t>(size == 1 ? kAlignment : stride * element_size);
  };
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(layout.inner), static_cast<cuuint64_t>(layout.middle),
                              static_cast<cuuint64_t>(layout.outer)};
  const cuuint64_t strides[] = {bytes(layout.middle_stride, layout.middle), bytes(layout.outer_stride, layout.outer)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(layout.box_inner), static_cast<cuuint32_t>(layout.box_middle),
                            static_cast<cuuint32_t>(layout.box_outer)};
  const cuuint32_t every[] = {1, 1, 1};
  const auto swizzle = width == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : width == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : CU_TENSOR_MAP_SWIZZLE_32B;
  CUtensorMap map;
  const auto encode = [&] {
    return encoder()(&map, type, 3, const_cast<void*>(data), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread that has asked CUDA for nothing yet, as autograd's
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    result = encode();
  }
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  return map;
}

inline CUtensorMap tensor_map(const void* data, const Layout& layout, bool is_bfloat16) {
  return tensor_map(data, layout, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
}

// What `find` finds of the current device, which is all that it may depend on: its type stands for it. Each thread
// remembers it of the device that it used last: asking each time took 2 of the 16 us that a product took the host (one
// on which torch.bmm takes 19).
template <class Find>
auto of_this_device(Find find) {
  thread_local int known = -1;
  thread_local std::invoke_result_t<Find, int> found{};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device != known) {
    found = find(device);
    known = device;
  }
  return found;
}

inline int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors_here() {
  return of_this_device([](int device) { return attribute_of(device, cudaDevAttrMultiProcessorCount); });
}

// What was captured last, where what comes next would wait for nothing else.
struct LastCaptured {
  unsigned long long capture = 0;  // 0: nothing is captured
  cudaGraphNode_t node = nullptr;

  bool operator==(const LastCaptured& other) const { return capture == other.capture && node == other.node; }
};

inline LastCaptured last_captured(cudaStream_t stream) {
#if CUDART_VERSION >= 13000
  constexpr auto ask = cudaStreamGetCaptureInfo;
#else
  constexpr auto ask = cudaStreamGetCaptureInfo_v3;
#endif
  cudaStreamCaptureStatus status{};
  LastCaptured last;
  cudaGraph_t graph = nullptr;
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t count = 0;
  check(ask(stream, &status, &last.capture, &graph, &nodes, &edges, &count), "cudaStreamGetCaptureInfo");
  if (status != cudaStreamCaptureStatusActive) return {};
  if (count == 1) last.node = nodes[0];
  return last;
}

// Memory from its first byte to its last; all there is, where nothing else is said.
struct Span {
  uintptr_t begin = 0, end = UINTPTR_MAX;

  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
};

// The kernel that `launch_behind` launched last in a capture, and what it writes at most.
struct LastLaunched {
  LastCaptured captured;
  Span written;
};
inline thread_local LastLaunched last_launched;

// Whether what is captured next waits for a kernel that was launched here and for nothing else.
inline bool is_behind_ours(const LastCaptured& before) { return before.node && before == last_launched.captured; }

// Whether it may read `span` before that kernel has ended: that writes elsewhere, and all others ahead have ended.
inline bool may_read_early(const LastCaptured& before, const Span& span) {
  return is_behind_ours(before) && !last_launched.written.meets(span);
}

// A launch of a kernel that may begin before the one ahead of it has ended; `cluster` blocks side by side form a
// cluster. In a graph only behind another that was launched here, and lets it: behind others a graph that is replayed
// by an idle device takes 0.2 to 0.3 us more for each such launch (H200; 7.8 -> 7.6 for 128 heads of 128 -> 512, 1 row,
// and a small kernel of PyTorch's), one that waits behind another the same. Called eagerly it gains 0.9 us behind any.
//
// `before`: what `last_captured` says of the stream. `written`: what the kernel writes at most, if it calls
// follow_kernel_before.
template <auto kernel, class... Arguments>
void launch_behind(const LastCaptured& before, const Span& written, dim3 blocks, int threads, int bytes, int cluster,
                   cudaStream_t stream, Arguments... arguments) {
  if (bytes > 0)
    of_this_device([](int device) {
      const int most = attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
      return true;
    });
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = before.capture == 0 || is_behind_ours(before);
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned int>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "cudaLaunchKernelEx");
  if (before.capture != 0) last_launched = {last_captured(stream), written};
}

// The same, and nothing is said of what the kernel writes.
template <auto kernel, class... Arguments>
void launch(dim3 blocks, int threads, int bytes, int cluster, cudaStream_t stream, Arguments... arguments) {
  launch_behind<kernel>(last_captured(stream), Span{}, blocks, threads, bytes, cluster, stream, arguments...);
}

// Whether the copy engine can walk a tensor with these strides, in elements; an `alignment` wider than its own: whether
// all rows begin at multiples of that, too.
inline bool is_walkable(const void* data, int64_t outer, int64_t outer_stride, int64_t batch, int64_t batch_stride,
                        int64_t element_size = kElementSize, int64_t alignment = kAlignment) {
  constexpr int64_t kFarthest = int64_t{1} << 40;  // bytes of a stride
  const auto fits = [&](int64_t size, int64_t stride) {
    const int64_t bytes = stride * element_size;
    return size == 1 || (bytes > 0 && bytes < kFarthest && bytes % alignment == 0);
  };
  return reinterpret_cast<uintptr_t>(data) % alignment == 0 && fits(outer, outer_stride) && fits(batch, batch_stride);
}

// Whether kernels can count to each of these: a tile's end is an int, too.
inline bool are_countable(std::initializer_list<int64_t> sizes) {
  constexpr int64_t kLargest = INT32_MAX - 256;
  return std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size >= 1 && size <= kLargest; });
}

inline bool runs_here() {
#ifdef MHMATMUL_BUILT_FOR_SM90A
  return of_this_device([](int device) {
    return attribute_of(device, cudaDevAttrComputeCapabilityMajor) == 9 &&
           attribute_of(device, cudaDevAttrComputeCapabilityMinor) == 0;
  });
#else
  return false;  // the machine code that such a device would run is of an architecture without these instructions
#endif
}

}  // namespace mhmatmul::cuda::sm90
