#include "checks.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <array>
#include <charconv>
#include <limits>
#include <string>
#include <vector>

namespace mhmatmul {
namespace {

// One axis of an expected shape: its letter, and its size where something else has fixed it.
struct Axis {
  const char* letter;
  std::optional<SymInt> size = std::nullopt;
};
using Axes = std::vector<Axis>;

std::string dtype_name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

// Messages are put together from strings alone: a library that carries a C++ runtime of its own, as some toolchains
// link it, may not hand its streams to torch's for formatting.
std::string text(int64_t number) { return std::to_string(number); }

std::string text(double number) {
  std::array<char, 32> digits;
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), number).ptr;
  return {digits.data(), end};
}

std::string text(const SymInt& size) {
  const auto known = size.maybe_as_int();
  return known ? std::to_string(*known) : size.toSymNode()->str();
}

std::string text(c10::SymIntArrayRef sizes) {
  std::string list;
  for (const auto& size : sizes) list += (list.empty() ? "" : ", ") + text(size);
  return "[" + list + "]";
}

// "[b, s, h]", followed by " = [2, 5, h]" when any size is fixed; the letters are those of the axes unless
// given.
std::string expected_shape(const Axes& axes, const char* given_letters) {
  std::string letters, sizes;
  bool any_fixed = false;
  for (const auto& axis : axes) {
    const char* const separator = letters.empty() ? "" : ", ";
    letters += std::string(separator) + axis.letter;
    sizes += separator + (axis.size ? text(*axis.size) : axis.letter);
    any_fixed |= axis.size.has_value();
  }
  const std::string shape = given_letters ? given_letters : "[" + letters + "]";
  return any_fixed ? shape + " = [" + sizes + "]" : shape;
}

bool equal(const SymInt& a, const SymInt& b) { return a.sym_eq(b).expect_true(__FILE__, __LINE__); }

bool has_shape(const Tensor& tensor, const Axes& axes) {
  if (tensor.dim() != static_cast<int64_t>(axes.size())) return false;
  for (size_t i = 0; i < axes.size(); ++i)
    if (axes[i].size && !equal(tensor.sym_size(static_cast<int64_t>(i)), *axes[i].size)) return false;
  return true;
}

void check_shape(std::string_view op, const char* name, const Tensor& tensor, const Axes& axes,
                 const char* letters = nullptr) {
  TORCH_CHECK_VALUE(has_shape(tensor, axes), op, ": ", name, " must be ", expected_shape(axes, letters), ", got ",
                    text(tensor.sym_sizes()));
}

// A tensor [..., a, b] whose sizes before the last two are those of `leading`.
Axes behind(c10::SymIntArrayRef leading, Axes last) {
  Axes axes;
  for (const auto& size : leading) axes.push_back({"...", size});
  axes.insert(axes.end(), last.begin(), last.end());
  return axes;
}

void check_defined(std::string_view op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), op, ": ", name, " must be a Tensor, got None");
}

void check_operand_dtype(std::string_view op, const char* name, const Tensor& tensor) {
  check_defined(op, name, tensor);
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kDouble, op,
                   ": ", name, " must be float32, float16, bfloat16 or float64, got ", dtype_name(dtype));
}

void check_device_of(std::string_view op, const char* name, const Tensor& tensor, const char* reference_name,
                     const Tensor& reference) {
  TORCH_CHECK(tensor.device() == reference.device(), op, ": ", name, " must be on ", reference.device().str(), " as ",
              reference_name, " is, got ", tensor.device().str());
}

// `tensor` is an operand beside `reference`: of the same dtype, on the same device.
void check_beside(std::string_view op, const char* name, const Tensor& tensor, const char* reference_name,
                  const Tensor& reference) {
  check_defined(op, name, tensor);
  TORCH_CHECK_TYPE(tensor.scalar_type() == reference.scalar_type(), op, ": ", name, " must be ",
                   dtype_name(reference.scalar_type()), " as ", reference_name, " is, got ",
                   dtype_name(tensor.scalar_type()));
  check_device_of(op, name, tensor, reference_name, reference);
}

