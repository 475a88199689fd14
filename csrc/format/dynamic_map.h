// The signed 8-bit dynamic map that stores double-quantized scales (Dettmers 2015, "8-Bit Approximations for
// Parallelism in Deep Learning"): per decade 10^-6 … 10^0 a linear grid that doubles in density, mirrored, plus 0
// and 1.
#pragma once

#include "format/common.h"

namespace qlora {

inline constexpr int kDynamicMapSize = 256;
inline constexpr int kDynamicMapDecades = 7;

struct DynamicMap {
  float value[kDynamicMapSize];          // ascending
  float threshold[kDynamicMapSize - 1];  // fp32 midpoints; code = number of thresholds below x
};

// torch.linspace(0.1, 1, count) in float32: upward from the start in the first half, downward from the end in the
// second, each point rounded once from the exact product, as torch's vectorized kernel does with a fused multiply-add.
QLORA_INLINE constexpr float linspace_tenth_to_one(int i, int count) {
  const float first = 0.1f, last = 1.0f;
  const float step = (last - first) / static_cast<float>(count - 1);
  if (i < count / 2) return static_cast<float>(static_cast<double>(first) + static_cast<double>(step) * i);
  return static_cast<float>(static_cast<double>(last) - static_cast<double>(step) * (count - 1 - i));
}

QLORA_INLINE constexpr DynamicMap make_dynamic_map() {
  DynamicMap map{};
  int size = 0;
  double decade = 1e-6;
  const double decades[kDynamicMapDecades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0};
  for (int d = 0; d < kDynamicMapDecades; ++d) {
    decade = decades[d];
    const int points = (1 << d) + 1;
    for (int i = 0; i + 1 < points; ++i) {
      const float mean = (linspace_tenth_to_one(i, points) + linspace_tenth_to_one(i + 1, points)) / 2.0f;
      const float scaled = static_cast<float>(decade) * mean;
      map.value[size++] = scaled;
      map.value[size++] = -scaled;
    }
  }
  map.value[size++] = 0.0f;
  map.value[size++] = 1.0f;
  for (int i = 1; i < size; ++i) {  // insertion sort: runs at compile time
    const float v = map.value[i];
    int j = i;
    for (; j > 0 && map.value[j - 1] > v; --j) map.value[j] = map.value[j - 1];
    map.value[j] = v;
  }
  for (int i = 0; i + 1 < size; ++i) map.threshold[i] = (map.value[i] + map.value[i + 1]) / 2.0f;
  return map;
}

inline constexpr DynamicMap kDynamicMap = make_dynamic_map();

}  // namespace qlora
