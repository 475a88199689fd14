// Scales numbers into the range of float16 by a power of two that depends on the largest magnitude. Kernels find that
// magnitude on the device; the host never reads it.
#pragma once

#include "cuda/device/ptx.cuh"

namespace qlora::cuda {

// The larger of two magnitudes, as the bits of a float; inf and nan count as larger than every number.
QLORA_DEVICE uint32_t larger_magnitude(uint32_t bits, float value) {
  const uint32_t other = bits_of(value) & 0x7FFFFFFFu;
  return bits > other ? bits : other;
}

// Raises *largest to the largest magnitude of the warp. All lanes must call it.
QLORA_DEVICE void note_largest(unsigned long long* largest, uint32_t bits) {
  for (int mask = 16; mask > 0; mask /= 2) bits = larger_magnitude(bits, float_of(ptx::shuffle_xor(bits, mask)));
  if (ptx::lane() == 0) ptx::atomic_max(largest, bits);
}

// The factor 2^e, |e| <= 100, that brings magnitudes up to `bound` below 2^15; 1 if `bound` is 0, inf or nan.
QLORA_DEVICE float to_half_range(float bound) {
  const int exponent = static_cast<int>(bits_of(bound) >> 23 & 0xFFu);
  if (exponent == 0xFF || bound == 0.0f) return 1.0f;
  const int shift = 127 + 14 - exponent;
  return float_of(static_cast<uint32_t>(127 + (shift < -100 ? -100 : shift > 100 ? 100 : shift)) << 23);
}

}  // namespace qlora::cuda
