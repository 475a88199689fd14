// Argument checks shared by all operators.
#include "ops/checks.h"

namespace qlora::ops {

std::string text_of(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

std::string position_text(int64_t flat, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> index(sizes.size());
  for (size_t d = sizes.size(); d-- > 0;) {
    index[d] = flat % sizes[d];
    flat /= sizes[d];
  }
  return text_of({index.data(), index.size()});
}

DType float_dtype(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, not ScalarType ", static_cast<int>(dtype));
  }
}

DType integer_dtype(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Short:
      return DType::kInt16;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    default:
      STD_TORCH_CHECK(false, name, " must be an integer tensor, not ScalarType ", static_cast<int>(dtype));
  }
}

QuantType check_quant_type(const std::string& name) {
  QuantType type{};
  STD_TORCH_CHECK(parse_quant_type(name, &type), unknown_quant_type(name));
  return type;
}

int64_t checked_numel(const std::vector<int64_t>& shape) {
  int64_t numel = 1;
  for (const int64_t extent : shape) {
    STD_TORCH_CHECK(extent >= 0, "shape=", text_of({shape.data(), shape.size()}), " must not be negative");
    STD_TORCH_CHECK(!__builtin_mul_overflow(numel, extent, &numel), "shape=", text_of({shape.data(), shape.size()}),
                    " has more than 2^63 elements");
  }
  return numel;
}

CheckedWeight check_weight(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                           const OptionalTensor& nested_offset, int64_t n, int64_t k, const std::string& quant_type,
                           int64_t block_size, int64_t count) {
  const QuantType type = check_quant_type(quant_type);
  check_block_size(block_size);
  checked_numel({count, n, k});
  const int64_t numel = n * k, bytes = packed_bytes(numel), blocks = ceil_div(numel, block_size);
  const std::string times = count == 1 ? "" : std::to_string(count) + " times ";
  check_same_device(absmax, "absmax", packed, "packed");
  check_dtype(packed, ScalarType::Byte, "packed", "it must be uint8");
  STD_TORCH_CHECK(packed.numel() == count * bytes, "packed has ", packed.numel(), " bytes: a weight of ", numel,
                  " elements needs ", times, bytes);
  STD_TORCH_CHECK(absmax.numel() == count * blocks, "absmax has ", absmax.numel(), " values: ", numel,
                  " elements in blocks of ", block_size, " need ", times, blocks);
  CheckedWeight w{as_contiguous(packed), as_contiguous(absmax), std::nullopt, std::nullopt, type, n, k,
                  log2_exact(block_size)};
  if (count * numel > 0 && (is_given(nested_absmax) || is_given(nested_offset))) {
    STD_TORCH_CHECK(is_given(nested_absmax) && is_given(nested_offset),
                    "nested_absmax and nested_offset belong together: only one of them was given");
    check_same_device(*nested_absmax, "nested_absmax", packed, "packed");
    check_same_device(*nested_offset, "nested_offset", packed, "packed");
    check_dtype(absmax, ScalarType::Byte, "absmax", "it must be uint8 with double quantization");
    check_dtype(*nested_absmax, ScalarType::Float, "nested_absmax", "it must be float32");
    check_dtype(*nested_offset, ScalarType::Float, "nested_offset", "it must be float32");
    const int64_t nested = ceil_div(blocks, kNestedBlock);
    STD_TORCH_CHECK(nested_absmax->numel() == count * nested, "nested_absmax has ", nested_absmax->numel(),
                    " values: ", blocks, " scales in blocks of ", kNestedBlock, " need ", times, nested);
    STD_TORCH_CHECK(nested_offset->numel() == count, "nested_offset has ", nested_offset->numel(),
                    " values: it must have ", count == 1 ? "one" : std::to_string(count));
    w.nested_absmax = as_contiguous(*nested_absmax);
    w.nested_offset = as_contiguous(*nested_offset);
  } else {
    STD_TORCH_CHECK(count * numel == 0 || absmax.scalar_type() == ScalarType::Float,
                    "absmax must be float32 without double quantization (nested_absmax was not given)");
  }
  return w;
}

