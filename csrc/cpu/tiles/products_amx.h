// Multiplies tiles with AMX: configures its registers and computes up to four tiles of results. See products.h.
#pragma once

#include <immintrin.h>

#include "cpu/tiles/tiles.h"

namespace qlora::cpu {
namespace {

// Configures eight tiles of 16 rows of 64 bytes for its lifetime. The configuration belongs to the thread and is not
// kept longer, because other libraries set their own.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    const Config config;
    asm volatile("" ::"m"(config) : "memory");  // GCC 12 assumes that _tile_loadconfig reads only eight bytes
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// Documented in products.h.
template <int kRows, int kCols>
QLORA_INLINE void multiply(const uint8_t* rows, int64_t row_pitch, const uint8_t* cols, int64_t col_pitch,
                           int64_t steps, bool first, float* c, int64_t c_pitch) {
  static_assert(kRows <= 2 && kCols <= 2, "four tiles of results, two of each operand");
  float *c01 = c + 256, *c10 = c + c_pitch, *c11 = c + c_pitch + 256;
  asm volatile("" ::: "memory");  // GCC 12 does not know that its tile loads read memory: stores come before
  if (first) {
    _tile_zero(0);
    if constexpr (kCols == 2) _tile_zero(1);
    if constexpr (kRows == 2) _tile_zero(2);
    if constexpr (kRows == 2 && kCols == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, c, 64);
    if constexpr (kCols == 2) _tile_loadd(1, c01, 64);
    if constexpr (kRows == 2) _tile_loadd(2, c10, 64);
    if constexpr (kRows == 2 && kCols == 2) _tile_loadd(3, c11, 64);
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, rows + s * kTileBytes, 64);
    _tile_loadd(6, cols + s * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kCols == 2) {
      _tile_loadd(7, cols + col_pitch + s * kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, rows + row_pitch + s * kTileBytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kCols == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 64);
  if constexpr (kCols == 2) _tile_stored(1, c01, 64);
  if constexpr (kRows == 2) _tile_stored(2, c10, 64);
  if constexpr (kRows == 2 && kCols == 2) _tile_stored(3, c11, 64);
}

}  // namespace
}  // namespace qlora::cpu
