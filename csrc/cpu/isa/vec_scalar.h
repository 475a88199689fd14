// Eight float lanes in plain C++: the vector type for machines without AVX2 or NEON, and the reference for the other
// types.
#pragma once

#include <cmath>
#include <utility>

#include "format/half.h"
#include "format/layout.h"

namespace qlora::cpu {
namespace {

struct VecScalar {
  static constexpr const char* kIsa = "scalar";
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 4;  // the gemm tile has kTileRows x kTileVecs vectors of accumulators
  static constexpr int kTileVecs = 1;
  static constexpr bool kHasTables16 = false, kHasCells = false;  // see vec_avx512.h
  static constexpr bool kHasRuns32 = false;                       // see vec_avx2.h
  static constexpr bool kHasBytePlanes = false;                   // see vec_avx2.h

  struct F {
    float v[kLanes];
  };
  struct I {
    uint32_t v[kLanes];
  };
  struct Table {
    const float* levels;
  };

  template <class Fn>
  QLORA_INLINE F make(Fn fn) {
    F out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = fn(i);
    return out;
  }

  static F zero() {
    return make([](int) { return 0.0f; });
  }
  static F set1(float x) {
    return make([=](int) { return x; });
  }
  // a in the first half of the lanes, b in the other.
  static F halves(float a, float b) {
    return make([=](int i) { return i < kLanes / 2 ? a : b; });
  }
  template <class T>
  static F load(const T* p) {
    return make([=](int i) { return to_float(p[i]); });
  }
  template <class T>
  static void store(T* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(x.v[i]);
  }
  static F add(F a, F b) {
    return make([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F mul(F a, F b) {
    return make([&](int i) { return a.v[i] * b.v[i]; });
  }
  // a * b + c with a rounded product: without FMA hardware, std::fma would take a hundred times as long.
  static F fma(F a, F b, F c) {
    return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F abs(F a) {
    return make([&](int i) { return std::fabs(a.v[i]); });
  }
  // a > b ? a : b ignores a nan in `a`, like the max instruction.
  static F max(F a, F b) {
    return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F min(F a, F b) {
    return make([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F round_even(F a) {
    return make([&](int i) { return std::nearbyintf(a.v[i]); });
  }
  // Sums in a fixed tree: halves, quarters, pairs.
  static float reduce_add(F a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
  }
  static float reduce_max(F a) {
    float m = a.v[0];
    for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
  }

  static void transpose(F (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < i; ++j) std::swap(rows[i].v[j], rows[j].v[i]);
  }

  static Table table(const float* levels) { return {levels}; }
  // Loads `words` 32-bit words of packed bytes; the other lanes are zero.
  static I load_words(const uint8_t* p, int words) {
    I out{};
    std::memcpy(out.v, p, static_cast<size_t>(words) * 4);
    return out;
  }
  // The level of nibble kNibble (bits 4 kNibble … 4 kNibble + 3) of every word.
  template <int kNibble>
  static F lookup(Table t, I words) {
    return make([&](int i) { return t.levels[(words.v[i] >> (4 * kNibble)) & 0xF]; });
  }
  // Unpacks kLanes consecutive weights, in order, from a byte boundary.
  static F unpack_run(Table t, const uint8_t* p) {
    return make([&](int i) { return t.levels[nibble_at(p, i)]; });
  }
  // The levels of kLanes codes, one per byte.
  static F levels_of(Table t, const uint8_t* codes) {
    return make([&](int i) { return t.levels[codes[i]]; });
  }
  // The index of each word's scale: word i lies in segment first + i / 4 of 32 weights; 2^shift segments share a scale.
  static I scale_index(int first, int shift) {
    I out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = static_cast<uint32_t>(first + i / 4) >> shift;
    return out;
  }
  static F expand_scales(const float* s, I index) {
    return make([&](int i) { return s[index.v[i]]; });
  }
  // map[code] * nested + offset, each operation rounded.
  static F dequantize_scales(const uint8_t* codes, const float* map, F nested, F offset) {
    return make([&](int i) {
      const float product = map[codes[i]] * nested.v[i];
      return product + offset.v[i];
    });
  }
  // Counts the thresholds strictly below each lane; one byte per lane.
  static void count_above(F x, const float* thresholds, int count, uint8_t* out) {
    for (int i = 0; i < kLanes; ++i) {
      int rank = 0;
      for (int t = 0; t < count; ++t) rank += x.v[i] > thresholds[t];
      out[i] = static_cast<uint8_t>(rank);
    }
  }
  static void store_bytes(F integral, uint8_t* out) {
    for (int i = 0; i < kLanes; ++i) out[i] = static_cast<uint8_t>(integral.v[i]);
  }
};

}  // namespace
}  // namespace qlora::cpu
