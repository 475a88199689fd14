// Multiplies tiles with the instructions that the translation unit is compiled for. Each implementation defines
//   TileScope: must exist while tiles are multiplied, and
//   multiply<kRows, kCols>(rows, row_pitch, cols, col_pitch, steps, first, c, c_pitch):
//     c[i][j] += sum over steps of row tile i times column tile j, for up to 2 x 2 tiles of results, or = if `first`.
//     The steps of a row or column tile are adjacent; a pitch is the bytes from one row (column) of tiles to the next.
//     c: [kRows][c_pitch / 256] tiles of float32, adjacent in j.
#pragma once

#if defined(__aarch64__)
#include "cpu/tiles/products_neon.h"
#elif defined(__AMX_BF16__)
#include "cpu/tiles/products_amx.h"
#else
#include "cpu/tiles/products_avx512bf16.h"
#endif

namespace qlora::cpu {
namespace {

QLORA_INLINE void multiply_any(int64_t row_tiles, int64_t col_tiles, const uint8_t* rows, int64_t row_pitch,
                               const uint8_t* cols, int64_t col_pitch, int64_t steps, bool first, float* c,
                               int64_t c_pitch) {
  if (row_tiles == 2)
    col_tiles == 2 ? multiply<2, 2>(rows, row_pitch, cols, col_pitch, steps, first, c, c_pitch)
                   : multiply<2, 1>(rows, row_pitch, cols, col_pitch, steps, first, c, c_pitch);
  else
    col_tiles == 2 ? multiply<1, 2>(rows, row_pitch, cols, col_pitch, steps, first, c, c_pitch)
                   : multiply<1, 1>(rows, row_pitch, cols, col_pitch, steps, first, c, c_pitch);
}

}  // namespace
}  // namespace qlora::cpu
