// The 4-bit data types by name, the levels of their codes, and the NF4 thresholds that map normalised values to codes.
#pragma once

#include "format/common.h"
#include "format/fp4.h"
#include "format/int4.h"
#include "format/nf4.h"

namespace qlora {

enum class QuantType : int { kNf4 = 0, kFp4 = 1, kInt4 = 2 };

struct QuantTypeName {
  const char* name;
  QuantType type;
};
inline constexpr QuantTypeName kQuantTypes[3] = {
    {"nf4", QuantType::kNf4}, {"fp4", QuantType::kFp4}, {"int4", QuantType::kInt4}};

// Levels of the 16 codes. The dequantized value is level * absmax in float32, rounded once to the output type.
QLORA_INLINE constexpr const float* codebook(QuantType type) {
  return type == QuantType::kNf4 ? kNf4 : type == QuantType::kFp4 ? kFp4 : kInt4.level;
}

struct Nf4Thresholds {
  float value[15];
};
QLORA_INLINE constexpr Nf4Thresholds make_nf4_thresholds() {
  Nf4Thresholds t{};
  for (int i = 0; i < 15; ++i) t.value[i] = (kNf4[i] + kNf4[i + 1]) / 2.0f;
  return t;
}
// float32 midpoints between levels. The code of x is the number of thresholds below x, so a tie takes the lower code.
inline constexpr Nf4Thresholds kNf4Thresholds = make_nf4_thresholds();

}  // namespace qlora
