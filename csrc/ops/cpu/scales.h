// Stores the float32 scales of a weight: as they are, or double-quantized.
#pragma once

#include <atomic>
#include <limits>
#include <tuple>

#include "cpu/quantize/double_quantize.h"
#include "ops/cpu/common.h"

namespace qlora::ops_cpu {

// (absmax, nested_absmax, nested_offset) of finite scales [blocks].
inline std::tuple<Tensor, Tensor, Tensor> stored_scales(const Tensor& absmax, bool double_quant) {
  if (!double_quant) return {absmax, empty_cpu({0}, ScalarType::Float), empty_cpu({0}, ScalarType::Float)};
  const float* scales = absmax.const_data_ptr<float>();
  const int64_t blocks = absmax.numel(), nested_blocks = ceil_div(blocks, kNestedBlock);
  Tensor codes = empty_cpu({blocks}, ScalarType::Byte);
  Tensor nested_absmax = empty_cpu({nested_blocks}, ScalarType::Float);
  Tensor nested_offset = empty_cpu({1}, ScalarType::Float);
  const float offset = cpu::mean(scales, blocks);
  *nested_offset.mutable_data_ptr<float>() = offset;
  uint8_t* codes_data = codes.mutable_data_ptr<uint8_t>();
  float* nested_data = nested_absmax.mutable_data_ptr<float>();
  parallel(nested_blocks, 16, [&](int64_t begin, int64_t end) {
    cpu::double_quantize(scales, blocks, offset, codes_data, nested_data, begin, end);
  });
  return {codes, nested_absmax, nested_offset};
}

// Keeps the smallest position that threads report, so that a message does not depend on their number.
class FirstPosition {
 public:
  void report(int64_t position) {
    if (position < 0) return;
    int64_t seen = first_.load();
    while (position < seen && !first_.compare_exchange_weak(seen, position)) {
    }
  }
  bool any() const { return first_.load() != kNone; }
  int64_t value() const { return first_.load(); }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_{kNone};
};

}  // namespace qlora::ops_cpu
