// Vectors of 64 bytes for the kernels on tiles, with AVX-512. vectors.h documents them.
#pragma once

#include <immintrin.h>

#include "cpu/isa/vec_avx512.h"
#include "cpu/tiles/tiles.h"

namespace qlora::cpu {
namespace {

using Vec = VecAvx512;
using Words = __m512i;
using Halves = __m256i;
using Floats = __m512;  // with the compiler's own +, - and *

QLORA_INLINE __mmask16 mask16(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1);
}
QLORA_INLINE __mmask32 mask32(int64_t count) {
  return count >= 32 ? 0xFFFFFFFFu : count <= 0 ? 0u : (1u << count) - 1u;
}

QLORA_INLINE Words zero_words() { return _mm512_setzero_si512(); }
QLORA_INLINE Words load_words(const void* p) { return _mm512_loadu_si512(p); }
QLORA_INLINE void store_words(void* p, Words x) { _mm512_storeu_si512(p, x); }
QLORA_INLINE Words load16(const uint16_t* p, int64_t count) { return _mm512_maskz_loadu_epi16(mask32(count), p); }
QLORA_INLINE void store16(uint16_t* p, int64_t count, Words x) { _mm512_mask_storeu_epi16(p, mask32(count), x); }
QLORA_INLINE Halves lower(Words x) { return _mm512_castsi512_si256(x); }
QLORA_INLINE Halves upper(Words x) { return _mm512_extracti64x4_epi64(x, 1); }
QLORA_INLINE Words join(Halves low, Halves high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
QLORA_INLINE void store_halves(void* p, Halves x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

QLORA_INLINE Floats zero_floats() { return _mm512_setzero_ps(); }
QLORA_INLINE Floats spread(float x) { return _mm512_set1_ps(x); }
QLORA_INLINE Floats as_floats(Words x) { return _mm512_castsi512_ps(x); }
QLORA_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
QLORA_INLINE void store_floats(float* p, int64_t count, Floats x) { _mm512_mask_storeu_ps(p, mask16(count), x); }
QLORA_INLINE Floats keep_lanes(unsigned lanes, Floats x) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(lanes), x);
}

QLORA_INLINE Words round16(Floats low, Floats high) { return reinterpret_cast<Words>(_mm512_cvtne2ps_pbh(high, low)); }
QLORA_INLINE Halves round16(Floats x) { return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(x)); }
QLORA_INLINE Floats widen16(Halves x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

QLORA_INLINE Floats load_floats(const void* data, DType dtype, int64_t at, int64_t count) {
  const __mmask16 mask = mask16(count);
  switch (dtype) {
    case DType::kBFloat16:
      return widen16(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at));
    case DType::kFloat16:
      return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at));
    default:
      return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + at);
  }
}

QLORA_INLINE void transpose(Words (&rows)[16]) { Vec::transpose(rows); }
QLORA_INLINE void pair_rows(Words even, Words odd, Words& first, Words& second) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  first = _mm512_permutex2var_epi16(even, low, odd);
  second = _mm512_permutex2var_epi16(even, _mm512_add_epi16(low, _mm512_set1_epi16(16)), odd);
}
QLORA_INLINE void pair_eights(Words even, Words odd, Words& first, Words& second) {
  first = _mm512_unpacklo_epi16(even, odd);
  second = _mm512_unpackhi_epi16(even, odd);
}
QLORA_INLINE Words pair_halves(Halves even, Halves odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

QLORA_INLINE void nibble_order(const Words (&natural)[4], Words (&out)[4]) {
  __m512i index = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 60, 56, 52, 48, 44, 40, 36, 32, 28,
                                   24, 20, 16, 12, 8, 4, 0);
  for (int s = 0; s < 4; ++s, index = _mm512_add_epi16(index, _mm512_set1_epi16(1))) {
    const __m512i low = _mm512_permutex2var_epi16(natural[0], index, natural[1]);
    const __m512i high = _mm512_permutex2var_epi16(natural[2], index, natural[3]);
    out[s] = _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
  }
}
QLORA_INLINE Words nibble_pairs(Words x) {
  return _mm512_shuffle_epi8(
      x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)));
}
QLORA_INLINE void natural_order(Floats (&tiles)[8]) {
  Floats out[8];
  for (int h = 0; h < 2; ++h) {
    const __m512 a = tiles[h], b = tiles[2 + h], d = tiles[4 + h], e = tiles[6 + h];
    const __m512 ab_low = _mm512_unpacklo_ps(a, b), ab_high = _mm512_unpackhi_ps(a, b);
    const __m512 de_low = _mm512_unpacklo_ps(d, e), de_high = _mm512_unpackhi_ps(d, e);
    const auto join = [](__m512 x, __m512 y, bool upper) {
      const __m512d v = upper ? _mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))
                              : _mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y));
      return _mm512_castpd_ps(v);
    };
    // 128-bit lane l of r<i> holds columns 32 l + 16 h + 4 i … + 3.
    const __m512 r0 = join(ab_low, de_low, false), r1 = join(ab_low, de_low, true);
    const __m512 r2 = join(ab_high, de_high, false), r3 = join(ab_high, de_high, true);
    const __m512 r01_even = _mm512_shuffle_f32x4(r0, r1, 0x88), r01_odd = _mm512_shuffle_f32x4(r0, r1, 0xDD);
    const __m512 r23_even = _mm512_shuffle_f32x4(r2, r3, 0x88), r23_odd = _mm512_shuffle_f32x4(r2, r3, 0xDD);
    out[h] = _mm512_shuffle_f32x4(r01_even, r23_even, 0x88);
    out[4 + h] = _mm512_shuffle_f32x4(r01_even, r23_even, 0xDD);
    out[2 + h] = _mm512_shuffle_f32x4(r01_odd, r23_odd, 0x88);
    out[6 + h] = _mm512_shuffle_f32x4(r01_odd, r23_odd, 0xDD);
  }
  for (int i = 0; i < 8; ++i) tiles[i] = out[i];
}

QLORA_INLINE void unpack_chunk(const uint8_t* packed, bool whole, Vec::Table levels, float first_scale,
                               float second_scale, Words (&out)[4]) {
  const __m512i words = whole ? _mm512_loadu_si512(packed) : _mm512_maskz_loadu_epi64(0x0F, packed);
  const __m512i table = round16(levels * spread(first_scale), levels * spread(second_scale));
  // vpermw reads five index bits: the four bits of the nibble, and one that selects the table of this half.
  const __m512i nibbles = _mm512_set1_epi8(0x0F);
  const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(0x10), 1);
  constexpr int kAndOr = 0xEA;  // (a & b) | c
  const __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), nibbles, half, kAndOr);
  const __m512i low = _mm512_ternarylogic_epi32(words, nibbles, half, kAndOr);
  out[0] = _mm512_permutexvar_epi16(high, table);
  out[1] = _mm512_permutexvar_epi16(low, table);
  out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(high, 8), table);
  out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 8), table);
}

}  // namespace
}  // namespace qlora::cpu