void check_index_tensor(std::string_view op, const Tensor& indices, const char* reference_name,
                        const Tensor& reference) {
  check_defined(op, "indices", indices);
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong, op, ": indices must be int64, got ",
                   dtype_name(indices.scalar_type()));
  check_device_of(op, "indices", indices, reference_name, reference);
  check_shape(op, "indices", indices, {{"t"}});
}

void check_bias_and_out(std::string_view op, const Tensor& input, c10::SymIntArrayRef leading, const SymInt& nh,
                        const SymInt& e, const OptionalTensor& bias, const OptionalTensor& out) {
  if (bias) {
    check_beside(op, "bias", *bias, "input", input);
    check_shape(op, "bias", *bias, {{"nh", nh}, {"e", e}});
  }
  if (out) {
    check_beside(op, "out", *out, "input", input);
    check_shape(op, "out", *out, behind(leading, {{"nh", nh}, {"e", e}}), "[..., nh, e]");
    TORCH_CHECK_VALUE(out->sym_size(-1) <= 1 || out->sym_stride(-1) == 1, op,
                      ": out must have stride 1 in its last dimension, got ", text(out->sym_stride(-1)));
  }
}

}  // namespace

HeadSizes check_head_matmul(std::string_view op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& indices, const OptionalTensor& out) {
  check_operand_dtype(op, "input", input);
  check_beside(op, "weight", weight, "input", input);
  if (indices) {
    check_index_tensor(op, *indices, "input", input);
    check_shape(op, "input", input, {{"m"}, {"nh"}, {"hd"}});
  }
  TORCH_CHECK_VALUE(input.dim() >= 2, op, ": input must be [..., nh, hd], got ", text(input.sym_sizes()));
  const SymInt nh = input.sym_size(-2), hd = input.sym_size(-1);
  check_shape(op, "weight", weight, {{"nh", nh}, {"hd", hd}, {"e"}});
  const SymInt e = weight.sym_size(2);
  check_bias_and_out(op, input, input.sym_sizes().slice(0, input.dim() - 2), nh, e, bias, out);
  return {nh, hd, e};
}

void check_head_matmul_backward(std::string_view op, const Tensor& grad_output, const OptionalTensor& input,
                                const OptionalTensor& weight, const OptionalTensor& indices,
                                const std::optional<SymInt>& m) {
  check_operand_dtype(op, "grad_output", grad_output);
  if (indices) {
    check_index_tensor(op, *indices, "grad_output", grad_output);
    check_shape(op, "grad_output", grad_output, {{"t", indices->sym_size(0)}, {"nh"}, {"e"}});
  }
  TORCH_CHECK_VALUE(grad_output.dim() >= 2, op, ": grad_output must be [..., nh, e], got ",
                    text(grad_output.sym_sizes()));
  const SymInt nh = grad_output.sym_size(-2), e = grad_output.sym_size(-1);
  std::optional<SymInt> hd;
  if (input) {
    check_beside(op, "input", *input, "grad_output", grad_output);
    if (indices) {
      check_shape(op, "input", *input, {{"m"}, {"nh", nh}, {"hd"}});
    } else {
      const auto leading = grad_output.sym_sizes().slice(0, grad_output.dim() - 2);
      check_shape(op, "input", *input, behind(leading, {{"nh", nh}, {"hd"}}), "[..., nh, hd]");
    }
    hd = input->sym_size(-1);
  }
  if (weight) {
    check_beside(op, "weight", *weight, "grad_output", grad_output);
    check_shape(op, "weight", *weight, {{"nh", nh}, {"hd", hd}, {"e", e}});
  }
  if (m) TORCH_CHECK_VALUE(*m >= 0, op, ": m must be >= 0, got ", text(*m));
}

