// Double quantization in plain C++ for every ISA; fast enough because it handles one scale per block, not every weight.
#include "cpu/quantize/double_quantize.h"

#include <algorithm>
#include <cmath>

#include "format/dynamic_map.h"
#include "format/layout.h"

namespace qlora::cpu {

float mean(const float* values, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return count > 0 ? static_cast<float>(sum / static_cast<double>(count)) : 0.0f;
}

void double_quantize(const float* absmax, int64_t blocks, float offset, uint8_t* codes, float* nested_absmax,
                     int64_t begin, int64_t end) {
  const float* thresholds = kDynamicMap.threshold;
  for (int64_t nested = begin; nested < end; ++nested) {
    const int64_t first = nested * kNestedBlock, last = std::min(first + kNestedBlock, blocks);
    float largest = 0.0f;
    for (int64_t b = first; b < last; ++b) {
      const float centred = std::fabs(absmax[b] - offset);
      largest = centred > largest ? centred : largest;
    }
    nested_absmax[nested] = largest;
    const float reciprocal = 1.0f / largest;
    const bool usable = std::isfinite(reciprocal);  // false if all scales are equal; then every code stands for zero
    for (int64_t b = first; b < last; ++b) {
      const float centred = absmax[b] - offset;
      const float x = usable ? centred * reciprocal : largest > 0.0f ? centred / largest : 0.0f;
      codes[b] = static_cast<uint8_t>(std::lower_bound(thresholds, thresholds + kDynamicMapSize - 1, x) - thresholds);
    }
  }
}

}  // namespace qlora::cpu
