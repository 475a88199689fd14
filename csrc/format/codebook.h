// The 4-bit data types: one struct of traits for each, from which tables, names, messages and dispatch derive.
#pragma once

#include "format/common.h"
#include "format/dtype.h"
#include "format/fp4.h"
#include "format/int4.h"
#include "format/nf4.h"

namespace qlora {

inline constexpr int kLevels = 16;

enum class QuantType : int { kNf4 = 0, kFp4 = 1, kInt4 = 2 };
inline constexpr int kQuantTypeCount = 3;

// float32 midpoints between ascending levels. The code of x is the number of thresholds below x, so a tie takes the
// lower code.
struct Thresholds {
  float value[kLevels - 1];
};
QLORA_INLINE constexpr Thresholds midpoints(const float* levels) {
  Thresholds t{};
  for (int i = 0; i + 1 < kLevels; ++i) t.value[i] = (levels[i] + levels[i + 1]) / 2.0f;
  return t;
}
inline constexpr Thresholds kNf4Thresholds = midpoints(kNf4);

// The traits of a type:
//   kName            what users write
//   kTable           the levels of the 16 codes; a dequantized value is level * absmax in float32, rounded once
//   kAscends         whether the levels ascend. Codes are then found by kThresholds, midpoints() of the levels;
//                    otherwise another way, which quantize_impl.h, quantize.cu and both references have to know
//   kInBitsandbytes  whether that library has the type, with these levels
//   k…Multiplier     tensor cores take 16-bit levels; rounded times this factor, which the float32 scale undoes, they
//                    are closest to the exact ones (tests/ops/test_levels.py)
template <QuantType>
struct Format;

template <>
struct Format<QuantType::kNf4> {
  static constexpr const char* kName = "nf4";
  static constexpr const float* kTable = kNf4;
  static constexpr bool kAscends = true;
  static constexpr const float* kThresholds = kNf4Thresholds.value;
  static constexpr bool kInBitsandbytes = true;
  // The best of 4096 factors from 1 to 2 for normal weights in blocks of 64.
  static constexpr float kBFloat16Multiplier = 1.436767578125f, kFloat16Multiplier = 1.3662109375f;
};

template <>
struct Format<QuantType::kFp4> {
  static constexpr const char* kName = "fp4";
  static constexpr const float* kTable = kFp4;
  static constexpr bool kAscends = false;
  static constexpr bool kInBitsandbytes = true;
  // small integers and 0.0625, which 16 bits hold exactly
  static constexpr float kBFloat16Multiplier = 12.0f, kFloat16Multiplier = 12.0f;
};

template <>
struct Format<QuantType::kInt4> {
  static constexpr const char* kName = "int4";
  static constexpr const float* kTable = kInt4.level;
  static constexpr bool kAscends = false;
  static constexpr bool kInBitsandbytes = false;
  static constexpr float kBFloat16Multiplier = kInt4Steps, kFloat16Multiplier = kInt4Steps;  // integers
};

template <QuantType kType>
struct QuantTypeConstant {
  static constexpr QuantType value = kType;
};

// Calls f with the QuantTypeConstant of `type`: the one switch over types.
template <class F>
static constexpr auto visit_quant_type(QuantType type, const F& f) {
  switch (type) {
    case QuantType::kFp4:
      return f(QuantTypeConstant<QuantType::kFp4>{});
    case QuantType::kInt4:
      return f(QuantTypeConstant<QuantType::kInt4>{});
    default:
      return f(QuantTypeConstant<QuantType::kNf4>{});
  }
}

static constexpr const char* quant_type_name(QuantType type) {
  return visit_quant_type(type, [](auto t) { return Format<decltype(t)::value>::kName; });
}
static constexpr const float* codebook(QuantType type) {
  return visit_quant_type(type, [](auto t) { return Format<decltype(t)::value>::kTable; });
}
static constexpr bool in_bitsandbytes(QuantType type) {
  return visit_quant_type(type, [](auto t) { return Format<decltype(t)::value>::kInBitsandbytes; });
}
static constexpr float level_multiplier(QuantType type, DType dtype) {
  return visit_quant_type(type, [dtype](auto t) {
    using F = Format<decltype(t)::value>;
    return dtype == DType::kBFloat16 ? F::kBFloat16Multiplier : F::kFloat16Multiplier;
  });
}

}  // namespace qlora
