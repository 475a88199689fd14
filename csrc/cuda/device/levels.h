// Factors for the 16-bit levels of the tensor cores. Rounding the levels directly would cost accuracy. Multiplied by a
// suitable factor before rounding, which the float32 scale undoes, their root mean square error is 0.49 times that of
// torch in bfloat16 and 0.41 times in float16; torch rounds each dequantized weight (docs/notes/cuda-kernels.md).
#pragma once

#include "format/codebook.h"
#include "format/dtype.h"

namespace qlora::cuda {

// INT4 and FP4 levels become small integers or 0.0625, which 16 bits hold exactly. The NF4 factors are the
// best of 4096 factors from 1 to 2 for normal weights in blocks of 64; tests/ops/test_levels.py recomputes the errors.
constexpr float level_multiplier(QuantType type, DType dtype) {
  if (type == QuantType::kInt4) return kInt4Steps;
  if (type == QuantType::kFp4) return 12.0f;
  return dtype == DType::kBFloat16 ? 1.436767578125f : 1.3662109375f;
}

}  // namespace qlora::cuda