HeadSizes check_multi_head_matmul(std::string_view op, const Tensor& input, const Tensor& weight,
                                  const SymInt& num_heads, const OptionalTensor& bias, const OptionalTensor& out) {
  check_operand_dtype(op, "input", input);
  check_beside(op, "weight", weight, "input", input);
  TORCH_CHECK_VALUE(input.dim() >= 1, op, ": input must be [..., h], got ", text(input.sym_sizes()));
  const SymInt h = input.sym_size(-1);
  check_shape(op, "weight", weight, {{"h", h}, {"e"}});
  TORCH_CHECK_VALUE(num_heads >= 1 && h % num_heads == 0, op, ": num_heads must be >= 1 and divide h = ", text(h),
                    ", got ", text(num_heads));
  const SymInt e = weight.sym_size(1);
  check_bias_and_out(op, input, input.sym_sizes().slice(0, input.dim() - 1), num_heads, e, bias, out);
  return {num_heads, h / num_heads, e};
}

void check_select(std::string_view op, const Tensor& probs, std::optional<double> top_p_value,
                  const OptionalTensor& top_p, const std::optional<SymInt>& top_k,
                  const std::optional<SymInt>& capacity) {
  check_operand_dtype(op, "probs", probs);
  check_shape(op, "probs", probs, {{"b"}, {"s"}});
  if (top_p_value)
    TORCH_CHECK_VALUE(*top_p_value >= 0 && *top_p_value <= 1, op, ": top_p must be in [0, 1], got ",
                      text(*top_p_value));
  if (top_p) {
    check_operand_dtype(op, "top_p", *top_p);
    TORCH_CHECK_VALUE(top_p->dim() == 0, op, ": top_p must be a number or a 0-d tensor, got a tensor ",
                      text(top_p->sym_sizes()));
    TORCH_CHECK(top_p->device().is_cpu() || top_p->device() == probs.device(), op, ": top_p must be on cpu or ",
                probs.device().str(), " as probs is, got ", top_p->device().str());
  }
  const SymInt s = probs.sym_size(1);
  if (top_k)
    TORCH_CHECK_VALUE(*top_k >= 1 && *top_k <= s, op, ": top_k must be in [1, s] = [1, ", text(s), "], got ",
                      text(*top_k));
  if (capacity) TORCH_CHECK_VALUE(*capacity >= 0, op, ": capacity must be >= 0, got ", text(*capacity));
}

HeadSizes check_importance_matmul(std::string_view op, const Tensor& input, const Tensor& weight, const Tensor& probs,
                                  const SymInt& num_heads) {
  check_operand_dtype(op, "input", input);
  check_shape(op, "input", input, {{"b"}, {"s"}, {"h"}});
  check_defined(op, "probs", probs);
  check_device_of(op, "probs", probs, "input", input);
  check_shape(op, "probs", probs, {{"b", input.sym_size(0)}, {"s", input.sym_size(1)}});
  return check_multi_head_matmul(op, input, weight, num_heads);
}

void check_importance_head_matmul(std::string_view op, const Tensor& input, const Tensor& weight, const Tensor& probs,
                                  std::optional<double> top_p_value, const OptionalTensor& top_p,
                                  const std::optional<SymInt>& top_k) {
  TORCH_CHECK_VALUE(top_p_value.has_value() != top_p.has_value(), op,
                    ": the threshold must be a number or a tensor, got ", top_p ? "both" : "neither");
  check_select(op, probs, top_p_value, top_p, top_k);
  check_operand_dtype(op, "input", input);
  check_device_of(op, "probs", probs, "input", input);
  check_shape(op, "input", input, {{"b * s", probs.sym_size(0) * probs.sym_size(1)}, {"nh"}, {"hd"}});
  check_head_matmul(op, input, weight, std::nullopt);
}

