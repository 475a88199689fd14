// Layout of a 4-bit weight: nibble order, block sizes, scales. Bit-compatible with bitsandbytes' 4-bit format.
#pragma once

#include "format/common.h"

namespace qlora {

inline constexpr int kMinBlockSize = 32;
inline constexpr int kMaxBlockSize = 4096;
inline constexpr int kNestedBlock = 256;  // absmax values per nested absmax
inline constexpr int kNestedBlockShift = 8;

// Powers of two from 32 to 4096.
QLORA_INLINE constexpr bool is_block_size(int64_t block) {
  return block >= kMinBlockSize && block <= kMaxBlockSize && (block & (block - 1)) == 0;
}
QLORA_INLINE constexpr int log2_exact(int64_t power_of_two) {
  int shift = 0;
  while ((int64_t{1} << shift) < power_of_two) ++shift;
  return shift;
}

// Flat element 2i is the HIGH nibble of byte i, element 2i + 1 the low one.
QLORA_INLINE constexpr int64_t packed_bytes(int64_t numel) { return (numel + 1) / 2; }
QLORA_INLINE constexpr uint8_t nibble_at(const uint8_t* packed, int64_t element) {
  const uint8_t byte = packed[element >> 1];
  return (element & 1) ? (byte & 0xF) : (byte >> 4);
}
// A little-endian 32-bit word of packed bytes holds elements 0-7; nibble j (bits 4j … 4j+3) is element j ^ 1.
QLORA_INLINE constexpr int element_of_nibble(int nibble) { return nibble ^ 1; }

// The scales of one packed weight; exactly one of absmax and absmax_codes is set.
struct Scales {
  const float* absmax = nullptr;          // [blocks]
  const uint8_t* absmax_codes = nullptr;  // [blocks], double quantization: codes of kDynamicMap
  const float* nested_absmax = nullptr;   // [ceil(blocks / 256)]
  float nested_offset = 0.0f;
  const float* dynamic_map = nullptr;  // [256], code -> value
};

// Product and sum are rounded separately, without a fused multiply-add, as in bitsandbytes.
QLORA_INLINE float scale_of_block(const Scales& s, int64_t block) {
  if (s.absmax != nullptr) return s.absmax[block];
  const float product = s.dynamic_map[s.absmax_codes[block]] * s.nested_absmax[block >> kNestedBlockShift];
  return product + s.nested_offset;
}

// A packed matrix [n, k], flattened row-major and then cut into blocks.
struct PackedWeight {
  const uint8_t* packed = nullptr;  // [ceil(n * k / 2)]
  Scales scales;
  const float* levels = nullptr;  // [16]
  int64_t n = 0;                  // out features
  int64_t k = 0;                  // in features
  int block_shift = 0;            // log2(weights per absmax)
};

// Scales and zero points of an integer matrix, whose elements stand for value * scale + zero_point. A stride of 0 means
// one value for all channels or for all groups.
struct AffineGrid {
  const float* scale = nullptr;
  const float* zero_point = nullptr;
  int64_t group = 1;           // matrix rows per grid row
  int64_t group_stride = 0;    // elements between grid rows
  int64_t channel_stride = 0;  // elements between channels
};

}  // namespace qlora
