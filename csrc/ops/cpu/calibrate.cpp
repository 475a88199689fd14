// The ops search_scales and quantize_with_feedback for the CPU: checks, allocation, parallel loops.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "format/half.h"
#include "ops/checks.h"
#include "ops/cpu/common.h"
#include "ops/cpu/scales.h"

namespace qlora::ops_cpu {
namespace {

constexpr int64_t kElementsPerTask = 1 << 13;

std::tuple<Tensor, Tensor, Tensor> search_scales(Tensor weight, Tensor importance, std::string quant_type,
                                                 int64_t block_size, bool double_quant) {
  const cpu::KernelTable& kernels = active_kernels();
  check_search_scales(weight, importance, block_size);
  const Tensor source = as_contiguous(weight), columns = as_contiguous(importance);
  check_importance(columns);
  const int64_t blocks = ceil_div(source.numel(), block_size);
  Tensor absmax = empty_cpu({blocks}, ScalarType::Float);
  cpu::SearchScalesParams p{};
  p.weight = source.const_data_ptr<float>();
  p.importance = columns.const_data_ptr<float>();
  p.n = source.size(0);
  p.k = source.size(1);
  p.block = block_size;
  p.quant_type = check_quant_type(quant_type);
  p.absmax = absmax.mutable_data_ptr<float>();
  FirstPosition bad;
  parallel(blocks, std::max<int64_t>(1, kElementsPerTask / block_size),
           [&](int64_t begin, int64_t end) { bad.report(kernels.search_scales(p, begin, end)); });
  STD_TORCH_CHECK(!bad.any(), not_finite_text("weight", bad.value(), source));
  return stored_scales(absmax, double_quant);
}

// Checks row i of a matrix up to column `last(i)`.
template <class Last>
void check_finite(const Tensor& t, const char* name, const Last& last) {
  const float* values = t.const_data_ptr<float>();
  const int64_t columns = t.size(1);
  FirstPosition bad;
  parallel(t.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = row * columns; i < row * columns + last(row); ++i)
        if ((bits_of(values[i]) & 0x7F800000u) == 0x7F800000u) return bad.report(i);
  });
  STD_TORCH_CHECK(!bad.any(), not_finite_text(name, bad.value(), t));
}

Tensor quantize_with_feedback(Tensor weight, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                              std::string quant_type, int64_t block_size, OptionalTensor feedback,
                              OptionalTensor order) {
  const cpu::KernelTable& kernels = active_kernels();
  check_feedback(weight, feedback, order);
  const Tensor source = as_contiguous(weight);
  const int64_t n = source.size(0), k = source.size(1);
  check_finite(source, "weight", [k](int64_t) { return k; });
  Tensor packed = empty_cpu({packed_bytes(n * k)}, ScalarType::Byte);
  const CheckedWeight w = check_weight(packed, absmax, nested_absmax, nested_offset, n, k, quant_type, block_size);
  cpu::FeedbackParams p{};
  p.weight = source.const_data_ptr<float>();
  p.scales = view_of(w);
  p.packed = packed.mutable_data_ptr<uint8_t>();
  Tensor factors = source, steps = source;  // keep contiguous copies alive
  if (feedback.has_value()) {
    factors = as_contiguous(*feedback);
    check_finite(factors, "feedback", [](int64_t row) { return row; });  // only what is read
    p.feedback = factors.const_data_ptr<float>();
  }
  if (order.has_value()) {
    steps = as_contiguous(*order);
    check_permutation(steps);
    p.order = steps.const_data_ptr<int64_t>();
  }
  if (k > 0)
    parallel(ceil_div(n, cpu::kFeedbackRows), 1, [&](int64_t begin, int64_t end) {
      kernels.quantize_with_feedback(p, begin, end, thread_scratch(kernels.feedback_scratch(k)));
    });
  return packed;
}

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("search_scales", TORCH_BOX(&qlora::ops_cpu::search_scales));
  m.impl("quantize_with_feedback", TORCH_BOX(&qlora::ops_cpu::quantize_with_feedback));
}
