// A table that gives NF4 codes with one comparison instead of a binary search with four. [-1, 1] is cut into cells so
// narrow that each contains at most one threshold. The cell of x is the lowest five bits of
// x * kNf4CellsPerUnit + kNf4CellMagic in float32.
#pragma once

#include "format/codebook.h"

namespace qlora {

inline constexpr int kNf4Cells = 32;
inline constexpr float kNf4CellsPerUnit = 15.0f;
inline constexpr float kNf4CellMagic = 0x1.8p23f + kNf4Cells / 2;  // adding it rounds; the low bits are the cell

struct Nf4CellTable {
  float threshold[kNf4Cells];  // values above it have the next code; inf if the cell has no threshold
  int32_t code[kNf4Cells];     // code of the smallest value in the cell
};

QLORA_INLINE constexpr Nf4CellTable make_nf4_cells() {
  Nf4CellTable table{};
  int cell = 0;
  for (int code = 0; code < 15; ++code) {
    // Rounds to a cell as the float32 sum does; no threshold lies halfway between two cells, so ties do not occur.
    const double place = static_cast<double>(kNf4Thresholds.value[code]) * kNf4CellsPerUnit + kNf4Cells / 2;
    const int end = static_cast<int>(place + 0.5);
    for (; cell < end; ++cell) table.threshold[cell] = __builtin_huge_valf(), table.code[cell] = code;
    table.threshold[cell] = kNf4Thresholds.value[code];
    table.code[cell++] = code;
  }
  for (; cell < kNf4Cells; ++cell) table.threshold[cell] = __builtin_huge_valf(), table.code[cell] = 15;
  return table;
}
inline constexpr Nf4CellTable kNf4CellTable = make_nf4_cells();

QLORA_INLINE constexpr bool each_threshold_has_a_cell() {
  int found = 0;
  for (int cell = 0; cell < kNf4Cells; ++cell) {
    const int code = kNf4CellTable.code[cell];
    found += kNf4CellTable.threshold[cell] == kNf4Thresholds.value[code < 15 ? code : 0];
  }
  return found == 15;
}
static_assert(each_threshold_has_a_cell(), "a cell has one threshold at most");

}  // namespace qlora
