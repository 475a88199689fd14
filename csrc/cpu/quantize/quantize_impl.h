// Blockwise 4-bit quantization for one vector type: finds absmax, normalises, finds codes, packs two codes per byte.
#pragma once

#include "cpu/isa/table.h"
#include "format/codebook.h"
#include "format/half.h"

namespace qlora::cpu {
namespace {

template <class T>
int64_t first_not_finite(const T* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if ((bits_of(to_float(x[i])) & 0x7F800000u) == 0x7F800000u) return i;
  return -1;
}

// Converts a vector of normalised values to codes, one per byte.
template <class V, QuantType kType>
void find_codes(typename V::F x, uint8_t* codes) {
  if constexpr (Format<kType>::kAscends) {
    V::count_above(x, Format<kType>::kThresholds, kLevels - 1, codes);
  } else if constexpr (kType == QuantType::kFp4) {
    float lanes[V::kLanes];
    V::store(lanes, x);
    V::count_above(V::abs(x), kFp4Thresholds, 7, codes);
    for (int i = 0; i < V::kLanes; ++i) codes[i] = kFp4CodeOfRank[codes[i]] | (lanes[i] < 0.0f ? 8 : 0);
  } else {
    static_assert(kType == QuantType::kInt4,
                  "write the rule for the codes of this type here: docs/extending/format.md");
    const auto steps = V::round_even(V::mul(x, V::set1(kInt4Steps)));
    // max ignores a nan in its first argument, so a nan becomes the lowest code on every ISA.
    const auto clamped = V::min(V::max(steps, V::set1(-kInt4Zero)), V::set1(15 - kInt4Zero));
    V::store_bytes(V::add(clamped, V::set1(kInt4Zero)), codes);
  }
}

// Loads a block as float32, padded with zeros to whole vectors; returns the padded count.
template <class V, class T>
int64_t load_block(const T* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) V::store(out + i, V::load(x + i));
  for (; i < count; ++i) out[i] = to_float(x[i]);
  const int64_t padded = ceil_div(count, V::kLanes) * V::kLanes;
  for (; i < padded; ++i) out[i] = 0.0f;
  return padded;
}

// The largest magnitude of a loaded block, without regard to nan; `is_finite` becomes false if it holds nan or inf.
template <class V>
float absmax_of_block(const float* x, int64_t padded, bool* is_finite) {
  auto largest = V::zero();
  auto probe = V::zero();  // x * 0 is nan if x is nan or inf, and a nan stays in the sum
  for (int64_t i = 0; i < padded; i += V::kLanes) {
    const auto v = V::load(x + i);
    largest = V::max(V::abs(v), largest);
    probe = V::fma(v, V::zero(), probe);
  }
  *is_finite = V::reduce_add(probe) == 0.0f;
  return V::reduce_max(largest);
}

template <class V, class T, QuantType kType>
int64_t quantize_blocks(const QuantizeParams& p, int64_t begin, int64_t end) {
  alignas(64) float x[kMaxBlockSize];
  alignas(64) uint8_t codes[kMaxBlockSize];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * p.block;
    const int64_t count = min_i64(p.block, p.numel - first);
    const T* source = static_cast<const T*>(p.weight) + first;
    const int64_t padded = load_block<V>(source, count, x);

    bool is_finite = true;
    const float absmax = absmax_of_block<V>(x, padded, &is_finite);
    if (p.check_finite && !is_finite) return first + first_not_finite(source, count);
    p.absmax[block] = absmax;

    const float reciprocal = 1.0f / absmax;
    const bool reciprocal_is_finite = (bits_of(reciprocal) & 0x7F800000u) != 0x7F800000u;
    if (!reciprocal_is_finite) {  // absmax is zero or subnormal: divide instead of multiplying
      for (int64_t i = 0; i < padded; ++i) x[i] = absmax > 0.0f ? x[i] / absmax : 0.0f;
    }
    const auto factor = V::set1(reciprocal_is_finite ? reciprocal : 1.0f);
    uint8_t* packed = p.packed + first / 2;
    if constexpr (V::kHasCells && kType == QuantType::kNf4) {
      if (count % (2 * V::kLanes) == 0) {
        for (int64_t i = 0; i < count; i += 2 * V::kLanes)
          V::pack_codes(V::nf4_codes(V::mul(V::load(x + i), factor)),
                        V::nf4_codes(V::mul(V::load(x + i + V::kLanes), factor)), packed + i / 2);
        continue;
      }
    }
    for (int64_t i = 0; i < padded; i += V::kLanes) find_codes<V, kType>(V::mul(V::load(x + i), factor), codes + i);
    const int64_t pairs = count / 2;
    for (int64_t i = 0; i < pairs; ++i) packed[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
    if (count % 2) packed[pairs] = static_cast<uint8_t>(codes[count - 1] << 4);  // the unused nibble is zero
  }
  return -1;
}

template <class V, class T>
int64_t quantize_typed(const QuantizeParams& p, int64_t begin, int64_t end) {
  return visit_quant_type(p.quant_type,
                          [&](auto type) { return quantize_blocks<V, T, decltype(type)::value>(p, begin, end); });
}

template <class V>
int64_t quantize(const QuantizeParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return quantize_typed<V, bf16>(p, begin, end);
    case DType::kFloat16:
      return quantize_typed<V, fp16>(p, begin, end);
    default:
      return quantize_typed<V, float>(p, begin, end);
  }
}

}  // namespace
}  // namespace qlora::cpu
