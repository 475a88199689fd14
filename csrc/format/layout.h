// Layout of a 4-bit weight: nibble order, block sizes, scales. Bit-compatible with bitsandbytes' 4-bit format.
#pragma once

#include "format/codebook.h"
#include "format/common.h"
#include "format/dynamic_map.h"

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

// A packed matrix [n, k], flattened row-major and then cut into blocks; on a GPU, pointers are to its memory. Exactly
// one of absmax and absmax_codes is set.
struct WeightView {
  const uint8_t* packed = nullptr;        // [ceil(n * k / 2)]
  const float* absmax = nullptr;          // [blocks]
  const uint8_t* absmax_codes = nullptr;  // [blocks], double quantization: codes of kDynamicMap
  const float* nested_absmax = nullptr;   // [ceil(blocks / 256)]
  const float* nested_offset = nullptr;   // [1]
  int64_t n = 0;                          // out features
  int64_t k = 0;                          // in features
  int block_shift = 0;                    // log2(weights per absmax)
  QuantType quant_type = QuantType::kNf4;
};

// Weight `i` of a stack of equal weights [count, n, k], each quantized on its own; `stack` is the view of the first
// one.
QLORA_INLINE constexpr WeightView weight_of_stack(const WeightView& stack, int64_t i) {
  const int64_t numel = stack.n * stack.k, blocks = ceil_div(numel, int64_t{1} << stack.block_shift);
  WeightView w = stack;
  w.packed += i * packed_bytes(numel);
  if (w.absmax != nullptr) w.absmax += i * blocks;
  if (w.absmax_codes != nullptr) {
    w.absmax_codes += i * blocks;
    w.nested_absmax += i * ceil_div(blocks, kNestedBlock);
    w.nested_offset += i;
  }
  return w;
}

// The scale of a block, on the CPU. Product and sum are rounded separately, without a fused multiply-add, as in
// bitsandbytes.
static inline float scale_of_block(const WeightView& w, int64_t block) {
  if (w.absmax != nullptr) return w.absmax[block];
  const float product = kDynamicMap.value[w.absmax_codes[block]] * w.nested_absmax[block >> kNestedBlockShift];
  return product + *w.nested_offset;
}
// The level of an element, on the CPU.
static inline float level_of_element(const WeightView& w, int64_t element) {
  return codebook(w.quant_type)[nibble_at(w.packed, element)];
}

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
