// Loads low-rank factors and activations from memory as operands of the tensor cores. A number whose type differs from
// the tokens' is split into a high and a low part of the tokens' type, so that little precision is lost.
#pragma once

#include "cuda/device/elements.cuh"
#include "format/common.h"

namespace qlora::cuda {

template <class T>
inline constexpr DType kDTypeOf = std::is_same_v<T, bf16> ? DType::kBFloat16 : DType::kFloat16;

// Splits two numbers into a pair of T (high) and a pair of the rounding errors (low). For inf, low is 0, because
// inf - inf would be nan.
template <class T>
QLORA_DEVICE void split_pair(float first, float second, uint32_t& high, uint32_t& low) {
  high = ptx::pack<T>(first, second);
  const auto rest = [](float value, float kept) {
    return (bits_of(kept) & 0x7F800000u) == 0x7F800000u ? 0.0f : value - kept;
  };
  low = ptx::pack<T>(rest(first, ptx::unpack<T>(high, 0)), rest(second, ptx::unpack<T>(high, 1)));
}

// How eight adjacent features of a rank are read. It is chosen before the loop, so that the loop has no branches and
// its loads overlap.
enum class FactorPath { kVectors32, kVectors16, kStrided32, kAny };

template <class T>
QLORA_DEVICE FactorPath path_along_features(const LowRankFactor& f) {
  const bool vectors = f.is_vectorized && f.feature_stride == 1;
  if (f.dtype == DType::kFloat32) return vectors ? FactorPath::kVectors32 : FactorPath::kStrided32;
  return vectors && f.dtype == kDTypeOf<T> ? FactorPath::kVectors16 : FactorPath::kAny;
}

// Loads the eight features from element `at` on, or zeros if not `exists`.
template <class T, FactorPath kPath>
QLORA_DEVICE void load_along_features(const LowRankFactor& f, int64_t at, bool exists, float (&values)[8]) {
  if constexpr (kPath == FactorPath::kVectors32) {
    const Floats4* from = reinterpret_cast<const Floats4*>(static_cast<const float*>(f.data) + at);
    const Floats4 none{0, 0, 0, 0}, low = exists ? ptx::load(from) : none, high = exists ? ptx::load(from + 1) : none;
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  } else if constexpr (kPath == FactorPath::kVectors16) {
    const auto words =
        exists ? ptx::load(reinterpret_cast<const Words4*>(static_cast<const T*>(f.data) + at)) : Words4{0, 0, 0, 0};
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = ptx::unpack<T>(pairs[i / 2], i % 2);
  } else if constexpr (kPath == FactorPath::kStrided32) {
    const float* from = static_cast<const float*>(f.data) + at;
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = exists ? ptx::load(from + i * f.feature_stride) : 0.0f;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = exists ? load_element(f.data, f.dtype, at + i * f.feature_stride) : 0.0f;
  }
}

// Reads the factor of one adapter for products in type T.
template <class T>
class FactorReader {
 public:
  QLORA_METHOD FactorReader(const LowRankFactor& factor, int64_t adapter)
      : factor_(factor), first_(adapter * factor.adapter_stride) {}

  QLORA_METHOD bool splits() const { return factor_.dtype != kDTypeOf<T>; }

  // Loads ranks `rank` … `rank` + 3 of a feature; zeros from rank `ranks` on.
  QLORA_METHOD void along_ranks(int64_t feature, int64_t rank, int64_t ranks, float (&values)[4]) const {
    const int64_t at = first_ + rank * factor_.rank_stride + feature * factor_.feature_stride;
    const int64_t left = ranks - rank;
    if (factor_.is_vectorized && factor_.rank_stride == 1 && left >= 4)
      load_four_elements(factor_.data, factor_.dtype, at / 4, values);
    else
      load_with_stride(at, factor_.rank_stride, left, values);
  }

 private:
  // Loads the first `count` of kCount elements; the others are zero.
  template <int kCount>
  QLORA_METHOD void load_with_stride(int64_t at, int64_t stride, int64_t count, float (&values)[kCount]) const {
    if (factor_.dtype == DType::kFloat32) {
      const float* from = static_cast<const float*>(factor_.data) + at;
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = i < count ? ptx::load(from + i * stride) : 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        values[i] = i < count ? load_element(factor_.data, factor_.dtype, at + i * stride) : 0.0f;
    }
  }

  const LowRankFactor& factor_;
  int64_t first_;
};

// Loads ranks `rank` … `rank` + 3 of a token's activations [., ranks]; zeros from rank `ranks` on.
QLORA_DEVICE Floats4 load_activations(const float* activations, int64_t token, int64_t rank, int64_t ranks) {
  const float* from = activations + token * ranks + rank;
  const int64_t left = ranks - rank;
  if (ranks % 4 == 0) return left > 0 ? ptx::load(reinterpret_cast<const Floats4*>(from)) : Floats4{0, 0, 0, 0};
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = i < left ? ptx::load(from + i) : 0.0f;
  return {values[0], values[1], values[2], values[3]};
}

}  // namespace qlora::cuda
