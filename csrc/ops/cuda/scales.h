// Stores the float32 scales of a weight on a GPU, and reads the positions of nan and inf that kernels report.
#pragma once

#include <tuple>
#include <vector>

#include "ops/cuda/runtime.h"

namespace qlora::ops_cuda {

// (absmax, nested_absmax, nested_offset) of finite scales [blocks].
inline std::tuple<Tensor, Tensor, Tensor> stored_scales(const Tensor& absmax, bool double_quant, cudaStream_t stream) {
  const int64_t blocks = absmax.numel();
  const auto none = [&] { return empty_like_device(absmax, {0}, ScalarType::Float); };
  if (!double_quant) return {absmax, none(), none()};
  const int64_t nested_blocks = ceil_div(blocks, kNestedBlock);
  Tensor codes = empty_like_device(absmax, {blocks}, ScalarType::Byte);
  Tensor nested_absmax = empty_like_device(absmax, {nested_blocks}, ScalarType::Float);
  Tensor nested_offset = torch::stable::new_zeros(absmax, {1}, ScalarType::Float);
  if (blocks > 0) {
    const Tensor parts = empty_like_device(absmax, {cuda::kMeanParts}, ScalarType::Double);
    const cuda::DoubleQuantizeParams p{
        absmax.const_data_ptr<float>(),          blocks,
        parts.mutable_data_ptr<double>(),        codes.mutable_data_ptr<uint8_t>(),
        nested_absmax.mutable_data_ptr<float>(), nested_offset.mutable_data_ptr<float>()};
    check(cuda::launch_double_quantize(p, stream), "double_quantize");
  }
  return {codes, nested_absmax, nested_offset};
}

// The first position of nan or inf in each of several tensors, as kernels report them (QuantizeParams::bad).
class FirstPositions {
 public:
  FirstPositions(const Tensor& like, int64_t count)
      : reported_(torch::stable::new_zeros(like, {count}, ScalarType::Long)) {}
  unsigned long long* data() { return reinterpret_cast<unsigned long long*>(reported_.mutable_data_ptr<int64_t>()); }
  // Waits for the stream. -1 where nothing was reported.
  std::vector<int64_t> values() const {
    const Tensor on_cpu = torch::stable::to(reported_, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < on_cpu.numel(); ++i) {
      const auto seen = static_cast<uint64_t>(on_cpu.const_data_ptr<int64_t>()[i]);
      positions.push_back(seen == 0 ? -1 : static_cast<int64_t>(0x8000000000000000ull - seen));
    }
    return positions;
  }

 private:
  Tensor reported_;
};

}  // namespace qlora::ops_cuda
