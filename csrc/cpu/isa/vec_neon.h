// Eight float lanes in two registers of NEON (64-bit ARM). vec_scalar.h documents the interface.
//
// A table of levels is kept as planes: plane b holds byte b of every level, so that one instruction (tbl) looks up one
// byte of 16 codes. Interleaving the bytes of all planes gives the levels.
#pragma once

#include <arm_neon.h>

#include <type_traits>

#include "format/half.h"
#include "format/layout.h"
#include "format/nf4_cells.h"

namespace qlora::cpu {
namespace {

// Planes of the thresholds above each code, and the first code of each cell.
struct Nf4Planes {
  uint8_t threshold[4][kLevels];
  uint8_t code[kNf4Cells];
};
constexpr Nf4Planes make_nf4_planes() {
  Nf4Planes planes{};
  for (int code = 0; code < kLevels; ++code) {
    const float above = code + 1 < kLevels ? kNf4Thresholds.value[code] : __builtin_huge_valf();
    const auto bits = __builtin_bit_cast(uint32_t, above);
    for (int b = 0; b < 4; ++b) planes.threshold[b][code] = static_cast<uint8_t>(bits >> (8 * b));
  }
  for (int cell = 0; cell < kNf4Cells; ++cell) planes.code[cell] = static_cast<uint8_t>(kNf4CellTable.code[cell]);
  return planes;
}
constexpr Nf4Planes kNf4Planes = make_nf4_planes();

struct VecNeon {
  static constexpr const char* kIsa = "neon";
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 4;  // 4 x 3 x 2 accumulators + 3 x 2 columns + 1 broadcast use 31 of 32 registers
  static constexpr int kTileVecs = 3;
  static constexpr bool kHasBytePlanes = false;  // `lookup` has planes too, and gives exact levels for all tokens

  struct F {
    float32x4_t low, high;
  };
  struct I {
    uint8x16_t low, high;
  };
  struct Table {
    uint8x16_t plane[4];
    const float* levels;
  };

