// bfloat16 and IEEE float16 as raw 16-bit patterns. Conversions round to nearest even, bit-equal to the hardware's.
#pragma once

#include <cstring>

#include "format/common.h"

namespace qlora {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

QLORA_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
QLORA_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

QLORA_INLINE float to_float(float x) { return x; }
QLORA_INLINE float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
QLORA_INLINE float to_float(fp16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));  // inf, nan
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + ((127u - 15u) << 23)));  // normal
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
}

QLORA_INLINE void assign(float& out, float x) { out = x; }
QLORA_INLINE void assign(bf16& out, float x) {
  const uint32_t u = bits_of(x);
  const bool is_nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  out.bits = static_cast<uint16_t>(is_nan ? (u >> 16) | 0x40u : (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}
QLORA_INLINE void assign(fp16& out, float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {  // nan: made quiet, payload kept
    out.bits = static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x1FFu));
  } else if (magnitude >= 0x477FF000u) {  // rounds to more than 65504, the largest float16: inf
    out.bits = static_cast<uint16_t>(sign | 0x7C00u);
  } else if (magnitude < 0x38800000u) {  // subnormal or zero: adding 0.5 rounds to a multiple of 2^-24, ties to even
    out.bits = static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
  } else {
    const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
    out.bits = static_cast<uint16_t>(sign | ((rounded - ((127u - 15u) << 23)) >> 13));
  }
}

template <class T>
QLORA_INLINE T from_float(float x) {
  T out;
  assign(out, x);
  return out;
}

}  // namespace qlora
