// Reference implementation of quantization and of the matrix product in simple scalar C++, one element at a time.
// Every kernel is tested against it.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "format/codebook.h"
#include "format/layout.h"

namespace qlora::reference {

// The code of a value already divided by absmax.
inline int code_of(QuantType type, float x) {
  if (type == QuantType::kInt4) {
    const float steps = std::nearbyint(x * kInt4Steps);
    return static_cast<int>(std::fmin(std::fmax(steps, -8.0f), 7.0f)) + kInt4Zero;
  }
  if (type == QuantType::kFp4) {
    int rank = 0;
    while (rank < 7 && std::fabs(x) > kFp4Thresholds[rank]) ++rank;
    return kFp4CodeOfRank[rank] + (x < 0 ? 8 : 0);
  }
  const float* levels = codebook(type);
  int code = 0;
  while (code < 15 && x > (levels[code] + levels[code + 1]) / 2) ++code;
  return code;
}

struct Quantized {
  std::vector<uint8_t> packed;
  std::vector<float> absmax;
};

inline Quantized quantize(const std::vector<float>& weight, int64_t block, QuantType type) {
  const int64_t numel = static_cast<int64_t>(weight.size());
  Quantized q{std::vector<uint8_t>(static_cast<size_t>(packed_bytes(numel))), {}};
  for (int64_t first = 0; first < numel; first += block) {
    const int64_t end = min_i64(first + block, numel);
    float absmax = 0.0f;
    for (int64_t i = first; i < end; ++i) absmax = std::fmax(absmax, std::fabs(weight[i]));
    q.absmax.push_back(absmax);
    const float reciprocal = 1.0f / absmax;
    for (int64_t i = first; i < end; ++i) {
      float x = std::isfinite(reciprocal) ? weight[i] * reciprocal : weight[i] / absmax;
      if (absmax == 0.0f) x = 0.0f;
      q.packed[i / 2] |= static_cast<uint8_t>(code_of(type, x) << (i % 2 ? 0 : 4));
    }
  }
  return q;
}

inline float element(const WeightView& w, int64_t i) {
  return level_of_element(w, i) * scale_of_block(w, i >> w.block_shift);
}

// y [m, n] = x Wᵀ in double, and the sums of absolute products, which bound the rounding error of any summation order.
inline void matmul(const WeightView& w, const std::vector<float>& x, int64_t m, std::vector<double>& y,
                   std::vector<double>& bound) {
  y.assign(static_cast<size_t>(m * w.n), 0.0);
  bound = y;
  for (int64_t t = 0; t < m; ++t)
    for (int64_t row = 0; row < w.n; ++row)
      for (int64_t i = 0; i < w.k; ++i) {
        const double product = static_cast<double>(x[t * w.k + i]) * element(w, row * w.k + i);
        y[t * w.n + row] += product;
        bound[t * w.n + row] += std::fabs(product);
      }
}

}  // namespace qlora::reference
