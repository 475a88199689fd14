// Searches the scale of each block for the least weighted squared error, for one vector type. The lanes of a vector are
// candidates: each adds up its error element by element, so that the result does not depend on the vector's width.
#pragma once

#include "cpu/quantize/quantize_impl.h"
#include "format/scale_search.h"

namespace qlora::cpu {
namespace {

// The best of kScaleFactors * absmax for one block. `importance` has one value per element of the block.
template <class V, QuantType kType>
float best_scale(const float* x, const float* importance, int64_t count, float absmax) {
  constexpr int kVecs = kScaleCandidates / V::kLanes;
  const auto table = V::table(Format<kType>::kTable);
  alignas(64) float scale[kScaleCandidates], reciprocal[kScaleCandidates], loss[kScaleCandidates];
  for (int i = 0; i < kScaleCandidates; ++i) {
    scale[i] = kScaleFactors.value[i] * absmax;
    reciprocal[i] = 1.0f / scale[i];
    if ((bits_of(reciprocal[i]) & 0x7F800000u) == 0x7F800000u) return absmax;  // zero or subnormal
  }
  for (int v = 0; v < kVecs; ++v) {
    const auto inverse = V::load(reciprocal + v * V::kLanes);
    const auto minus_scale = V::mul(V::load(scale + v * V::kLanes), V::set1(-1.0f));
    auto sum = V::zero();
    for (int64_t i = 0; i < count; ++i) {
      alignas(64) uint8_t codes[V::kLanes];
      const auto weight = V::set1(x[i]);
      find_codes<V, kType>(V::mul(weight, inverse), codes);
      const auto error = V::add(weight, V::mul(V::levels_of(table, codes), minus_scale));
      sum = V::add(sum, V::mul(V::set1(importance[i]), V::mul(error, error)));  // no FMA: equal on every ISA
    }
    V::store(loss + v * V::kLanes, sum);
  }
  int best = 0;
  for (int i = 0; i < kScaleCandidates; ++i) {
    if (!(loss[i] == loss[i])) loss[i] = float_of(0x7F800000u);  // nan: inf times zero
    best = loss[i] < loss[best] ? i : best;
  }
  return scale[best];
}

template <class V, QuantType kType>
int64_t search_scales_of_type(const SearchScalesParams& p, int64_t begin, int64_t end) {
  alignas(64) float x[kMaxBlockSize];
  alignas(64) float importance[kMaxBlockSize];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * p.block, count = min_i64(p.block, p.n * p.k - first);
    const int64_t padded = load_block<V>(p.weight + first, count, x);
    bool is_finite = true;
    const float absmax = absmax_of_block<V>(x, padded, &is_finite);
    if (!is_finite) return first + first_not_finite(p.weight + first, count);
    int64_t column = first % p.k;
    for (int64_t i = 0; i < count; ++i) {
      importance[i] = p.importance[column];
      if (++column == p.k) column = 0;
    }
    p.absmax[block] = best_scale<V, kType>(x, importance, count, absmax);
  }
  return -1;
}

template <class V>
int64_t search_scales(const SearchScalesParams& p, int64_t begin, int64_t end) {
  return visit_quant_type(p.quant_type,
                          [&](auto type) { return search_scales_of_type<V, decltype(type)::value>(p, begin, end); });
}

}  // namespace
}  // namespace qlora::cpu
