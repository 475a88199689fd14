// Eight float lanes of AVX2 + FMA + F16C. vec_scalar.h documents the interface.
#pragma once

#include <immintrin.h>

#include "format/half.h"
#include "format/layout.h"

namespace qlora::cpu {
namespace {

struct VecAvx2 {
  static constexpr const char* kIsa = "avx2";
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 4;  // 4 x 3 accumulators + 3 columns + 1 broadcast use all 16 registers
  static constexpr int kTileVecs = 3;
  static constexpr bool kHasTables16 = false, kHasCells = false;  // see vec_avx512.h
  static constexpr bool kHasRuns32 = true;

  using F = __m256;
  using I = __m256i;
  struct Table {
    __m256 low, high;  // levels 0-7 and 8-15: vpermps has eight entries
    __m256i plane[4];  // byte i of all 16 levels, in both halves: vpshufb looks up 32 bytes
  };

  QLORA_INLINE F zero() { return _mm256_setzero_ps(); }
  QLORA_INLINE F set1(float x) { return _mm256_set1_ps(x); }
  QLORA_INLINE F halves(float a, float b) { return _mm256_blend_ps(set1(a), set1(b), 0xF0); }
  QLORA_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  QLORA_INLINE F load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  QLORA_INLINE F load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  QLORA_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  QLORA_INLINE void store(bf16* p, F x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, quiet, is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  QLORA_INLINE void store(fp16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  QLORA_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  QLORA_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  QLORA_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  QLORA_INLINE F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  QLORA_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  QLORA_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  QLORA_INLINE F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  QLORA_INLINE float reduce_add(F a) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
  }
  QLORA_INLINE float reduce_max(F a) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
  }

  QLORA_INLINE void transpose(F (&r)[kLanes]) {
    F pairs[kLanes], quads[kLanes];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
        quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xEE);
      }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }

