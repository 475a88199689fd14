// Symmetric INT4: the level of code c is (c - 8) / 7 times absmax, so code 8 is zero and codes 1 and 15 are +-absmax.
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
