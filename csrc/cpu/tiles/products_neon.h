// Multiplies tiles with NEON's bfloat16 products: bfmmla adds the product of 2 x 4 and 4 x 2 elements to 2 x 2 sums.
// See products.h.
//
// It adds two pairs of products one after the other. The sum of a pair, and its sum with the accumulator, are rounded
// to odd, by less than 2 u. So a product in a sum of K passes through at most K / 2 + 1 roundings, and the error is
// within the bound of K + 2 roundings by u (docs/concepts/numerics.md).
#pragma once

#include <arm_neon.h>

#include "cpu/tiles/tiles.h"

namespace qlora::cpu {
namespace {

// Empty: vector registers need no configuration.
struct TileScope {
  TileScope() {}
};

QLORA_INLINE float32x4_t join(float32x4_t a, float32x4_t b, bool upper) {
  const float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
  return vreinterpretq_f32_f64(upper ? vzip2q_f64(x, y) : vzip1q_f64(x, y));
}

// Multiplies eight rows of a row tile with eight columns of a column tile; the 4 x 4 registers of sums stay for all
// steps. Two neighbouring rows, and two neighbouring columns, become one operand: a zip for each, so that four products
// share eight zips with three others. More sums would not fit the 32 registers.
void multiply_block(const uint8_t* rows, const uint8_t* cols, int64_t steps, bool first, float* c) {
  float32x4_t sum[4][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const float *upper_row = c + 2 * i * 16 + 4 * j, *lower_row = upper_row + 16;
      const float32x4_t a = first ? vdupq_n_f32(0.0f) : vld1q_f32(upper_row);
      const float32x4_t b = first ? vdupq_n_f32(0.0f) : vld1q_f32(lower_row);
      sum[i][2 * j] = join(a, b, false);
      sum[i][2 * j + 1] = join(a, b, true);
    }
  for (int64_t s = 0; s < steps; ++s, rows += kTileBytes, cols += kTileBytes)
    for (int eight = 0; eight < 4; ++eight)  // elements of the reduction
#pragma GCC unroll 2
      for (int four = 0; four < 2; ++four) {
        const uint8_t* pairs = cols + (4 * eight + 2 * four) * 64;
        bfloat16x8_t columns[4];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const auto* p = reinterpret_cast<const uint32_t*>(pairs + 16 * j);
          const uint32x4_t a = vld1q_u32(p), b = vld1q_u32(p + 16);
          columns[2 * j] = vreinterpretq_bf16_u32(vzip1q_u32(a, b));
          columns[2 * j + 1] = vreinterpretq_bf16_u32(vzip2q_u32(a, b));
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const auto* p = reinterpret_cast<const float*>(rows + 2 * i * 64 + eight * 16);
          const auto operand = vreinterpretq_bf16_f32(join(vld1q_f32(p), vld1q_f32(p + 16), four == 1));
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) sum[i][j] = vbfmmlaq_f32(sum[i][j], operand, columns[j]);
        }
      }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* out = c + 2 * i * 16 + 4 * j;
      vst1q_f32(out, join(sum[i][2 * j], sum[i][2 * j + 1], false));
      vst1q_f32(out + 16, join(sum[i][2 * j], sum[i][2 * j + 1], true));
    }
}

// Documented in products.h.
template <int kRows, int kCols>
QLORA_INLINE void multiply(const uint8_t* rows, int64_t row_pitch, const uint8_t* cols, int64_t col_pitch,
                           int64_t steps, bool first, float* c, int64_t c_pitch) {
  for (int i = 0; i < 2 * kRows; ++i)
    for (int j = 0; j < 2 * kCols; ++j)
      multiply_block(rows + i / 2 * row_pitch + i % 2 * 8 * 64, cols + j / 2 * col_pitch + j % 2 * 8 * 4, steps, first,
                     c + i / 2 * c_pitch + i % 2 * 8 * 16 + j / 2 * 256 + j % 2 * 8);
}

}  // namespace
}  // namespace qlora::cpu
