// The ops search_scales and quantize_with_feedback for CUDA: checks, allocation, launches.
#include "ops/cuda/ops.h"
#include "ops/cuda/runtime.h"
#include "ops/cuda/scales.h"

namespace qlora::ops_cuda {

std::tuple<Tensor, Tensor, Tensor> search_scales(Tensor weight, Tensor importance, std::string quant_type,
                                                 int64_t block_size, bool double_quant) {
  check_search_scales(weight, importance, block_size);
  const QuantType type = check_quant_type(quant_type);
  const Tensor source = as_contiguous(weight), columns = as_contiguous(importance);
  check_importance(torch::stable::to(columns, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  const int64_t blocks = ceil_div(source.numel(), block_size);
  const GpuScope scope(source, "search_scales", {0, blocks, block_size, 0});
  Tensor absmax = empty_like_device(source, {blocks}, ScalarType::Float);
  if (blocks > 0) {
    FirstPositions bad(source, 1);
    const cuda::SearchScalesParams p{source.const_data_ptr<float>(),
                                     columns.const_data_ptr<float>(),
                                     source.size(0),
                                     source.size(1),
                                     log2_exact(block_size),
                                     type,
                                     absmax.mutable_data_ptr<float>(),
                                     bad.data()};
    check(cuda::launch_search_scales(p, scope.stream()), "search_scales");
    const int64_t position = bad.values()[0];
    STD_TORCH_CHECK(position < 0, not_finite_text("weight", position, source));
  }
  return stored_scales(absmax, double_quant, scope.stream());
}

Tensor quantize_with_feedback(Tensor weight, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                              std::string quant_type, int64_t block_size, OptionalTensor feedback,
                              OptionalTensor order) {
  check_feedback(weight, feedback, order);
  const Tensor source = as_contiguous(weight);
  const int64_t n = source.size(0), k = source.size(1);
  const GpuScope scope(source, "quantize_with_feedback", {0, n, k, 0});
  Tensor packed = empty_like_device(source, {packed_bytes(n * k)}, ScalarType::Byte);
  const CheckedWeight w = check_weight(packed, absmax, nested_absmax, nested_offset, n, k, quant_type, block_size);
  Tensor factors = source, steps = source;  // keep contiguous copies alive
  if (feedback.has_value()) factors = as_contiguous(*feedback);
  if (order.has_value()) {
    steps = as_contiguous(*order);
    check_permutation(torch::stable::to(steps, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  }
  if (n * k == 0) return packed;
  const Tensor errors =
      empty_like_device(source, {k, ceil_div(n, cuda::kFeedbackRows) * cuda::kFeedbackRows}, ScalarType::Float);
  const Tensor codes = empty_like_device(source, {n, k}, ScalarType::Byte);
  FirstPositions bad(source, 2);
  const cuda::FeedbackParams p{source.const_data_ptr<float>(),
                               view_of(w),
                               feedback.has_value() ? factors.const_data_ptr<float>() : nullptr,
                               order.has_value() ? steps.const_data_ptr<int64_t>() : nullptr,
                               errors.mutable_data_ptr<float>(),
                               codes.mutable_data_ptr<uint8_t>(),
                               packed.mutable_data_ptr<uint8_t>(),
                               bad.data()};
  check(cuda::launch_quantize_with_feedback(p, scope.stream()), "quantize_with_feedback");
  const std::vector<int64_t> positions = bad.values();
  STD_TORCH_CHECK(positions[0] < 0, not_finite_text("weight", positions[0], source));
  STD_TORCH_CHECK(positions[1] < 0, not_finite_text("feedback", positions[1], factors));
  return packed;
}

}  // namespace qlora::ops_cuda
