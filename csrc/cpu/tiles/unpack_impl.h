// Unpacks W into tiles of bfloat16, and defines the block sizes of the products on tiles. See tiles.h.
#pragma once

#include <cstring>

#include "cpu/gemv/gemv_impl.h"
#include "cpu/isa/vec_avx512.h"
#include "cpu/tiles/tokens_impl.h"

namespace qlora::cpu {
namespace {

// Block sizes for a core with 48 KiB of L1 and 2 MiB of L2. With a chunk of 256 elements of the reduction, two tiles of
// rows and two of columns fit into L1 together. 512 elements took 1.2 times as long at m = 512, because rows and
// columns evicted each other (docs/notes/cpu-kernels.md).
constexpr int64_t kChunkSteps = 8;
constexpr int64_t kFewItems = 8;  // with fewer items than this, panels get narrower so that every thread has work

// Blocks of tokens in pairs of tiles, as equal as possible, because threads receive equal numbers of items.
struct TokenBlocks {
  int64_t count, tiles;  // tiles: tiles of a block; the last block may have fewer
  TokenBlocks(int64_t m, int64_t most_tiles) {
    count = ceil_div(tiles_of(m), most_tiles);
    tiles = count > 0 ? ceil_div(tiles_of(m), 2 * count) * 2 : 0;
  }
};

// Unpacks 128 weights of a row, or only the first 64 if not `whole`: out[s] holds weights 4i + s. Each half of the
// chunk has a table of the 16 levels times its scale, rounded to bfloat16, so no weight needs its own product.
QLORA_INLINE void unpack_chunk(const uint8_t* packed, bool whole, __m512 levels, float first_scale, float second_scale,
                               __m512i (&out)[4]) {
  const __m512i words = whole ? _mm512_loadu_si512(packed) : _mm512_maskz_loadu_epi64(0x0F, packed);
  const __m512i table =
      round16(_mm512_mul_ps(levels, _mm512_set1_ps(first_scale)), _mm512_mul_ps(levels, _mm512_set1_ps(second_scale)));
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

// Unpacks 128 elements of a row of any weight from `col` on, in natural order, with zeros beyond the end of the row.
void unpack_natural(const WeightView& w, __m512 table, int64_t row, int64_t col, __m512i (&out)[4]) {
  alignas(64) bf16 buffer[kChunk];
  std::memset(buffer, 0, sizeof buffer);
  if (col < w.k) dequantize_run<VecAvx512>(w, table, row * w.k + col, min_i64(kChunk, w.k - col), buffer);
  for (int q = 0; q < 4; ++q) out[q] = _mm512_load_si512(buffer + 32 * q);
}

void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

// Number of low-rank steps of all adapters.
template <class Params>
int64_t all_low_rank_steps(const Params& p) {
  return p.adapters.count * low_rank_steps(p.r, p.lora_dtype);
}

}  // namespace
}  // namespace qlora::cpu