  QLORA_INLINE Table table(const float* levels) {
    Table t;
    t.low = _mm256_loadu_ps(levels);
    t.high = _mm256_loadu_ps(levels + 8);
    // Transposes the bytes of each four levels, then the four words that this gives for each byte.
    const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9,
                                           13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i low = _mm256_shuffle_epi8(_mm256_castps_si256(t.low), bytes);
    const __m256i high = _mm256_shuffle_epi8(_mm256_castps_si256(t.high), bytes);
    const __m128i a = _mm256_castsi256_si128(low), b = _mm256_extracti128_si256(low, 1);
    const __m128i c = _mm256_castsi256_si128(high), d = _mm256_extracti128_si256(high, 1);
    const __m128i ab01 = _mm_unpacklo_epi32(a, b), ab23 = _mm_unpackhi_epi32(a, b);
    const __m128i cd01 = _mm_unpacklo_epi32(c, d), cd23 = _mm_unpackhi_epi32(c, d);
    t.plane[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(ab01, cd01));
    t.plane[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(ab01, cd01));
    t.plane[2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(ab23, cd23));
    t.plane[3] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(ab23, cd23));
    return t;
  }
  // Looks up the levels of 32 codes, one in each byte: fn(j, levels) gets those of bytes 4j … 4j + 3 of each half.
  template <class Fn>
  __attribute__((always_inline)) static void by_planes(const __m256i (&plane)[4], __m256i codes, const Fn& fn) {
    const __m256i a = _mm256_shuffle_epi8(plane[0], codes), b = _mm256_shuffle_epi8(plane[1], codes);
    const __m256i c = _mm256_shuffle_epi8(plane[2], codes), d = _mm256_shuffle_epi8(plane[3], codes);
    const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
    const __m256i low2 = _mm256_unpacklo_epi8(c, d), high2 = _mm256_unpackhi_epi8(c, d);
    fn(0, _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, low2)));
    fn(1, _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, low2)));
    fn(2, _mm256_castsi256_ps(_mm256_unpacklo_epi16(high, high2)));
    fn(3, _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, high2)));
  }
  // Unpacks 32 consecutive weights, in order, from a byte boundary: fn(j, levels) gets weights 8j … 8j + 7.
  template <class Fn>
  __attribute__((always_inline)) static void unpack_run32(const Table& t, const uint8_t* p, const Fn& fn) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    // Each byte twice, for its two nibbles, in the order that by_planes() makes consecutive: two bytes for each half.
    const __m256i twice =
        _mm256_shuffle_epi8(bytes, _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, 2, 2, 3, 3, 6,
                                                    6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15));
    const __m256i first = _mm256_and_si256(_mm256_srli_epi16(twice, 4), _mm256_set1_epi16(0x000F));
    by_planes(t.plane, _mm256_or_si256(first, _mm256_and_si256(twice, _mm256_set1_epi16(0x0F00))), fn);
  }
  QLORA_INLINE I load_words(const uint8_t* p, int words) {
    if (words == kLanes) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), _mm256_cmpgt_epi32(_mm256_set1_epi32(words), lane));
  }
  // vpermps reads 3 index bits. Bit 3 of the code, shifted to the sign bit, selects between the two halves.
  QLORA_INLINE F select(Table t, I index, I bit3_in_sign) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index),
                            _mm256_castsi256_ps(bit3_in_sign));
  }
  template <int kNibble>
  QLORA_INLINE F lookup(Table t, I words) {
    return select(t, _mm256_srli_epi32(words, 4 * kNibble), _mm256_slli_epi32(words, 28 - 4 * kNibble));
  }
  QLORA_INLINE F unpack_run(Table t, const uint8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);  // element i is nibble i ^ 1
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shift);
    return select(t, index, _mm256_slli_epi32(index, 28));
  }
  QLORA_INLINE F levels_of(Table t, const uint8_t* codes) {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    return select(t, index, _mm256_slli_epi32(index, 28));
  }
  QLORA_INLINE I scale_index(int first, int shift) {
    const __m256i segment = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    return _mm256_srl_epi32(segment, _mm_cvtsi32_si128(shift));
  }
  QLORA_INLINE F expand_scales(const float* s, I index) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(s), index); }
  QLORA_INLINE F dequantize_scales(const uint8_t* codes, const float* map, F nested, F offset) {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    return _mm256_add_ps(_mm256_mul_ps(_mm256_i32gather_ps(map, index, 4), nested), offset);
  }
  // A type of levels (cpu/gemv/levels.h). Byte i of every level, for 32 codes, is one lookup in 16 bytes, and unpacking
  // puts the bytes of a level together: 12 operations for 32 weights, where vpermps takes 20, two of which leave their
  // half of the register for each 8 weights. Two planes, the levels rounded to bfloat16, take 10 cheaper ones.
  static constexpr bool kHasBytePlanes = true, kExactByPlanes = true;
  template <int kPlanes>
  struct ByteLevels {
    static constexpr bool kMultiplied = kPlanes == 2;
    __m256i plane[kPlanes];  // of the last bytes

    explicit ByteLevels(QuantType quant_type) {
      for (int i = 0; i < kPlanes; ++i) {
        alignas(16) uint8_t bytes[16];
        for (int code = 0; code < 16; ++code) {
          const float level = codebook(quant_type)[code];
          const uint32_t bits =
              kMultiplied ? uint32_t{from_float<bf16>(level * level_multiplier(quant_type, DType::kBFloat16)).bits}
                          : bits_of(level);
          bytes[code] = static_cast<uint8_t>(bits >> (8 * i));
        }
        plane[i] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
      }
    }
    // Vectors 0 to 3 have the high nibbles of all bytes, which are the even elements; 4 to 7 the low ones.
    static constexpr int64_t element(int j, int lane) {
      const int q = j % 4, i = lane % 4;
      const int byte = lane / 4 * 16 + (kPlanes == 4 ? 4 * q + i : 8 * (q / 2) + 2 * i + q % 2);
      return 2 * byte + j / 4;
    }
    template <class Fn>
    __attribute__((always_inline)) void for_each(I words, const Fn& fn) const {
      const __m256i mask = _mm256_set1_epi8(0x0F);
      half(0, _mm256_and_si256(_mm256_srli_epi16(words, 4), mask), fn);
      half(4, _mm256_and_si256(words, mask), fn);
    }

   private:
    template <class Fn>
    __attribute__((always_inline)) void half(int j, __m256i codes, const Fn& fn) const {
      if constexpr (kPlanes == 2) {
        const __m256i a = _mm256_shuffle_epi8(plane[0], codes), b = _mm256_shuffle_epi8(plane[1], codes);
        const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
        fn(j, _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)));
        fn(j + 1, _mm256_castsi256_ps(_mm256_and_si256(low, upper)));
        fn(j + 2, _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)));
        fn(j + 3, _mm256_castsi256_ps(_mm256_and_si256(high, upper)));
      } else {
        by_planes(plane, codes, [&](int i, F levels) __attribute__((always_inline)) { fn(j + i, levels); });
      }
    }
  };
  QLORA_INLINE void store_low_bytes(I x, uint8_t* out) {
    const __m256i bytes =
        _mm256_shuffle_epi8(x, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8,
                                                12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m256i joined = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(joined));
  }
  QLORA_INLINE void count_above(F x, const float* thresholds, int count, uint8_t* out) {
    __m256i rank = _mm256_setzero_si256();
    for (int t = 0; t < count; ++t)  // a true comparison yields -1
      rank = _mm256_sub_epi32(rank,
                              _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_broadcast_ss(thresholds + t), _CMP_GT_OQ)));
    store_low_bytes(rank, out);
  }
  QLORA_INLINE void store_bytes(F integral, uint8_t* out) { store_low_bytes(_mm256_cvttps_epi32(integral), out); }
};

}  // namespace
}  // namespace qlora::cpu
