// Symmetric INT4: code c stands for (c - 8) / 7 * absmax, so code 8 is zero, code 1 is -absmax and code 15 is absmax.
#pragma once

#include "format/common.h"

namespace qlora {

inline constexpr float kInt4Steps = 7.0f;  // steps from zero to absmax
inline constexpr int kInt4Zero = 8;

struct Int4Levels {
  float level[16];
};

QLORA_INLINE constexpr Int4Levels make_int4_levels() {
  Int4Levels t{};
  for (int c = 0; c < 16; ++c) t.level[c] = static_cast<float>(c - kInt4Zero) / kInt4Steps;
  return t;
}

inline constexpr Int4Levels kInt4 = make_int4_levels();

}  // namespace qlora
