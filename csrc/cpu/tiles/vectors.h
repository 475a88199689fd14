// Vectors of 64 bytes for the kernels on tiles: the width of a row of a tile. Both implementations define
//   Vec: the vector type of the float32 kernels (vec_scalar.h),
//   Words: 64 bytes, 32 elements of 16 bit or 16 words of 32 bit. Halves: 16 elements of 16 bit. Floats: 16 float32,
//     with +, - and *,
//   zero_words, load_words, store_words; lower, upper, join, store_halves; zero_floats, spread, as_floats,
//   load16, store16: the first `count` of 32 elements; a load makes the others zero,
//   load_floats(p), store_floats(p, count, x): 16 float32, or the first `count` of them,
//   load_floats(data, dtype, at, count): the first `count` of 16 numbers of any float type, the others are zero,
//   keep_lanes(lanes, x): lane i of x if bit i is set, else zero,
//   round16(low, high), round16(x): rounds to bfloat16, `low` first. widen16: the inverse.
//
// Orders of elements. The nibble order of 128 elements is that of unpacked weights: vector s holds elements 4i + s.
//   transpose: 16 x 16 words,
//   pair_rows: interleaves 32 elements of two rows into words (even, odd); `first` has columns 0 … 15,
//   pair_eights: the same within each eight columns; `first` has the first four of each,
//   pair_halves: interleaves two rows of 16 elements,
//   nibble_order: from natural to nibble order,
//   nibble_pairs: elements 0 4 1 5 2 6 3 7 of each eight, so that a word holds two neighbours of the nibble order,
//   natural_order: the inverse of what pair_eights makes of the nibble order: column c of tile 2s + h is column
//     32 (c / 4) + 16 h + 4 (c % 4) + s of a chunk,
//   unpack_chunk: unpacks 128 weights of a row, or only the first 64 if not `whole`, in nibble order. Each half of the
//     chunk has a table of the 16 levels times its scale, rounded to bfloat16, so no weight needs its own product.
#pragma once

#if defined(__aarch64__)
#include "cpu/tiles/vectors_neon.h"
#else
#include "cpu/tiles/vectors_avx512.h"
#endif

namespace qlora::cpu {
namespace {

// The remainder x - high, rounded to bfloat16.
QLORA_INLINE Halves rest16(Floats x, Halves high) { return round16(x - widen16(high)); }

// Where 128 elements in nibble order are only the last 64 of a row, the lower half of each vector has them. Moves them
// to the first two vectors, which are then two steps: out[s] holds elements 4i + 2s, and 4i + 2s + 1 in its upper half.
QLORA_INLINE void join_half_chunk(Words (&words)[4]) {
  words[0] = join(lower(words[0]), lower(words[1]));
  words[1] = join(lower(words[2]), lower(words[3]));
}

QLORA_INLINE void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

}  // namespace
}  // namespace qlora::cpu