  QLORA_INLINE F zero() { return set1(0.0f); }
  QLORA_INLINE F set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  QLORA_INLINE F halves(float a, float b) { return {vdupq_n_f32(a), vdupq_n_f32(b)}; }
  QLORA_INLINE F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  QLORA_INLINE F load(const bf16* p) {
    const uint16x8_t half = vld1q_u16(reinterpret_cast<const uint16_t*>(p));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(half, 16))};
  }
  QLORA_INLINE F load(const fp16* p) {
    const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
  }
  QLORA_INLINE void store(float* p, F x) {
    vst1q_f32(p, x.low);
    vst1q_f32(p + 4, x.high);
  }
  QLORA_INLINE void store(bf16* p, F x) { vst1q_u16(reinterpret_cast<uint16_t*>(p), round_to<bf16>(x)); }
  QLORA_INLINE void store(fp16* p, F x) { vst1q_u16(reinterpret_cast<uint16_t*>(p), round_to<fp16>(x)); }
  QLORA_INLINE F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  QLORA_INLINE F mul(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  QLORA_INLINE F fma(F a, F b, F c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
  QLORA_INLINE F abs(F a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }
  // Not fmax and fmin, which return a nan of either argument.
  QLORA_INLINE F max(F a, F b) {
    return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
  }
  QLORA_INLINE F min(F a, F b) {
    return {vbslq_f32(vcltq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcltq_f32(a.high, b.high), a.high, b.high)};
  }
  QLORA_INLINE F round_even(F a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
  QLORA_INLINE float reduce_add(F a) {
    const float32x4_t halves = vaddq_f32(a.low, a.high);
    return vaddv_f32(vadd_f32(vget_low_f32(halves), vget_high_f32(halves)));
  }
  QLORA_INLINE float reduce_max(F a) { return vmaxvq_f32(vmaxq_f32(a.low, a.high)); }

  QLORA_INLINE Table table(const float* levels) {
    const uint8x16x4_t planes = vld4q_u8(reinterpret_cast<const uint8_t*>(levels));
    return {{planes.val[0], planes.val[1], planes.val[2], planes.val[3]}, levels};
  }
  // `words` is 4 or 8, because a row has whole segments of 32 weights.
  QLORA_INLINE I load_words(const uint8_t* p, int words) {
    return {vld1q_u8(p), words == kLanes ? vld1q_u8(p + 16) : vdupq_n_u8(0)};
  }
  // Looks up the nibbles of all 16 bytes, then keeps those of one byte of each word. The compiler shares the lookups of
  // the four nibbles that lie in the same half of their bytes.
  template <int kNibble>
  QLORA_INLINE float32x4_t lookup(const Table& t, uint8x16_t bytes) {
    const uint8x16_t code = kNibble % 2 == 0 ? vandq_u8(bytes, vdupq_n_u8(0x0F)) : vshrq_n_u8(bytes, 4);
    uint8x16_t plane[4];
    for (int b = 0; b < 4; ++b) plane[b] = vqtbl1q_u8(t.plane[b], code);
    constexpr int kByte = kNibble / 2;
    const uint8x16_t low = kByte % 2 == 0 ? vtrn1q_u8(plane[0], plane[1]) : vtrn2q_u8(plane[0], plane[1]);
    const uint8x16_t high = kByte % 2 == 0 ? vtrn1q_u8(plane[2], plane[3]) : vtrn2q_u8(plane[2], plane[3]);
    const uint16x8_t a = vreinterpretq_u16_u8(low), b = vreinterpretq_u16_u8(high);
    return vreinterpretq_f32_u16(kByte < 2 ? vtrn1q_u16(a, b) : vtrn2q_u16(a, b));
  }
  template <int kNibble>
  QLORA_INLINE F lookup(const Table& t, I words) {
    return {lookup<kNibble>(t, words.low), lookup<kNibble>(t, words.high)};
  }
  QLORA_INLINE F unpack_run(const Table& t, const uint8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(word));
    return levels_of(t.plane, vzip1_u8(vshr_n_u8(bytes, 4), vand_u8(bytes, vdup_n_u8(0x0F))));
  }
  QLORA_INLINE F levels_of(const Table& t, const uint8_t* codes) { return levels_of(t.plane, vld1_u8(codes)); }

  // Transposes 4 x 4 numbers: lane l of row i becomes lane i of row l.
  QLORA_INLINE void transpose4(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
    const float64x2_t ab_even = vreinterpretq_f64_f32(vtrn1q_f32(a, b)),
                      ab_odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t cd_even = vreinterpretq_f64_f32(vtrn1q_f32(c, d)),
                      cd_odd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    a = vreinterpretq_f32_f64(vtrn1q_f64(ab_even, cd_even));
    b = vreinterpretq_f32_f64(vtrn1q_f64(ab_odd, cd_odd));
    c = vreinterpretq_f32_f64(vtrn2q_f64(ab_even, cd_even));
    d = vreinterpretq_f32_f64(vtrn2q_f64(ab_odd, cd_odd));
  }
  QLORA_INLINE void transpose(F (&r)[kLanes]) {
    for (int i = 0; i < kLanes; i += 4) {
      transpose4(r[i].low, r[i + 1].low, r[i + 2].low, r[i + 3].low);
      transpose4(r[i].high, r[i + 1].high, r[i + 2].high, r[i + 3].high);
    }
    for (int i = 0; i < 4; ++i) {
      const float32x4_t upper_right = r[i].high;
      r[i].high = r[i + 4].low;
      r[i + 4].low = upper_right;
    }
  }

  static constexpr bool kHasTables16 = true;  // see vec_avx512.h
  static constexpr bool kHasRuns32 = false;   // see vec_avx2.h
  struct Table16 {
    uint8x16_t low, high;  // planes of 16-bit levels
  };
  template <class T>
  QLORA_INLINE Table16 scaled_table(const Table& t, F scale) {
    const uint8x16_t a = vreinterpretq_u8_u16(round_to<T>(mul(load(t.levels), scale)));
    const uint8x16_t b = vreinterpretq_u8_u16(round_to<T>(mul(load(t.levels + 8), scale)));
    return {vuzp1q_u8(a, b), vuzp2q_u8(a, b)};
  }
  QLORA_INLINE void unpack_by_table(Table16 t, const uint8_t* p, void* out) {
    const uint8x16_t bytes = vld1q_u8(p), first = vshrq_n_u8(bytes, 4), second = vandq_u8(bytes, vdupq_n_u8(0x0F));
    const uint8x16_t codes[2] = {vzip1q_u8(first, second), vzip2q_u8(first, second)};
    auto* to = static_cast<uint8_t*>(out);
    for (int i = 0; i < 2; ++i, to += 32) {
      const uint8x16_t low = vqtbl1q_u8(t.low, codes[i]), high = vqtbl1q_u8(t.high, codes[i]);
      vst1q_u8(to, vzip1q_u8(low, high));
      vst1q_u8(to + 16, vzip2q_u8(low, high));
    }
  }

  // The words of one register lie in one segment, so they have one scale.
  struct ScaleIndex {
    int low, high;
  };
  QLORA_INLINE ScaleIndex scale_index(int first, int shift) { return {first >> shift, (first + 1) >> shift}; }
  QLORA_INLINE F expand_scales(const float* s, ScaleIndex index) {
    return {vdupq_n_f32(s[index.low]), vdupq_n_f32(s[index.high])};
  }
  QLORA_INLINE F dequantize_scales(const uint8_t* codes, const float* map, F nested, F offset) {
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = map[codes[i]];
    return add(mul(load(values), nested), offset);
  }

  // NF4 codes (format/nf4_cells.h): a fused multiply-add finds the cell, a lookup its first code. If the cell has a
  // threshold, it is the one above that code.
  static constexpr bool kHasCells = true;
  QLORA_INLINE uint8x8_t nf4_codes(F x) {
    const F place = fma(max(x, set1(-1.0f)), set1(kNf4CellsPerUnit), set1(kNf4CellMagic));
    const uint8x8_t cell =
        vand_u8(low_bytes(vreinterpretq_u32_f32(place.low), vreinterpretq_u32_f32(place.high)), vdup_n_u8(0x1F));
    const uint8x8_t code = vqtbl2_u8({{vld1q_u8(kNf4Planes.code), vld1q_u8(kNf4Planes.code + 16)}}, cell);
    uint8x16_t plane[4];
    for (int b = 0; b < 4; ++b) plane[b] = vld1q_u8(kNf4Planes.threshold[b]);
    const F threshold = levels_of(plane, code);
    return vsub_u8(code, low_bytes(vcgtq_f32(x.low, threshold.low), vcgtq_f32(x.high, threshold.high)));
  }
  QLORA_INLINE void pack_codes(uint8x8_t x, uint8x8_t y, uint8_t* out) {
    vst1_u8(out, vsli_n_u8(vuzp2_u8(x, y), vuzp1_u8(x, y), 4));
  }
  QLORA_INLINE void count_above(F x, const float* thresholds, int count, uint8_t* out) {
    uint32x4_t low = vdupq_n_u32(0), high = low;
    for (int t = 0; t < count; ++t) {  // a true comparison yields -1
      const float32x4_t threshold = vdupq_n_f32(thresholds[t]);
      low = vsubq_u32(low, vcgtq_f32(x.low, threshold));
      high = vsubq_u32(high, vcgtq_f32(x.high, threshold));
    }
    vst1_u8(out, low_bytes(low, high));
  }
  QLORA_INLINE void store_bytes(F integral, uint8_t* out) {
    vst1_u8(out, low_bytes(vcvtq_u32_f32(integral.low), vcvtq_u32_f32(integral.high)));
  }

 private:
  QLORA_INLINE uint8x8_t low_bytes(uint32x4_t low, uint32x4_t high) {
    return vmovn_u16(vuzp1q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high)));
  }
  QLORA_INLINE F levels_of(const uint8x16_t (&plane)[4], uint8x8_t codes) {
    const uint8x16_t index = vcombine_u8(codes, codes);
    uint8x16_t byte[4];
    for (int b = 0; b < 4; ++b) byte[b] = vqtbl1q_u8(plane[b], index);
    const uint16x8_t low = vreinterpretq_u16_u8(vzip1q_u8(byte[0], byte[1]));
    const uint16x8_t high = vreinterpretq_u16_u8(vzip1q_u8(byte[2], byte[3]));
    return {vreinterpretq_f32_u16(vzip1q_u16(low, high)), vreinterpretq_f32_u16(vzip2q_u16(low, high))};
  }
  // Uses integer operations: bfcvt, which few processors have, is left to neonbf16.
  QLORA_INLINE uint32x4_t bfloat16_in_upper_half(float32x4_t x) {
    const uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    return vbslq_u32(vceqq_f32(x, x), rounded, vorrq_u32(u, vdupq_n_u32(0x400000)));
  }
  template <class T>
  QLORA_INLINE uint16x8_t round_to(F x) {
    if constexpr (std::is_same_v<T, bf16>) {
      return vuzp2q_u16(vreinterpretq_u16_u32(bfloat16_in_upper_half(x.low)),
                        vreinterpretq_u16_u32(bfloat16_in_upper_half(x.high)));
    } else {
      return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.low), x.high));
    }
  }
};

}  // namespace
}  // namespace qlora::cpu
