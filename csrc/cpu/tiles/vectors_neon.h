// Vectors of 64 bytes for the kernels on tiles, in four registers of NEON. vectors.h documents them.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "cpu/isa/vec_neon.h"
#include "cpu/tiles/tiles.h"

namespace qlora::cpu {
namespace {

using Vec = VecNeon;
struct Words {
  uint16x8_t v[4];
};
struct Halves {
  uint16x8_t v[2];
};
struct Floats {
  float32x4_t v[4];
};

QLORA_INLINE Floats operator+(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
  return a;
}
QLORA_INLINE Floats operator-(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vsubq_f32(a.v[i], b.v[i]);
  return a;
}
QLORA_INLINE Floats operator*(Floats a, Floats b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
  return a;
}

QLORA_INLINE Words zero_words() { return {}; }
QLORA_INLINE Words load_words(const void* p) {
  Words x;
  for (int i = 0; i < 4; ++i) x.v[i] = vld1q_u16(static_cast<const uint16_t*>(p) + 8 * i);
  return x;
}
QLORA_INLINE void store_words(void* p, Words x) {
  for (int i = 0; i < 4; ++i) vst1q_u16(static_cast<uint16_t*>(p) + 8 * i, x.v[i]);
}
QLORA_INLINE Words load16(const uint16_t* p, int64_t count) {
  if (count >= 32) return load_words(p);
  uint16_t elements[32] = {};
  if (count > 0) std::memcpy(elements, p, static_cast<size_t>(count) * 2);
  return load_words(elements);
}
QLORA_INLINE void store16(uint16_t* p, int64_t count, Words x) {
  if (count >= 32) return store_words(p, x);
  uint16_t elements[32];
  store_words(elements, x);
  if (count > 0) std::memcpy(p, elements, static_cast<size_t>(count) * 2);
}
QLORA_INLINE Halves lower(Words x) { return {{x.v[0], x.v[1]}}; }
QLORA_INLINE Halves upper(Words x) { return {{x.v[2], x.v[3]}}; }
QLORA_INLINE Words join(Halves low, Halves high) { return {{low.v[0], low.v[1], high.v[0], high.v[1]}}; }
QLORA_INLINE void store_halves(void* p, Halves x) {
  for (int i = 0; i < 2; ++i) vst1q_u16(static_cast<uint16_t*>(p) + 8 * i, x.v[i]);
}

QLORA_INLINE Floats spread(float x) {
  const float32x4_t all = vdupq_n_f32(x);
  return {{all, all, all, all}};
}
QLORA_INLINE Floats zero_floats() { return spread(0.0f); }
QLORA_INLINE Floats as_floats(Words x) {
  Floats out;
  for (int i = 0; i < 4; ++i) out.v[i] = vreinterpretq_f32_u16(x.v[i]);
  return out;
}
QLORA_INLINE Floats load_floats(const float* p) {
  Floats x;
  for (int i = 0; i < 4; ++i) x.v[i] = vld1q_f32(p + 4 * i);
  return x;
}
QLORA_INLINE void store_floats(float* p, int64_t count, Floats x) {
  float elements[16];
  float* to = count >= 16 ? p : elements;
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, x.v[i]);
  if (count < 16) std::memcpy(p, elements, static_cast<size_t>(count) * 4);
}
QLORA_INLINE Floats keep_lanes(unsigned lanes, Floats x) {
  const uint32_t bits[4] = {1, 2, 4, 8};
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t keep = vtstq_u32(vdupq_n_u32(lanes >> (4 * i)), vld1q_u32(bits));
    x.v[i] = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x.v[i]), keep));
  }
  return x;
}

QLORA_INLINE uint16x8_t round16(float32x4_t low, float32x4_t high) {
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
}
QLORA_INLINE Halves round16(Floats x) { return {{round16(x.v[0], x.v[1]), round16(x.v[2], x.v[3])}}; }
QLORA_INLINE Words round16(Floats low, Floats high) {
  const Halves a = round16(low), b = round16(high);
  return {{a.v[0], a.v[1], b.v[0], b.v[1]}};
}
QLORA_INLINE Floats widen16(Halves x) {
  Floats out;
  for (int i = 0; i < 4; ++i) {
    const uint16x4_t half = i % 2 == 0 ? vget_low_u16(x.v[i / 2]) : vget_high_u16(x.v[i / 2]);
    out.v[i] = vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  }
  return out;
}

template <class T>
QLORA_INLINE Floats load_elements(const void* data, int64_t at, int64_t count) {
  const T* p = static_cast<const T*>(data) + at;
  T elements[16] = {};
  if (count < 16) {
    std::memcpy(elements, p, static_cast<size_t>(count) * sizeof(T));
    p = elements;
  }
  const Vec::F first = Vec::load(p), second = Vec::load(p + 8);
  return {{first.low, first.high, second.low, second.high}};
}
QLORA_INLINE Floats load_floats(const void* data, DType dtype, int64_t at, int64_t count) {
  switch (dtype) {
    case DType::kBFloat16:
      return load_elements<bf16>(data, at, count);
    case DType::kFloat16:
      return load_elements<fp16>(data, at, count);
    default:
      return load_elements<float>(data, at, count);
  }
}