namespace {

void check_float_matrix(const Tensor& weight) {
  check_dtype(weight, ScalarType::Float, "weight", "calibration computes in float32: pass weight.float()");
  STD_TORCH_CHECK(weight.dim() == 2, "weight has shape ", text_of(weight.sizes()), ": it must be a matrix (n, k)");
}

}  // namespace

void check_search_scales(const Tensor& weight, const Tensor& importance, int64_t block_size) {
  check_float_matrix(weight);
  check_block_size(block_size);
  check_same_device(importance, "importance", weight, "weight");
  check_dtype(importance, ScalarType::Float, "importance", "it must be float32");
  STD_TORCH_CHECK(importance.dim() == 1 && importance.size(0) == weight.size(1), "importance has shape ",
                  text_of(importance.sizes()), ": weight ", text_of(weight.sizes()), " needs one value per column");
}

void check_importance(const Tensor& importance) {
  const float* values = importance.const_data_ptr<float>();
  for (int64_t i = 0; i < importance.numel(); ++i)
    STD_TORCH_CHECK(values[i] >= 0.0f && values[i] <= std::numeric_limits<float>::max(), "importance[", i,
                    "]=", values[i], ": the importance of a column must be finite and at least 0");
}

void check_feedback(const Tensor& weight, const OptionalTensor& feedback, const OptionalTensor& order) {
  check_float_matrix(weight);
  const int64_t k = weight.size(1);
  if (feedback.has_value()) {
    check_same_device(*feedback, "feedback", weight, "weight");
    check_dtype(*feedback, ScalarType::Float, "feedback", "it must be float32");
    STD_TORCH_CHECK(feedback->dim() == 2 && feedback->size(0) == k && feedback->size(1) == k, "feedback has shape ",
                    text_of(feedback->sizes()), ": weight ", text_of(weight.sizes()), " needs (", k, ", ", k, ")");
  }
  if (order.has_value()) {
    check_same_device(*order, "order", weight, "weight");
    check_dtype(*order, ScalarType::Long, "order", "it must be int64");
    STD_TORCH_CHECK(order->dim() == 1 && order->size(0) == k, "order has shape ", text_of(order->sizes()), ": weight ",
                    text_of(weight.sizes()), " needs one step per column");
  }
}

void check_permutation(const Tensor& order) {
  std::vector<bool> seen(static_cast<size_t>(order.numel()), false);
  for (int64_t step = 0; step < order.numel(); ++step) {
    const int64_t column = order.const_data_ptr<int64_t>()[step];
    const bool is_new = column >= 0 && column < order.numel() && !seen[static_cast<size_t>(column)];
    STD_TORCH_CHECK(is_new, "order[", step, "]=", column, " must name each of ", order.numel(), " columns once");
    seen[static_cast<size_t>(column)] = true;
  }
}

std::string not_finite_text(const char* name, int64_t position, const Tensor& t) {
  return name + position_text(position, t.sizes()) + " is nan or inf: only finite values can be quantized";
}

WeightView view_of(const CheckedWeight& w) {
  static const float none = 0.0f;  // of an empty weight: never read, but tells kernels that scales are float32
  WeightView view;
  view.packed = w.packed.const_data_ptr<uint8_t>();
  if (w.nested_absmax) {
    view.absmax_codes = w.absmax.const_data_ptr<uint8_t>();
    view.nested_absmax = w.nested_absmax->const_data_ptr<float>();
    view.nested_offset = w.nested_offset->const_data_ptr<float>();
  } else {
    view.absmax = w.n * w.k == 0 ? &none : w.absmax.const_data_ptr<float>();
  }
  view.n = w.n;
  view.k = w.k;
  view.block_shift = w.block_shift;
  view.quant_type = w.type;
  return view;
}

}  // namespace qlora::ops
