// The ops quantize, dequantize and quantization_error for CUDA: checks, allocation, launches.
#include "ops/cuda/ops.h"
#include "ops/cuda/runtime.h"

namespace qlora::ops_cuda {

namespace {

// Copies one number from the device; waits for the stream.
int64_t value_of(const Tensor& t) {
  const Tensor on_cpu = torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  return *on_cpu.const_data_ptr<int64_t>();
}

}  // namespace

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
  const auto none = [&] { return empty_like_device(source, {0}, ScalarType::Float); };
  if (numel > 0) {
    const bool report_inf = double_quant && !check_finite;
    Tensor bad = torch::stable::new_zeros(source, {1}, ScalarType::Long);
    const cuda::QuantizeParams p{source.const_data_ptr(),
                                 dtype,
                                 numel,
                                 log2_exact(block_size),
                                 type,
                                 check_finite,
                                 packed.mutable_data_ptr<uint8_t>(),
                                 absmax.mutable_data_ptr<float>(),
                                 reinterpret_cast<unsigned long long*>(bad.mutable_data_ptr<int64_t>())};
    check(cuda::launch_quantize(p, scope.stream()), "quantize");
    if (check_finite || report_inf) {  // the only wait for the stream: an error must name its position
      const auto seen = static_cast<uint64_t>(value_of(bad));
      const auto position = static_cast<int64_t>(0x8000000000000000ull - seen);
      STD_TORCH_CHECK(seen == 0 || !check_finite, "weight", position_text(position, source.sizes()),
                      " is nan or inf: only finite weights can be quantized (check_finite=False skips this check)");
      STD_TORCH_CHECK(seen == 0, "block ", position / block_size,
                      " of the weight contains inf: with check_finite=False only double_quant=False can store it");
    }
  }
  if (!double_quant) return {packed, absmax, none(), none()};
  const int64_t nested_blocks = ceil_div(blocks, kNestedBlock);
  Tensor codes = empty_like_device(source, {blocks}, ScalarType::Byte);
  Tensor nested_absmax = empty_like_device(source, {nested_blocks}, ScalarType::Float);
  Tensor nested_offset = torch::stable::new_zeros(source, {1}, ScalarType::Float);
  if (blocks > 0) {
    const Tensor parts = empty_like_device(source, {cuda::kMeanParts}, ScalarType::Double);
    const cuda::DoubleQuantizeParams p{
        absmax.const_data_ptr<float>(),          blocks,
        parts.mutable_data_ptr<double>(),        codes.mutable_data_ptr<uint8_t>(),
        nested_absmax.mutable_data_ptr<float>(), nested_offset.mutable_data_ptr<float>()};
    check(cuda::launch_double_quantize(p, scope.stream()), "double_quantize");
  }
  return {packed, codes, nested_absmax, nested_offset};
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
