// The candidates of the scale search: factors times a block's largest absolute value.
#pragma once

#include "format/common.h"

namespace qlora {

inline constexpr int kScaleCandidates = 32;  // a warp, two vectors of AVX-512

// A factor below one clips the largest weights and gives finer steps elsewhere. The first factor wins ties.
struct ScaleFactors {
  float value[kScaleCandidates];
};
inline constexpr ScaleFactors make_scale_factors() {
  ScaleFactors f{{1.0f}};
  int percent = 110;  // 1.10, 1.08, … 0.48, without 1.00, which comes first
  for (int i = 1; i < kScaleCandidates; ++i, percent -= 2) {
    if (percent == 100) percent -= 2;
    f.value[i] = static_cast<float>(percent) / 100.0f;
  }
  return f;
}
inline constexpr ScaleFactors kScaleFactors = make_scale_factors();

}  // namespace qlora
