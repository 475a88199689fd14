// Quantizes a matrix to given scales column by column, for one vector type: the error of each column is fed back into
// the columns after it (GPTQ, Frantar et al. 2023, in the form of LDLQ, Chee et al. 2023).
//
// Rows are independent, so the lanes of a vector are rows. A panel keeps its errors transposed, [step][row]; a tile of
// columns adds up the errors of all earlier steps in registers. Sums run over the steps in order, with separately
// rounded products, so that every ISA and the GPU give the same codes.
#pragma once

#include "cpu/quantize/quantize_impl.h"

namespace qlora::cpu {
namespace {

template <class V>
struct FeedbackTile {
  static constexpr int kVecs = V::kLanes == 16 ? 4 : 2;  // 24 or 12 accumulators
  static constexpr int kColumns = 6;
  static constexpr int64_t kRows = V::kLanes * kVecs;
  static_assert(kFeedbackRows % kRows == 0);
};

// Scratch of a panel: errors [groups of rows][k][kRows], then codes [kFeedbackRows][k] in bytes.
template <class V>
int64_t feedback_scratch(int64_t k) {
  return kFeedbackRows * k + ceil_div(kFeedbackRows * k, 4);
}

// Rounds one step of a group of rows to the nearest levels; returns its errors. `target` is what to round, `weight`
// what the error is taken from.
template <class V, QuantType kType>
struct StepRounder {
  using Tile = FeedbackTile<V>;
  const FeedbackParams& p;
  typename V::Table table;
  int64_t first_row, rows;  // of the group; lanes beyond `rows` are empty

  void scales_of(int64_t column, float* scale, float* reciprocal, bool* all_usable) const {
    *all_usable = true;
    for (int64_t r = 0; r < Tile::kRows; ++r) {
      scale[r] =
          r < rows ? scale_of_block(p.scales, ((first_row + r) * p.scales.k + column) >> p.scales.block_shift) : 1;
      reciprocal[r] = 1.0f / scale[r];
      if ((bits_of(reciprocal[r]) & 0x7F800000u) == 0x7F800000u) *all_usable = false;  // zero or subnormal
    }
  }

  void round(int64_t column, const typename V::F* target, float* weight_then_error, uint8_t* codes) const {
    alignas(64) float scale[Tile::kRows], reciprocal[Tile::kRows], x[Tile::kRows];
    bool all_usable;
    scales_of(column, scale, reciprocal, &all_usable);
    for (int v = 0; v < Tile::kVecs; ++v) V::store(x + v * V::kLanes, target[v]);
    if (!all_usable) {  // divides instead of multiplying, as quantize does
      for (int64_t r = 0; r < Tile::kRows; ++r) {
        if ((bits_of(reciprocal[r]) & 0x7F800000u) != 0x7F800000u) continue;
        x[r] = scale[r] != 0.0f ? x[r] / scale[r] : 0.0f;
        reciprocal[r] = 1.0f;
      }
    }
    for (int v = 0; v < Tile::kVecs; ++v) {
      const int64_t at = v * V::kLanes;
      find_codes<V, kType>(V::mul(V::load(x + at), V::load(reciprocal + at)), codes + at);
      const auto value = V::mul(V::levels_of(table, codes + at), V::load(scale + at));
      V::store(weight_then_error + at, V::add(V::load(weight_then_error + at), V::mul(value, V::set1(-1.0f))));
    }
  }
};

// Quantizes one group of FeedbackTile::kRows rows. `errors` [k][kRows] holds the weights in the order of steps on
// entry.
template <class V, QuantType kType>
void quantize_group(const StepRounder<V, kType>& rounder, float* errors, uint8_t* codes) {
  using Tile = FeedbackTile<V>;
  const FeedbackParams& p = rounder.p;
  const int64_t k = p.scales.k;
  for (int64_t start = 0; start < k; start += Tile::kColumns) {
    const auto width = static_cast<int>(min_i64(Tile::kColumns, k - start));
    typename V::F target[Tile::kColumns][Tile::kVecs];
    const float* row[Tile::kColumns];
    for (int c = 0; c < Tile::kColumns; ++c) {
      const int64_t step = min_i64(start + c, k - 1);  // columns beyond the last repeat it; nobody reads them
      row[c] = p.feedback == nullptr ? nullptr : p.feedback + step * k;
      for (int v = 0; v < Tile::kVecs; ++v) target[c][v] = V::load(errors + step * Tile::kRows + v * V::kLanes);
    }
    if (p.feedback != nullptr) {
      for (int64_t step = 0; step < start; ++step) {
        typename V::F error[Tile::kVecs];
        for (int v = 0; v < Tile::kVecs; ++v) error[v] = V::load(errors + step * Tile::kRows + v * V::kLanes);
        for (int c = 0; c < Tile::kColumns; ++c) {
          const auto factor = V::set1(row[c][step]);
          for (int v = 0; v < Tile::kVecs; ++v) target[c][v] = V::add(target[c][v], V::mul(error[v], factor));
        }
      }
    }
    for (int c = 0; c < width; ++c) {
      const int64_t step = start + c, column = p.order == nullptr ? step : p.order[step];
      float* error = errors + step * Tile::kRows;
      alignas(64) uint8_t found[Tile::kRows];
      rounder.round(column, target[c], error, found);
      for (int64_t r = 0; r < rounder.rows; ++r) codes[r * k + column] = found[r];
      if (p.feedback == nullptr) continue;
      for (int later = c + 1; later < width; ++later) {
        const auto factor = V::set1(row[later][step]);
        for (int v = 0; v < Tile::kVecs; ++v)
          target[later][v] = V::add(target[later][v], V::mul(V::load(error + v * V::kLanes), factor));
      }
    }
  }
}

template <class V, QuantType kType>
void quantize_panel(const FeedbackParams& p, int64_t panel, float* scratch) {
  using Tile = FeedbackTile<V>;
  const int64_t k = p.scales.k, first = panel * kFeedbackRows, rows = min_i64(kFeedbackRows, p.scales.n - first);
  auto* codes = reinterpret_cast<uint8_t*>(scratch + kFeedbackRows * k);
  for (int64_t group = 0; group < rows; group += Tile::kRows) {
    const int64_t count = min_i64(Tile::kRows, rows - group);
    float* errors = scratch + group * k;
    for (int64_t r = 0; r < Tile::kRows; ++r) {
      const float* source = p.weight + (first + group + min_i64(r, count - 1)) * k;  // a real row in empty lanes
      for (int64_t step = 0; step < k; ++step)
        errors[step * Tile::kRows + r] = source[p.order == nullptr ? step : p.order[step]];
    }
    const StepRounder<V, kType> rounder{p, V::table(Format<kType>::kTable), first + group, count};
    quantize_group<V, kType>(rounder, errors, codes + group * k);
  }
  // kFeedbackRows is even, so a panel begins at a byte.
  const int64_t numel = rows * k;
  uint8_t* packed = p.packed + first * k / 2;
  for (int64_t i = 0; i + 1 < numel; i += 2) packed[i / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
  if (numel % 2) packed[numel / 2] = static_cast<uint8_t>(codes[numel - 1] << 4);  // the unused nibble is zero
}

template <class V>
void quantize_with_feedback(const FeedbackParams& p, int64_t begin, int64_t end, float* scratch) {
  visit_quant_type(p.scales.quant_type, [&](auto type) {
    for (int64_t panel = begin; panel < end; ++panel) quantize_panel<V, decltype(type)::value>(p, panel, scratch);
  });
}

}  // namespace
}  // namespace qlora::cpu