void check_importance_grad(std::string_view op, const Tensor& grad_output, const Tensor& input, bool is_static,
                           const HeadSizes& sizes, c10::SymIntArrayRef rows) {
  check_beside(op, "grad_output", grad_output, "input", input);
  Axes axes = is_static ? Axes{{"b"}, {"c"}} : Axes{{"t"}};
  for (size_t i = 0; i < rows.size(); ++i) axes[i].size = rows[i];
  axes.push_back({"nh", sizes.nh});
  axes.push_back({"e", sizes.e});
  check_shape(op, "grad_output", grad_output, axes);
}

CombineSizes check_combine(std::string_view op, const char* rows_name, const Tensor& rows,
                           const OptionalTensor& updates, const Tensor& indices, const OptionalTensor& gates) {
  check_operand_dtype(op, rows_name, rows);
  if (updates) check_beside(op, "updates", *updates, rows_name, rows);
  if (gates) check_beside(op, "gates", *gates, rows_name, rows);
  TORCH_CHECK_VALUE(rows.dim() == 2 || rows.dim() == 3, op, ": ", rows_name, " must be [b, s, d] or [m, d], got ",
                    text(rows.sym_sizes()));
  check_index_tensor(op, indices, rows_name, rows);
  const SymInt d = rows.sym_size(-1), t = indices.sym_size(0);
  if (updates) check_shape(op, "updates", *updates, {{"t", t}, {"d", d}});
  if (gates) check_shape(op, "gates", *gates, {{"t", t}});
  return {rows.dim() == 3 ? rows.sym_size(0) * rows.sym_size(1) : rows.sym_size(0), d, t};
}

void check_indices(std::string_view op, const int64_t* indices, int64_t t, int64_t m) {
  for (int64_t r = 0; r < t; ++r) {
    TORCH_CHECK_INDEX(indices[r] >= -1 && indices[r] < m, op, ": indices must be in [-1, m) = [-1, ", text(m),
                      "), got ", text(indices[r]), " at position ", text(r));
  }
}

void check_kept(std::string_view op, int64_t t) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(t <= kMost, op, ": cu_seqlens is int32 and can count ", text(kMost), " kept tokens, got ", text(t));
}

namespace {
void check_select_arguments(std::string_view op, const Tensor& probs, std::optional<double> top_p_value,
                            const OptionalTensor& top_p, std::optional<SymInt> top_k, std::optional<SymInt> capacity) {
  check_select(op, probs, top_p_value, top_p, top_k, capacity);
}
}  // namespace

TORCH_LIBRARY_IMPL(mhmatmul, CompositeImplicitAutograd, m) {
  m.impl("_check_head_matmul",
         [](std::string_view op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
            const OptionalTensor& indices,
            const OptionalTensor& out) { check_head_matmul(op, input, weight, bias, indices, out); });
  m.impl("_check_head_matmul_backward",
         [](std::string_view op, const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
            const OptionalTensor& indices,
            std::optional<SymInt> m) { check_head_matmul_backward(op, grad_output, input, weight, indices, m); });
  m.impl("_check_select", check_select_arguments);
  m.impl("_check_importance_head_matmul",
         [](std::string_view op, const Tensor& input, const Tensor& weight, const Tensor& probs,
            std::optional<double> top_p_value, const OptionalTensor& top_p, std::optional<SymInt> top_k) {
           check_importance_head_matmul(op, input, weight, probs, top_p_value, top_p, top_k);
         });
  m.impl("_check_combine", [](std::string_view op, std::string_view rows_name, const Tensor& rows,
                              const OptionalTensor& updates, const Tensor& indices, const OptionalTensor& gates) {
    check_combine(op, std::string(rows_name).c_str(), rows, updates, indices, gates);
  });
}

// A mask is checked in Python, where torch.vmap may be at work.
TORCH_LIBRARY_IMPL(mhmatmul, FuncTorchBatched, m) { m.impl("_check_select", check_select_arguments); }

}  // namespace mhmatmul
