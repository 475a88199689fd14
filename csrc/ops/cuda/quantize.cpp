// The ops quantize, dequantize and quantization_error for CUDA: checks, allocation, launches.
#include "ops/cuda/ops.h"
#include "ops/cuda/runtime.h"
#include "ops/cuda/scales.h"

namespace qlora::ops_cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(Tensor weight, std::string quant_type, int64_t block_size,
                                                    bool double_quant, bool check_finite) {
  const QuantType type = check_quant_type(quant_type);
  check_block_size(block_size);
  const Tensor source = aligned(as_contiguous(weight));
  const int64_t numel = source.numel(), blocks = ceil_div(numel, block_size);
  const DType dtype = float_dtype(source.scalar_type(), "weight");
  const GpuScope scope(source, "quantize", {0, blocks, block_size, 0});
  Tensor packed = empty_like_device(source, {packed_bytes(numel)}, ScalarType::Byte);
  Tensor absmax = empty_like_device(source, {blocks}, ScalarType::Float);
  if (numel > 0) {
    const bool report_inf = double_quant && !check_finite;
    FirstPositions bad(source, 1);
    const cuda::QuantizeParams p{source.const_data_ptr(),
                                 dtype,
                                 numel,
                                 log2_exact(block_size),
                                 type,
                                 check_finite,
                                 packed.mutable_data_ptr<uint8_t>(),
                                 absmax.mutable_data_ptr<float>(),
                                 bad.data()};
    check(cuda::launch_quantize(p, scope.stream()), "quantize");
    if (check_finite || report_inf) {  // the only wait for the stream: an error must name its position
      const int64_t position = bad.values()[0];
      STD_TORCH_CHECK(position < 0 || !check_finite, "weight", position_text(position, source.sizes()),
                      " is nan or inf: only finite weights can be quantized (check_finite=False skips this check)");
      STD_TORCH_CHECK(position < 0, "block ", position / block_size,
                      " of the weight contains inf: with check_finite=False only double_quant=False can store it");
    }
  }
  const auto [scales, nested_absmax, nested_offset] = stored_scales(absmax, double_quant, scope.stream());
  return {packed, scales, nested_absmax, nested_offset};
}

Tensor dequantize(Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                  std::vector<int64_t> shape, std::string quant_type, int64_t block_size, ScalarType dtype) {
  const int64_t numel = checked_numel(shape);
  CheckedWeight w = check_weight(packed, absmax, nested_absmax, nested_offset, 1, numel, quant_type, block_size);
  const DType out_dtype = float_dtype(dtype, "dtype");
  const GpuScope scope(packed, "dequantize", {0, 1, numel, 0});
  Tensor out = torch::stable::new_empty(packed, {shape.data(), shape.size()}, dtype);
  if (numel > 0)
    check(cuda::launch_dequantize({device_view_of(w), 0, 1, numel, numel, out.mutable_data_ptr(), out_dtype},
                                  scope.stream()),
          "dequantize");
  return out;
}

Tensor quantization_error(Tensor weight, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                          OptionalTensor nested_offset, std::string quant_type, int64_t block_size) {
  const Tensor source = as_contiguous(weight);
  const DType dtype = float_dtype(source.scalar_type(), "weight");
  const int64_t numel = source.numel();
  check_same_device(packed, "packed", source, "weight");
  CheckedWeight w = check_weight(packed, absmax, nested_absmax, nested_offset, 1, numel, quant_type, block_size);
  const GpuScope scope(source, "quantization_error", {0, 1, numel, 0});
  const Tensor parts = empty_like_device(source, {cuda::kErrorParts, 3}, ScalarType::Double);
  Tensor out = empty_like_device(source, {3}, ScalarType::Double);
  const cuda::QuantizationErrorParams p{device_view_of(w), source.const_data_ptr(), dtype,
                                        parts.mutable_data_ptr<double>(), out.mutable_data_ptr<double>()};
  check(cuda::launch_quantization_error(p, scope.stream()), "quantization_error");
  return out;
}

}  // namespace qlora::ops_cuda
