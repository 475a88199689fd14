// Vector helpers for tiles of bfloat16: transposes, rounding, loads of any float type. Compiled for isa_amx.cpp and
// isa_avx512bf16.cpp, which both have these instructions.
#pragma once

#include <immintrin.h>

#include "cpu/isa/vec_avx512.h"
#include "cpu/tiles/tiles.h"
#include "format/half.h"

namespace qlora::cpu {
namespace {

// Rounds 32 numbers to bfloat16, `low` first.
QLORA_INLINE __m512i round16(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}
QLORA_INLINE __m256i round16(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
QLORA_INLINE __m512 widen16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
// The remainder x - high, rounded to bfloat16.
QLORA_INLINE __m256i rest16(__m512 x, __m256i high) { return round16(_mm512_sub_ps(x, widen16(high))); }

// Loads the first `count` of 16 numbers of any float type as float32; the others are zero.
QLORA_INLINE __m512 load_floats(const void* data, DType dtype, int64_t at, int64_t count) {
  const auto mask = static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1 << count) - 1);
  switch (dtype) {
    case DType::kBFloat16:
      return widen16(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at));
    case DType::kFloat16:
      return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at));
    default:
      return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + at);
  }
}

QLORA_INLINE __mmask32 mask32(int64_t count) {
  return count >= 32 ? 0xFFFFFFFFu : count <= 0 ? 0u : (1u << count) - 1u;
}
// Loads the first `count` of 32 16-bit elements; the others are zero.
QLORA_INLINE __m512i load16(const uint16_t* p, int64_t count) { return _mm512_maskz_loadu_epi16(mask32(count), p); }

// Interleaves 32 elements of two rows into words (even, odd): `first` has columns 0 … 15, `second` 16 … 31.
QLORA_INLINE void pair_rows(__m512i even, __m512i odd, __m512i& first, __m512i& second) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  first = _mm512_permutex2var_epi16(even, low, odd);
  second = _mm512_permutex2var_epi16(even, _mm512_add_epi16(low, _mm512_set1_epi16(16)), odd);
}

}  // namespace
}  // namespace qlora::cpu
