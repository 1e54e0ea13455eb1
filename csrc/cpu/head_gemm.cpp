#include "head_gemm.h"

#include "rows.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <atomic>
#include <string_view>

namespace mhmatmul::cpu {
namespace {

enum class HalfPath { kFloat32, kNative };

HalfPath default_half_path() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) return HalfPath::kNative;
#endif
  return HalfPath::kFloat32;
}

std::atomic<HalfPath>& current_half_path() {
  static std::atomic<HalfPath> path{default_half_path()};
  return path;
}

// Rows gathered or converted at a time: bounds the scratch memory, long enough to keep the matmul busy.
constexpr int64_t kBlock = 1024;

bool is_half(const Tensor& tensor) { return at::isReducedFloatingType(tensor.scalar_type()); }

// The dtype that products are computed and summed in.
at::ScalarType product_dtype(const Tensor& tensor) { return at::toOpMathType(tensor.scalar_type()); }

Tensor gather(const Rows& rows, int64_t begin, int64_t end) {
  const int64_t nh = rows.tensor.size(1), hd = rows.tensor.size(2), width = nh * hd, n = end - begin;
  const Tensor source = rows.tensor.reshape({rows.tensor.size(0), width});
  const Tensor flat = source.stride(1) == 1 || width <= 1 ? source : source.contiguous();
  Tensor block = at::empty({n, nh, hd}, flat.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, flat.scalar_type(), "gather_rows", [&] {
    const auto* from = flat.const_data_ptr<scalar_t>();
    auto* to = block.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, n, 64, [&](int64_t first, int64_t last) {
      gather_rows(from, flat.stride(0), rows.indices + begin, first, last, width, to);
    });
  });
  return block;
}

// Rows [begin, end) as [nh, end - begin, hd].
Tensor heads_of(const Rows& rows, int64_t begin, int64_t end) {
  return (rows.indices ? gather(rows, begin, end) : rows.tensor.narrow(0, begin, end - begin)).transpose(0, 1);
}

void clear_padding(const int64_t* indices, const Tensor& output) {
  for (int64_t r = 0; r < output.size(0); ++r)
    if (indices[r] < 0) output.select(0, r).zero_();
}

// out [nh, n, e] = a [nh, n, hd] w [nh, hd, e] + bias [nh, e], in the dtype of all of them.
void matmul(const Tensor& a, const Tensor& w, const OptionalTensor& bias, Tensor out) {
  if (bias) {
    at::baddbmm_out(out, bias->unsqueeze(1), a, w);
  } else {
    at::bmm_out(out, a, w);
  }
}

}  // namespace

const char* half_path() { return current_half_path() == HalfPath::kNative ? "native" : "float32"; }

bool set_half_path(const char* name) {
  const std::string_view path(name);
  if (path != "native" && path != "float32") return false;
  current_half_path() = path == "native" ? HalfPath::kNative : HalfPath::kFloat32;
  return true;
}

void forward(const Rows& rows, const Tensor& weight, const OptionalTensor& bias, const Tensor& output) {
  if (output.numel() == 0) return;
  const bool converts = is_half(weight) && (bias || current_half_path() == HalfPath::kFloat32);
  const auto dtype = converts ? product_dtype(weight) : weight.scalar_type();
  const Tensor w = weight.to(dtype);
  const OptionalTensor c = bias ? OptionalTensor(bias->to(dtype)) : std::nullopt;
  const int64_t block = converts || rows.indices ? kBlock : rows.count;
  for (int64_t begin = 0; begin < rows.count; begin += block) {
    const int64_t end = std::min(begin + block, rows.count);
    const Tensor a = heads_of(rows, begin, end).to(dtype);
    const Tensor out = output.narrow(0, begin, end - begin);
    if (converts) {
      Tensor product = at::empty({a.size(0), a.size(1), w.size(2)}, a.options());
      matmul(a, w, c, product);
      out.copy_(product.transpose(0, 1));
    } else {
      matmul(a, w, c, out.transpose(0, 1));
    }
    if (rows.any_padding) clear_padding(rows.indices + begin, out);
  }
}

Tensor dgrad(const Tensor& grad_output, const Tensor& weight, const int64_t* indices, int64_t m) {
  const int64_t t = grad_output.size(0), nh = weight.size(0), hd = weight.size(1), width = nh * hd;
  const auto dtype = product_dtype(weight);
  Tensor grad_input = at::zeros({m, nh, hd}, weight.options().dtype(dtype));
  const Tensor wt = weight.to(dtype).transpose(1, 2);
  for (int64_t begin = 0; begin < t && grad_input.numel() > 0; begin += kBlock) {
    const int64_t n = std::min(kBlock, t - begin);
    Tensor block = at::empty({n, nh, hd}, grad_input.options());
    matmul(grad_output.narrow(0, begin, n).transpose(0, 1).to(dtype), wt, std::nullopt, block.transpose(0, 1));
    AT_DISPATCH_FLOATING_TYPES(dtype, "add_rows", [&] {
      const auto* from = block.const_data_ptr<scalar_t>();
      auto* to = grad_input.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, width, 64, [&](int64_t first, int64_t last) {
        add_rows(from, indices + begin, n, first, last, width, to);
      });
    });
  }
  return grad_input.to(weight.scalar_type());
}

Tensor wgrad(const Tensor& grad_output, const Rows& rows) {
  const int64_t nh = grad_output.size(1), hd = rows.tensor.size(2), e = grad_output.size(2);
  const auto dtype = product_dtype(grad_output);
  Tensor grad_weight = at::zeros({nh, hd, e}, grad_output.options().dtype(dtype));
  const bool blocked = is_half(grad_output) || rows.indices;
  const int64_t block = blocked ? kBlock : rows.count;
  for (int64_t begin = 0; begin < rows.count && grad_weight.numel() > 0; begin += block) {
    const int64_t end = std::min(begin + block, rows.count);
    const Tensor a = heads_of(rows, begin, end).to(dtype);
    Tensor g = grad_output.narrow(0, begin, end - begin);
    if (rows.any_padding) {  // whatever a padding row's gradient holds, it counts for nothing
      g = g.clone();
      clear_padding(rows.indices + begin, g);
    }
    grad_weight.baddbmm_(a.transpose(1, 2), g.transpose(0, 1).to(dtype));
  }
  return grad_weight.to(grad_output.scalar_type());
}

}  // namespace mhmatmul::cpu
