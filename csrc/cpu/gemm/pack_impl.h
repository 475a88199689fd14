// Packs matrices into the column tiles of `gemm`: float32, transposed in registers where columns are rows of the
// matrix.
#pragma once

#include <cstring>

#include "cpu/isa/table.h"
#include "format/half.h"

namespace qlora::cpu {
namespace {

// Converts `count` numbers of any float type to float32.
template <class V, class T>
void to_floats(const T* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) V::store(out + i, V::load(in + i));
  for (; i < count; ++i) out[i] = to_float(in[i]);
}

template <class V, class T>
void pack_tile(const PackParams& p, int64_t col0, int64_t cols) {
  constexpr int64_t kTileCols = V::kLanes * V::kTileVecs;
  const T* src = static_cast<const T*>(p.src);
  float* out = p.out + col0 * p.steps;
  const auto line = [&](int64_t i) { return src + (p.row_of != nullptr ? p.row_of[i] : i) * p.ld; };
  if (p.steps_are_rows) {
    for (int64_t s = 0; s < p.steps; ++s) {
      float* to = out + s * kTileCols;
      to_floats<V>(line(s) + col0, cols, to);
      for (int64_t j = cols; j < kTileCols; ++j) to[j] = 0.0f;
    }
    return;
  }
  const T* lines[kTileCols];
  for (int64_t j = 0; j < cols; ++j) lines[j] = line(col0 + j);
  for (int64_t s0 = 0; s0 < p.steps; s0 += V::kLanes) {
    const int64_t steps = min_i64(V::kLanes, p.steps - s0);
    for (int64_t j0 = 0; j0 < kTileCols; j0 += V::kLanes) {
      typename V::F rows[V::kLanes];
      if (steps == V::kLanes && j0 + V::kLanes <= cols) {
        for (int64_t j = 0; j < V::kLanes; ++j) rows[j] = V::load(lines[j0 + j] + s0);
      } else {
        for (int64_t j = 0; j < V::kLanes; ++j) {
          float padded[V::kLanes] = {};
          if (j0 + j < cols) to_floats<V>(lines[j0 + j] + s0, steps, padded);
          rows[j] = V::load(padded);
        }
      }
      V::transpose(rows);
      for (int64_t s = 0; s < steps; ++s) V::store(out + (s0 + s) * kTileCols + j0, rows[s]);
    }
  }
}

template <class V>
void pack(const PackParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kTileCols = V::kLanes * V::kTileVecs;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t col0 = tile * kTileCols, cols = min_i64(kTileCols, p.cols - col0);
    switch (p.dtype) {
      case DType::kBFloat16:
        pack_tile<V, bf16>(p, col0, cols);
        break;
      case DType::kFloat16:
        pack_tile<V, fp16>(p, col0, cols);
        break;
      default:
        pack_tile<V, float>(p, col0, cols);
    }
  }
}

}  // namespace
}  // namespace qlora::cpu