QLORA_INLINE void transpose(Words (&r)[16]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      float32x4_t x[4];
      for (int l = 0; l < 4; ++l) x[l] = vreinterpretq_f32_u16(r[4 * i + l].v[j]);
      Vec::transpose4(x[0], x[1], x[2], x[3]);
      for (int l = 0; l < 4; ++l) r[4 * i + l].v[j] = vreinterpretq_u16_f32(x[l]);
    }
  // Block (i, j) of 4 x 4 words is in register j of rows 4i … 4i + 3.
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j)
      for (int l = 0; l < 4; ++l) {
        const uint16x8_t below = r[4 * i + l].v[j];
        r[4 * i + l].v[j] = r[4 * j + l].v[i];
        r[4 * j + l].v[i] = below;
      }
}

QLORA_INLINE Words pair_halves(Halves even, Halves odd) {
  return {{vzip1q_u16(even.v[0], odd.v[0]), vzip2q_u16(even.v[0], odd.v[0]), vzip1q_u16(even.v[1], odd.v[1]),
           vzip2q_u16(even.v[1], odd.v[1])}};
}
QLORA_INLINE void pair_rows(Words even, Words odd, Words& first, Words& second) {
  first = pair_halves(lower(even), lower(odd));
  second = pair_halves(upper(even), upper(odd));
}
QLORA_INLINE void pair_eights(Words even, Words odd, Words& first, Words& second) {
  for (int i = 0; i < 4; ++i) {
    first.v[i] = vzip1q_u16(even.v[i], odd.v[i]);
    second.v[i] = vzip2q_u16(even.v[i], odd.v[i]);
  }
}

QLORA_INLINE void nibble_order(const Words (&natural)[4], Words (&out)[4]) {
  for (int q = 0; q < 4; ++q) {
    const uint16x8_t(&x)[4] = natural[q].v;
    const uint16x8_t even_low = vuzp1q_u16(x[0], x[1]), even_high = vuzp1q_u16(x[2], x[3]);
    const uint16x8_t odd_low = vuzp2q_u16(x[0], x[1]), odd_high = vuzp2q_u16(x[2], x[3]);
    out[0].v[q] = vuzp1q_u16(even_low, even_high);
    out[1].v[q] = vuzp1q_u16(odd_low, odd_high);
    out[2].v[q] = vuzp2q_u16(even_low, even_high);
    out[3].v[q] = vuzp2q_u16(odd_low, odd_high);
  }
}
QLORA_INLINE Words nibble_pairs(Words x) {
  for (int i = 0; i < 4; ++i) x.v[i] = vzip1q_u16(x.v[i], vextq_u16(x.v[i], x.v[i], 4));
  return x;
}
QLORA_INLINE void natural_order(Floats (&tiles)[8]) {
  Floats out[8];
  for (int h = 0; h < 2; ++h)
    for (int q = 0; q < 4; ++q) {
      float32x4_t x[4];
      for (int s = 0; s < 4; ++s) x[s] = tiles[2 * s + h].v[q];
      Vec::transpose4(x[0], x[1], x[2], x[3]);
      for (int i = 0; i < 4; ++i) out[2 * q + h].v[i] = x[i];
    }
  for (int i = 0; i < 8; ++i) tiles[i] = out[i];
}

// The levels times a scale in bfloat16, as planes.
QLORA_INLINE Vec::Table16 rounded_table(const Vec::Table& levels, float scale) {
  const Halves table = round16(load_floats(levels.levels) * spread(scale));
  const uint8x16_t a = vreinterpretq_u8_u16(table.v[0]), b = vreinterpretq_u8_u16(table.v[1]);
  return {vuzp1q_u8(a, b), vuzp2q_u8(a, b)};
}
QLORA_INLINE void unpack_chunk(const uint8_t* packed, bool whole, const Vec::Table& levels, float first_scale,
                               float second_scale, Words (&out)[4]) {
  const Vec::Table16 tables[2] = {rounded_table(levels, first_scale), rounded_table(levels, second_scale)};
  for (int i = 0; i < 4; ++i) {
    const Vec::Table16& t = tables[i / 2];
    const uint8x16_t bytes = i < 2 || whole ? vld1q_u8(packed + 16 * i) : vdupq_n_u8(0);
    const uint8x16_t high = vshrq_n_u8(bytes, 4), low = vandq_u8(bytes, vdupq_n_u8(0x0F));
    const uint8x16_t a = vqtbl1q_u8(t.low, high), b = vqtbl1q_u8(t.high, high);
    const uint8x16_t c = vqtbl1q_u8(t.low, low), d = vqtbl1q_u8(t.high, low);
    out[0].v[i] = vreinterpretq_u16_u8(vtrn1q_u8(a, b));
    out[1].v[i] = vreinterpretq_u16_u8(vtrn1q_u8(c, d));
    out[2].v[i] = vreinterpretq_u16_u8(vtrn2q_u8(a, b));
    out[3].v[i] = vreinterpretq_u16_u8(vtrn2q_u8(c, d));
  }
}

}  // namespace
}  // namespace qlora::cpu
