// Sixteen float lanes of AVX-512 (F, BW, DQ, VL). vec_scalar.h documents the interface.
#pragma once

#include <immintrin.h>

#include "format/half.h"
#include "format/layout.h"
#include "format/nf4_cells.h"

namespace qlora::cpu {
namespace {

struct VecAvx512 {
  static constexpr const char* kIsa = "avx512";
  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 8;  // 8 x 3 accumulators + 3 columns use 27 of the 32 registers
  static constexpr int kTileVecs = 3;

  using F = __m512;
  using I = __m512i;
  using Table = __m512;                          // all 16 levels: vpermps reads the low 4 bits of each index lane
  static constexpr bool kHasBytePlanes = false;  // vpermps takes fewer operations than bytes would

  QLORA_INLINE F zero() { return _mm512_setzero_ps(); }
  QLORA_INLINE F set1(float x) { return _mm512_set1_ps(x); }
  QLORA_INLINE F halves(float a, float b) { return _mm512_mask_blend_ps(0xFF00, set1(a), set1(b)); }
  QLORA_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  QLORA_INLINE F load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  QLORA_INLINE F load(const fp16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  QLORA_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  // Uses integer operations: vcvtneps2bf16 flushes subnormals, so its results would differ from the other ISAs.
  QLORA_INLINE void store(bf16* p, F x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, rounded, quiet));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
  QLORA_INLINE void store(fp16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  QLORA_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  QLORA_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  QLORA_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  QLORA_INLINE F abs(F a) { return _mm512_abs_ps(a); }
  QLORA_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  QLORA_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  QLORA_INLINE F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  QLORA_INLINE float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
  QLORA_INLINE float reduce_max(F a) { return _mm512_reduce_max_ps(a); }

  // Transposes 16 vectors of words.
  QLORA_INLINE void transpose(I (&r)[kLanes]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    // 128-bit lane l of r[4a + b] holds rows 4a … 4a + 3 of column 4l + b.
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      const __m512i low02 = _mm512_shuffle_i32x4(r[b], r[4 + b], 0x88),
                    low13 = _mm512_shuffle_i32x4(r[b], r[4 + b], 0xDD);
      const __m512i high02 = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0x88);
      const __m512i high13 = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0xDD);
      t[b] = _mm512_shuffle_i32x4(low02, high02, 0x88);
      t[8 + b] = _mm512_shuffle_i32x4(low02, high02, 0xDD);
      t[4 + b] = _mm512_shuffle_i32x4(low13, high13, 0x88);
      t[12 + b] = _mm512_shuffle_i32x4(low13, high13, 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
  QLORA_INLINE void transpose(F (&rows)[kLanes]) {
    I words[kLanes];
    for (int i = 0; i < kLanes; ++i) words[i] = _mm512_castps_si512(rows[i]);
    transpose(words);
    for (int i = 0; i < kLanes; ++i) rows[i] = _mm512_castsi512_ps(words[i]);
  }

  QLORA_INLINE Table table(const float* levels) { return _mm512_loadu_ps(levels); }
  QLORA_INLINE I load_words(const uint8_t* p, int words) {
    if (words == kLanes) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << words) - 1u), p);
  }
  template <int kNibble>
  QLORA_INLINE F lookup(Table t, I words) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * kNibble), t);
  }
  QLORA_INLINE F levels_of(Table t, const uint8_t* codes) {
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))), t);
  }
  QLORA_INLINE F unpack_run(Table t, const uint8_t* p) {
    const __m512i pair = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m512i word =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), pair);
    const __m512i shift =
        _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);  // element i is nibble i ^ 1
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(word, shift), t);
  }
  // The table for unpack_by_table(): the 16 levels times a scale, rounded once to T, in both halves of the vector. A
  // block has only 16 distinct weights, so they are multiplied once per table, not once per weight.
  static constexpr bool kHasTables16 = true;
  static constexpr bool kHasRuns32 = false;  // see vec_avx2.h
  template <class T>
  QLORA_INLINE I scaled_table(Table levels, F scale) {
    alignas(32) T rounded[kLanes];
    store(rounded, mul(levels, scale));
    return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(rounded)));
  }
  // Unpacks 32 consecutive weights, in order, from a byte boundary.
  QLORA_INLINE void unpack_by_table(I table, const uint8_t* p, void* out) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i both =
        _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    const __m512i index = _mm512_and_si512(both, _mm512_set1_epi16(0x0F));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
  }
  QLORA_INLINE I scale_index(int first, int shift) {
    const __m512i word = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_srl_epi32(_mm512_add_epi32(_mm512_set1_epi32(first), word), _mm_cvtsi32_si128(shift));
  }
  QLORA_INLINE F expand_scales(const float* s, I index) { return _mm512_permutexvar_ps(index, _mm512_loadu_ps(s)); }
  // Looks up 16 codes in a table of 256 floats with 8 two-register permutes and 7 blends; the table stays in L1. A
  // gather takes about 50 cycles on Zen.
  QLORA_INLINE F lookup_256(const float* map, I index) {
    const __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    const __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
    const __mmask16 bit7 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
    F part[8];
    for (int i = 0; i < 8; ++i)
      part[i] = _mm512_permutex2var_ps(_mm512_loadu_ps(map + 32 * i), index, _mm512_loadu_ps(map + 32 * i + 16));
    for (int i = 0; i < 4; ++i) part[i] = _mm512_mask_blend_ps(bit5, part[2 * i], part[2 * i + 1]);
    for (int i = 0; i < 2; ++i) part[i] = _mm512_mask_blend_ps(bit6, part[2 * i], part[2 * i + 1]);
    return _mm512_mask_blend_ps(bit7, part[0], part[1]);
  }
  QLORA_INLINE F dequantize_scales(const uint8_t* codes, const float* map, F nested, F offset) {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_add_ps(_mm512_mul_ps(lookup_256(map, index), nested), offset);
  }
  QLORA_INLINE void store_low_bytes(I x, uint8_t* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(x));
  }
  // NF4 codes (format/nf4_cells.h): a fused multiply-add finds the cell, two lookups its threshold and its first code.
  static constexpr bool kHasCells = true;
  QLORA_INLINE I nf4_codes(F x) {
    const Nf4CellTable& t = kNf4CellTable;
    const __m512i cell =
        _mm512_castps_si512(_mm512_fmadd_ps(max(x, set1(-1.0f)), set1(kNf4CellsPerUnit), set1(kNf4CellMagic)));
    const F threshold = _mm512_permutex2var_ps(_mm512_loadu_ps(t.threshold), cell, _mm512_loadu_ps(t.threshold + 16));
    const __m512i code = _mm512_permutex2var_epi32(_mm512_loadu_si512(t.code), cell, _mm512_loadu_si512(t.code + 16));
    const __mmask16 above = _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
  }
  // Packs 32 codes, those of x first, into 16 bytes.
  QLORA_INLINE void pack_codes(I x, I y, uint8_t* out) {
    const __m512i even =
        _mm512_permutex2var_epi32(x, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), y);
    const __m512i odd =
        _mm512_permutex2var_epi32(x, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), y);
    store_low_bytes(_mm512_or_si512(_mm512_slli_epi32(even, 4), odd), out);
  }
  QLORA_INLINE void count_above(F x, const float* thresholds, int count, uint8_t* out) {
    const __m512i one = _mm512_set1_epi32(1);
    __m512i rank = _mm512_setzero_si512();
    for (int t = 0; t < count; ++t) {
      const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_set1_ps(thresholds[t]), _CMP_GT_OQ);
      rank = _mm512_mask_add_epi32(rank, above, rank, one);
    }
    store_low_bytes(rank, out);
  }
  QLORA_INLINE void store_bytes(F integral, uint8_t* out) { store_low_bytes(_mm512_cvttps_epi32(integral), out); }
};

}  // namespace
}  // namespace qlora::cpu
