// Multiplies tiles with AVX512-BF16: vdpbf16ps adds two products to each of 16 sums. See products.h.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/tiles/tiles.h"

namespace qlora::cpu {
namespace {

// Empty: vector registers need no configuration.
struct TileScope {
  TileScope() {}
};

// Multiplies kHeight rows of a row tile with kCols column tiles; kHeight * kCols vectors of sums stay in registers for
// all steps. Each word of a row holds two elements of the reduction; it is broadcast to all lanes and multiplied with
// the matching pair of elements of 16 columns.
template <int kHeight, int kCols>
QLORA_INLINE void multiply_strip(const uint8_t* rows, const uint8_t* cols, int64_t col_pitch, int64_t steps, bool first,
                                 float* c) {
  __m512 sum[kHeight][kCols];
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kCols; ++j) sum[i][j] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + j * 256 + i * 16);
  for (int64_t s = 0; s < steps; ++s, rows += kTileBytes, cols += kTileBytes) {
    for (int pair = 0; pair < kTile; ++pair) {
      __m512bh columns[kCols];
#pragma GCC unroll 2
      for (int j = 0; j < kCols; ++j)
        columns[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(cols + j * col_pitch + pair * 64));
#pragma GCC unroll 16
      for (int i = 0; i < kHeight; ++i) {
        int32_t word;
        std::memcpy(&word, rows + i * 64 + pair * 4, sizeof word);
        const auto spread = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
#pragma GCC unroll 2
        for (int j = 0; j < kCols; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], spread, columns[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kCols; ++j) _mm512_storeu_ps(c + j * 256 + i * 16, sum[i][j]);
}

// Documented in products.h. It keeps 16 vectors of sums: eight rows of two column tiles, or 16 rows of one. More
// would not hide the latency of four to six cycles better, and 32 would not fit into the 32 registers.
template <int kRows, int kCols>
QLORA_INLINE void multiply(const uint8_t* rows, int64_t row_pitch, const uint8_t* cols, int64_t col_pitch,
                           int64_t steps, bool first, float* c, int64_t c_pitch) {
  constexpr int kHeight = 16 / kCols;
  for (int tile = 0; tile < kRows; ++tile)
    for (int row = 0; row < kTile; row += kHeight)
      multiply_strip<kHeight, kCols>(rows + tile * row_pitch + row * 64, cols, col_pitch, steps, first,
                                     c + tile * c_pitch + row * 16);
}

}  // namespace
}  // namespace qlora::cpu
