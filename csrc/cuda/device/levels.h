// Levels in 16 bit, for the tensor cores. Rounding the levels themselves would cost accuracy; rounded after a factor
// that was chosen for it (and undone in the float32 scale) they cost half of what torch's rounding of each dequantized
// weight does: root mean square error 0.49 of torch's in bfloat16, 0.41 in float16 (docs/kernels.md).
#pragma once

#include "format/codebook.h"
#include "format/dtype.h"

namespace qlora::cuda {

// INT4 and FP4 become small integers, which 16 bits hold exactly. NF4: the best of 4096 factors from 1 to 2 for normal
// weights in blocks of 64; tests/ops/test_levels.py recomputes what they achieve.
constexpr float level_multiplier(QuantType type, DType dtype) {
  if (type == QuantType::kInt4) return kInt4Steps;
  if (type == QuantType::kFp4) return 12.0f;
  return dtype == DType::kBFloat16 ? 1.436767578125f : 1.3662109375f;
}

}  // namespace qlora::cuda
