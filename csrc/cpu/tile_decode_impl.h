// Panels of W as tiles of bfloat16, and how the products on them are blocked. See tile_table.h.
#pragma once

#include <cstring>

#include "cpu/decode_impl.h"
#include "cpu/tile_tokens_impl.h"
#include "cpu/vec_avx512.h"

namespace qlora::cpu {
namespace {

// Blocks for a core with 48 KiB of L1 and 2 MiB of L2. A chunk of the reduction is 256 elements: two tiles of rows and
// two of columns then share L1; 512 took 1.2 times as long at m = 512, because each evicted the other
// (docs/performance.md).
constexpr int64_t kChunkSteps = 8;
constexpr int64_t kFewItems = 8;  // narrower panels below that, for all threads to have some

// Blocks of tokens, as equal as pairs of tiles can be: threads share the items out by their number.
struct TokenBlocks {
  int64_t count, tiles;  // tiles: of a block, but for the last one
  TokenBlocks(int64_t m, int64_t most_tiles) {
    count = ceil_div(tiles_of(m), most_tiles);
    tiles = count > 0 ? ceil_div(tiles_of(m), 2 * count) * 2 : 0;
  }
};

// 128 weights of a row, of which the first 64 may be all that are left: out[s] holds weights 4i + s. A table of the 16
// levels times the scale, rounded to bfloat16, for each half of the chunk; the rest is moving nibbles.
QLORA_INLINE void decode_chunk(const uint8_t* packed, bool whole, __m512 levels, float first_scale, float second_scale,
                               __m512i (&out)[4]) {
  const __m512i words = whole ? _mm512_loadu_si512(packed) : _mm512_maskz_loadu_epi64(0x0F, packed);
  const __m512i table =
      round16(_mm512_mul_ps(levels, _mm512_set1_ps(first_scale)), _mm512_mul_ps(levels, _mm512_set1_ps(second_scale)));
  // vpermw reads five bits: four of a nibble, and the half of the table, which is the half of the vector.
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

// Any weight: the elements of a row from `col` on, in the natural order, zeros behind the row's end.
void decode_natural(const PackedWeight& w, __m512 table, int64_t row, int64_t col, __m512i (&out)[4]) {
  alignas(64) bf16 buffer[kChunk];
  std::memset(buffer, 0, sizeof buffer);
  if (col < w.k) dequantize_span<VecAvx512>(w, table, row * w.k + col, min_i64(kChunk, w.k - col), buffer);
  for (int q = 0; q < 4; ++q) out[q] = _mm512_load_si512(buffer + 32 * q);
}

void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

// Low-rank steps of all adapters together.
template <class Params>
int64_t all_low_rank_steps(const Params& p) {
  return p.adapters.count * low_rank_steps(p.r, p.lora_dtype);
}

}  // namespace
}  // namespace qlora::cpu
