// The 8-bit dynamic maps (Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning"). Each decade from
// 10^-6 to 10^0 has a linear grid with twice as many points as the decade below; 0 and 1 are added. The signed map,
// mirrored around 0, stores double-quantized scales and the first moments of AdamW. The unsigned map is twice as dense
// and stores the second moments.
#pragma once

#include "format/common.h"

namespace qlora {

inline constexpr int kDynamicMapSize = 256;
inline constexpr int kDynamicMapDecades = 7;

struct DynamicMap {
  float value[kDynamicMapSize];          // ascending
  float threshold[kDynamicMapSize - 1];  // float32 midpoints; code = number of thresholds below x
};

// Point i of torch.linspace(0.1, 1, count) in float32. The first half counts up from the start, the second half counts
// down from the end. Each point is rounded once from the exact product, like torch's vectorized kernel, which uses a
// fused multiply-add.
QLORA_INLINE constexpr float linspace_tenth_to_one(int i, int count) {
  const float first = 0.1f, last = 1.0f;
  const float step = (last - first) / static_cast<float>(count - 1);
  if (i < count / 2) return static_cast<float>(static_cast<double>(first) + static_cast<double>(step) * i);
  return static_cast<float>(static_cast<double>(last) - static_cast<double>(step) * (count - 1 - i));
}

QLORA_INLINE constexpr DynamicMap make_dynamic_map(bool is_signed) {
  DynamicMap map{};
  int size = 0;
  double decade = 1e-6;
  const double decades[kDynamicMapDecades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0};
  for (int d = 0; d < kDynamicMapDecades; ++d) {
    decade = decades[d];
    const int points = (is_signed ? 1 << d : 2 << d) + 1;
    for (int i = 0; i + 1 < points; ++i) {
      const float mean = (linspace_tenth_to_one(i, points) + linspace_tenth_to_one(i + 1, points)) / 2.0f;
      const float scaled = static_cast<float>(decade) * mean;
      map.value[size++] = scaled;
      if (is_signed) map.value[size++] = -scaled;
    }
  }
  map.value[size++] = 0.0f;
  map.value[size++] = 1.0f;
  for (int i = 1; i < size; ++i) {  // insertion sort, because std::sort is not constexpr in C++17
    const float v = map.value[i];
    int j = i;
    for (; j > 0 && map.value[j - 1] > v; --j) map.value[j] = map.value[j - 1];
    map.value[j] = v;
  }
  for (int i = 0; i + 1 < size; ++i) map.threshold[i] = (map.value[i] + map.value[i + 1]) / 2.0f;
  return map;
}

inline constexpr DynamicMap kDynamicMap = make_dynamic_map(true);
inline constexpr DynamicMap kUnsignedDynamicMap = make_dynamic_map(false);

// Finds the code of a value with two lookups instead of a search. Values with the same sign, exponent and upper seven
// fraction bits share a cell, and a cell contains at most one threshold. Cells cover magnitudes from 2^-24, below every
// threshold, to 1.
inline constexpr int kCellsPerOctave = 128;
inline constexpr int kCellOctaves = 24;
inline constexpr int kCells = kCellOctaves * kCellsPerOctave + 1;
struct DynamicCells {
  uint8_t code[2][kCells];  // [negative][cell] -> the code of the smallest value in the cell
};

QLORA_INLINE constexpr int dynamic_code_by_search(const DynamicMap& map, float x) {
  int code = 0;  // number of thresholds below x
  for (int step = kDynamicMapSize / 2; step > 0; step /= 2)
    if (code + step < kDynamicMapSize && x > map.threshold[code + step - 1]) code += step;
  return code;
}

QLORA_INLINE constexpr DynamicCells make_dynamic_cells(const DynamicMap& map) {
  DynamicCells cells{};
  float octave = 0x1p-24f;
  for (int o = 0; o <= kCellOctaves; ++o, octave *= 2.0f)
    for (int i = 0; i < kCellsPerOctave && o * kCellsPerOctave + i < kCells; ++i) {
      const int cell = o * kCellsPerOctave + i;
      const float low = octave * (1.0f + static_cast<float>(i) / kCellsPerOctave);
      const float next = octave * (1.0f + static_cast<float>(i + 1) / kCellsPerOctave);
      cells.code[0][cell] = static_cast<uint8_t>(dynamic_code_by_search(map, cell == 0 ? 0.0f : low));
      cells.code[1][cell] = static_cast<uint8_t>(dynamic_code_by_search(map, -next));
    }
  return cells;
}

inline constexpr DynamicCells kDynamicCells = make_dynamic_cells(kDynamicMap);
inline constexpr DynamicCells kUnsignedDynamicCells = make_dynamic_cells(kUnsignedDynamicMap);

// The cell of a float32 value, from its bits. The caller then looks up code = cells.code[sign][cell] and adds one if
// x > map.threshold[code].
QLORA_INLINE int dynamic_cell(uint32_t bits) {
  const int cell = static_cast<int>(bits >> 16 & 0x7FFFu) - (127 - kCellOctaves) * kCellsPerOctave;
  return cell < 0 ? 0 : cell < kCells ? cell : kCells - 1;
}

}  // namespace qlora
