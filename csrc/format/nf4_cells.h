// NF4 codes by a table instead of a search of four comparisons: [-1, 1] is cut into cells so narrow that at most one
// threshold lies in each. The cell of x is the lowest five bits of x * kNf4CellsPerUnit + kNf4CellMagic in float32.
#pragma once

#include "format/codebook.h"

namespace qlora {

inline constexpr int kNf4Cells = 32;
inline constexpr float kNf4CellsPerUnit = 15.0f;
inline constexpr float kNf4CellMagic = 0x1.8p23f + kNf4Cells / 2;  // a sum with it ends in the rounded cell

struct Nf4CellTable {
  float threshold[kNf4Cells];  // above it the code is one more; inf: none in this cell
  int32_t code[kNf4Cells];     // of the smallest value in the cell
};

QLORA_INLINE constexpr Nf4CellTable make_nf4_cells() {
  Nf4CellTable table{};
  int cell = 0;
  for (int code = 0; code < 15; ++code) {
    // As float32 rounds it; no threshold lies half way between two cells.
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
