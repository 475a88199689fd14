// Many bfloat16 tokens: panels of W are decoded into tiles that stay in L2, and multiplied with all tokens of a block;
// the low-rank term is a few more steps of the same sums. Included by isa_amx.cpp alone.
#pragma once

#include <cstring>

#include "cpu/amx_tokens_impl.h"
#include "cpu/decode_impl.h"
#include "cpu/vec_avx512.h"

namespace qlora::cpu {
namespace {

// Blocks for a core with 48 KiB of L1 and 2 MiB of L2. A chunk of the reduction is 256 elements: two tiles of rows and
// two of columns then share L1; 512 took 1.2 times as long at m = 512, because each evicted the other
// (docs/performance.md).
constexpr int64_t kChunkSteps = 8;
constexpr int64_t kBlockTokenTiles = 32;  // 512 tokens: their chunk, 256 KiB, and the results of a panel stay in L2
constexpr int64_t kFewItems = 8;          // narrower panels below that, for all threads to have some

// 128 weights of a row, of which the first 64 may be all that are left: out[s] holds weights 4i + s. A table of the 16
// levels times the scale, rounded to bfloat16, for each half of the chunk; the rest is moving nibbles.
QLORA_INLINE void decode_chunk(const uint8_t* packed, bool whole, __m512 levels, float first_scale, float second_scale,
                               __m512i (&out)[4]) {
  const __m512i words = whole ? _mm512_loadu_si512(packed) : _mm512_maskz_loadu_epi64(0x0F, packed);
  const __m512i table =
      round16(_mm512_mul_ps(levels, _mm512_set1_ps(first_scale)), _mm512_mul_ps(levels, _mm512_set1_ps(second_scale)));
  const __m512i nibble = _mm512_set1_epi16(0x0F);
  const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  constexpr int kAndOr = 0xEA;  // (a & b) | c
  out[0] =
      _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), nibble, half, kAndOr), table);
  out[1] = _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(words, nibble, half, kAndOr), table);
  out[2] =
      _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 12), nibble, half, kAndOr), table);
  out[3] =
      _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 8), nibble, half, kAndOr), table);
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

// ---- forward: rows of W are row tiles, results [rows, tokens] ----

int64_t panel_tiles(int64_t tiles, int64_t most) {
  const int64_t wanted = ceil_div(ceil_div(tiles, kFewItems), 2) * 2;
  return wanted < 2 ? 2 : wanted < most ? wanted : most;
}
constexpr int64_t kForwardPanelTiles = 8;
int64_t forward_panel_tiles(const Forward16Params& p) { return panel_tiles(tiles_of(p.weight.n), kForwardPanelTiles); }
int64_t forward_items(const Forward16Params& p) {
  return ceil_div(tiles_of(p.weight.n), forward_panel_tiles(p)) * ceil_div(tiles_of(p.m), kBlockTokenTiles);
}

// Scales of 64 weights each for a row of a panel; one more for an odd half chunk, and what decode_row_scales writes
// behind.
int64_t row_segments(const PackedWeight& w) { return ceil_div(w.k, kChunk) * 2; }

// Low-rank steps of all adapters together.
template <class Params>
int64_t all_low_rank_steps(const Params& p) {
  return p.adapters.count * low_rank_steps(p.r, p.lora_dtype);
}

int64_t forward_scratch(const Forward16Params& p) {
  const int64_t rows = forward_panel_tiles(p) * kTile;
  const int64_t steps = kChunkSteps + all_low_rank_steps(p);
  return rows * row_segments(p.weight) + row_scales_floats<VecAvx512>(p.weight.k) + 16 +
         (2 * steps + forward_panel_tiles(p) * kBlockTokenTiles) * kTileFloats;
}

// Rows of one segment after the other; row_scales is room for one row in blocks.
void decode_segments(const PackedWeight& w, int64_t row0, int64_t rows, float* row_scales, float* segments) {
  const int64_t count = row_segments(w), used = w.k / 64;
  for (int64_t i = 0; i < rows; ++i, segments += count) {
    if (w.block_shift ==
        6) {  // a block is a segment; what is written behind the last one is the next row's, or row_scales
      decode_row_scales<VecAvx512>(w, row0 + i, segments);
    } else {
      decode_row_scales<VecAvx512>(w, row0 + i, row_scales);
      const int64_t first = ((row0 + i) * w.k) >> w.block_shift;
      for (int64_t g = 0; g < used; ++g)
        segments[g] = row_scales[(((row0 + i) * w.k + g * 64) >> w.block_shift) - first];
    }
    if (used < count) segments[used] = 0.0f;
  }
}

// Steps [s0, s0 + now) of a row of W as a row of row tiles.
void decode_row(const PackedWeight& w, __m512 levels, int64_t row, const float* segments, int64_t s0, int64_t now,
                uint8_t* out) {
  const int64_t col0 = s0 * kStep, whole = min_i64(now * kStep, w.k - col0) / kChunk;
  const uint8_t* packed = w.packed + (row * w.k + col0) / 2;
  segments += s0 / 2;
  __m512i words[4];
  for (int64_t c = 0; c < whole; ++c, packed += kChunk / 2, segments += 2, out += 4 * kTileBytes) {
    decode_chunk(packed, true, levels, segments[0], segments[1], words);
    for (int s = 0; s < 4; ++s) _mm512_store_si512(out + s * kTileBytes, words[s]);
  }
  if (whole * 4 < now) {
    decode_chunk(packed, false, levels, segments[0], 0.0f, words);
    for (int s = 0; s < 4; ++s) _mm512_store_si512(out + s * kTileBytes, words[s]);
  }
}

// Row `row` of lora_b as the elements that meet the low-rank steps of the tokens.
void pack_low_rank_row(const Forward16Params& p, int64_t row, uint8_t* out) {
  const int64_t ranks = tiles_of(p.r), extra = low_rank_steps(p.r, p.lora_dtype);
  for (int64_t s = 0; s < p.adapters.count * extra; ++s)
    _mm512_storeu_si512(out + s * kTileBytes, _mm512_setzero_si512());
  if (row >= p.weight.n) return;
  for (int64_t a = 0; a < p.adapters.count; ++a, out += extra * kTileBytes)
    for (int64_t q = 0; q < ranks; ++q) {
      const int64_t from = p.adapters.id(a) * p.adapter_stride + row * p.r + q * kTile;
      const __m512 values = load_floats(p.lora_b, p.lora_dtype, from, p.r - q * kTile);
      const __m256i high = round16(values), low = rest16(values, high);
      for (int64_t part = 0; part < low_rank_parts(p.lora_dtype); ++part) {
        const int64_t at = (part * ranks + q) * kTile;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at / kStep * kTileBytes + at % kStep * 2),
                            part == 2 ? low : high);
      }
    }
}

// Results of up to 32 rows and 16 tokens, transposed, with bias, rounded.
void store_transposed(const Forward16Params& p, const float* c, int64_t c_pitch, int64_t row0, int64_t token0) {
  __m512i low[16], high[16];
  const int64_t rows = p.weight.n - row0, tokens = min_i64(kTile, p.m - token0);
  for (int i = 0; i < 16; ++i) low[i] = _mm512_loadu_si512(c + 16 * i);
  transpose(low);
  if (rows > kTile) {
    for (int i = 0; i < 16; ++i) high[i] = _mm512_loadu_si512(c + c_pitch + 16 * i);
    transpose(high);
  }
  __m512 bias_low = _mm512_setzero_ps(), bias_high = bias_low;
  if (p.bias != nullptr) {
    bias_low = load_floats(p.bias, p.bias_dtype, row0, rows);
    if (rows > kTile) bias_high = load_floats(p.bias, p.bias_dtype, row0 + kTile, rows - kTile);
  }
  auto* y = static_cast<uint16_t*>(p.y) + token0 * p.weight.n + row0;
  for (int64_t t = 0; t < tokens; ++t, y += p.weight.n) {
    const __m512 a = _mm512_add_ps(_mm512_castsi512_ps(low[t]), bias_low);
    const __m512 b = rows > kTile ? _mm512_add_ps(_mm512_castsi512_ps(high[t]), bias_high) : _mm512_setzero_ps();
    _mm512_mask_storeu_epi16(y, mask32(rows), round16(a, b));
  }
}

void forward(const Forward16Params& p, int64_t begin, int64_t end, float* scratch) {
  const TileScope scope;
  const PackedWeight& w = p.weight;
  const int64_t steps = steps_of(w.k), extra = all_low_rank_steps(p), pitch = token_steps(w.k, extra) * kTileBytes;
  const int64_t most = forward_panel_tiles(p), panels = ceil_div(tiles_of(w.n), most), segments = row_segments(w);
  float* scales = scratch;
  float* row_scales = scales + most * kTile * segments;
  auto* panel = reinterpret_cast<uint8_t*>(row_scales + ceil_div(row_scales_floats<VecAvx512>(w.k), 16) * 16);
  const int64_t panel_pitch = (kChunkSteps + extra) * kTileBytes;
  auto* results = reinterpret_cast<float*>(panel + 2 * panel_pitch);
  const int64_t results_pitch = kBlockTokenTiles * kTileFloats;
  const __m512 levels = _mm512_loadu_ps(w.levels);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile0 = item % panels * most, tiles = min_i64(most, tiles_of(w.n) - tile0), row0 = tile0 * kTile;
    const int64_t rows = min_i64(tiles * kTile, w.n - row0);
    const int64_t token0 = item / panels * kBlockTokenTiles;
    const int64_t tokens = min_i64(kBlockTokenTiles, tiles_of(p.m) - token0);
    const uint8_t* columns = p.columns + token0 * pitch;
    if (p.by_nibble) decode_segments(w, row0, rows, row_scales, scales);

    int64_t s0 = 0;
    do {  // once without a reduction: the bias and the low-rank term
      const int64_t now = min_i64(kChunkSteps, steps - s0);
      const bool is_last = s0 + now == steps;
      const int64_t sum_steps = now + (is_last ? extra : 0);
      for (int64_t i = 0; i < tiles; i += 2) {  // two tiles of rows: decoded into L1, then multiplied with all tokens
        const int64_t is = min_i64(2, tiles - i);
        for (int64_t local = 0; local < is * kTile; ++local) {
          const int64_t panel_row = i * kTile + local, row = row0 + panel_row;
          uint8_t* out = panel + local / kTile * panel_pitch + local % kTile * 64;
          if (panel_row >= rows) {
            for (int64_t s = 0; s < now; ++s) _mm512_store_si512(out + s * kTileBytes, _mm512_setzero_si512());
          } else if (p.by_nibble) {
            decode_row(w, levels, row, scales + panel_row * segments, s0, now, out);
            // The same row's next stretch, or that of the next panel.
            const int64_t ahead =
                is_last ? min_i64(row + most * kTile, w.n - 1) * w.k : row * w.k + (s0 + kChunkSteps) * kStep;
            prefetch(w.packed + ahead / 2, kChunkSteps * kStep / 2);
          } else {
            for (int64_t c = 0; c < now / 4; ++c) {
              __m512i words[4];
              decode_natural(w, levels, row, s0 * kStep + c * kChunk, words);
              for (int s = 0; s < 4; ++s) _mm512_store_si512(out + (c * 4 + s) * kTileBytes, words[s]);
            }
          }
          if (is_last && extra > 0) pack_low_rank_row(p, row, out + now * kTileBytes);
        }
        for (int64_t j = 0; j < tokens; j += 2) {
          const int64_t js = min_i64(2, tokens - j);
          float* c = results + i * results_pitch + j * kTileFloats;
          multiply_any(is, js, panel, panel_pitch, columns + j * pitch + s0 * kTileBytes, pitch, sum_steps, s0 == 0, c,
                       results_pitch);
          if (is_last)
            for (int64_t t = 0; t < js; ++t)
              store_transposed(p, c + t * kTileFloats, results_pitch, row0 + i * kTile, (token0 + j + t) * kTile);
        }
      }
      s0 += kChunkSteps;
    } while (s0 < steps);
  }
}

// ---- backward: tokens are row tiles, two rows of W are paired in column tiles, results [tokens, columns] ----

constexpr int64_t kBackwardPanelChunks = 2;  // of 128 columns
constexpr int64_t kChunkTiles = 8;           // column tiles of a chunk

int64_t backward_panel_chunks(const Backward16Params& p) {
  return ceil_div(p.weight.k, kChunk) >= kFewItems * kBackwardPanelChunks ? kBackwardPanelChunks : 1;
}
int64_t backward_items(const Backward16Params& p) {
  return ceil_div(ceil_div(p.weight.k, kChunk), backward_panel_chunks(p)) * ceil_div(tiles_of(p.m), kBlockTokenTiles);
}
int64_t backward_scratch(const Backward16Params& p) {
  const int64_t tiles = backward_panel_chunks(p) * kChunkTiles;
  return tiles * (kChunkSteps + all_low_rank_steps(p) + kBlockTokenTiles) * kTileFloats;
}

// Two rows of 128 columns as row `pair` of eight column tiles, `pitch` bytes apart. By nibble, tile 2s + h holds
// columns 32 (c / 4) + 16 h + 4 (c % 4) + s; else tile t holds columns 16 t + c.
QLORA_INLINE void store_pair(const __m512i (&even)[4], const __m512i (&odd)[4], bool by_nibble, uint8_t* out,
                             int64_t pitch) {
  for (int s = 0; s < 4; ++s) {
    __m512i first, second;
    if (by_nibble) {
      first = _mm512_unpacklo_epi16(even[s], odd[s]);
      second = _mm512_unpackhi_epi16(even[s], odd[s]);
    } else {
      pair_rows(even[s], odd[s], first, second);
    }
    _mm512_store_si512(out + 2 * s * pitch, first);
    _mm512_store_si512(out + (2 * s + 1) * pitch, second);
  }
}

// A step of the reduction (32 rows of W) for `count` chunks of columns.
void decode_pairs(const Backward16Params& p, __m512 levels, int64_t step, int64_t chunk0, int64_t count, uint8_t* out,
                  int64_t pitch) {
  const PackedWeight& w = p.weight;
  const int64_t col0 = chunk0 * kChunk;
  for (int64_t pair = 0; pair < kTile; ++pair) {
    const int64_t row = step * kStep + 2 * pair;
    if (p.by_nibble) {  // the rows of this place in the next step
      for (int64_t i = kStep; i < kStep + 2; ++i)
        prefetch(w.packed + (min_i64(row + i, w.n - 1) * w.k + col0) / 2, count * kChunk / 2);
    }
    for (int64_t c = 0; c < count; ++c) {
      const int64_t col = col0 + c * kChunk;
      const bool whole = col + kChunk <= w.k;
      __m512i words[2][4] = {};
      for (int i = 0; i < 2; ++i) {
        if (row + i >= w.n) continue;
        if (p.by_nibble) {
          const int64_t at = (row + i) * w.k + col;
          const float first = scale_of_block(w.scales, at >> w.block_shift);
          const float second = whole ? scale_of_block(w.scales, (at + 64) >> w.block_shift) : 0.0f;
          decode_chunk(w.packed + at / 2, whole, levels, first, second, words[i]);
        } else {
          decode_natural(w, levels, row + i, col, words[i]);
        }
      }
      store_pair(words[0], words[1], p.by_nibble, out + c * kChunkTiles * pitch + pair * 64, pitch);
    }
  }
}

// lora_a as the low-rank steps of a chunk of columns.
void pack_low_rank_columns(const Backward16Params& p, int64_t chunk, uint8_t* out, int64_t pitch) {
  const int64_t ranks = tiles_of(p.r), col = chunk * kChunk, count = min_i64(kChunk, p.weight.k - col);
  for (int64_t t = 0; t < kChunkTiles; ++t)
    std::memset(out + t * pitch, 0, static_cast<size_t>(all_low_rank_steps(p) * kTileBytes));
  for (int64_t a = 0; a < p.adapters.count; ++a, out += low_rank_steps(p.r, p.lora_dtype) * kTileBytes)
    for (int64_t pair = 0; pair < ranks * kTile / 2; ++pair) {
      __m512i high[2][4], low[2][4];
      for (int i = 0; i < 2; ++i) {
        const int64_t rank = 2 * pair + i, from = p.adapters.id(a) * p.adapter_stride + rank * p.weight.k + col;
        load_chunk(p.lora_a, p.lora_dtype, rank < p.r ? from : 0, rank < p.r ? count : 0, p.by_nibble, high[i], low[i]);
      }
      for (int64_t part = 0; part < low_rank_parts(p.lora_dtype); ++part) {
        uint8_t* to = out + (part * ranks * (kTile / 2) + pair) * 64;
        if (part == 2)
          store_pair(low[0], low[1], p.by_nibble, to, pitch);
        else
          store_pair(high[0], high[1], p.by_nibble, to, pitch);
      }
    }
}

// Results of 16 tokens and 128 columns: eight tiles, neighbours.
void store_columns(const Backward16Params& p, const float* c, int64_t token0, int64_t chunk) {
  const int64_t k = p.weight.k, col = chunk * kChunk, tokens = min_i64(kTile, p.m - token0);
  auto* dx = static_cast<uint16_t*>(p.dx) + token0 * k + col;
  for (int64_t t = 0; t < tokens; ++t, dx += k) {
    __m512 natural[8];
    for (int i = 0; i < 8; ++i) natural[i] = _mm512_loadu_ps(c + i * kTileFloats + t * 16);
    if (p.by_nibble) {
      __m512 out[8];
      for (int h = 0; h < 2; ++h) {
        const __m512 a = natural[h], b = natural[2 + h], d = natural[4 + h], e = natural[6 + h];
        const __m512 ab_low = _mm512_unpacklo_ps(a, b), ab_high = _mm512_unpackhi_ps(a, b);
        const __m512 de_low = _mm512_unpacklo_ps(d, e), de_high = _mm512_unpackhi_ps(d, e);
        const auto join = [](__m512 x, __m512 y, bool upper) {
          const __m512d v = upper ? _mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))
                                  : _mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y));
          return _mm512_castpd_ps(v);
        };
        // In 128-bit lane l of r[i]: columns 32 l + 16 h + 4 i … + 3.
        const __m512 r0 = join(ab_low, de_low, false), r1 = join(ab_low, de_low, true);
        const __m512 r2 = join(ab_high, de_high, false), r3 = join(ab_high, de_high, true);
        const __m512 r01_even = _mm512_shuffle_f32x4(r0, r1, 0x88), r01_odd = _mm512_shuffle_f32x4(r0, r1, 0xDD);
        const __m512 r23_even = _mm512_shuffle_f32x4(r2, r3, 0x88), r23_odd = _mm512_shuffle_f32x4(r2, r3, 0xDD);
        out[h] = _mm512_shuffle_f32x4(r01_even, r23_even, 0x88);
        out[4 + h] = _mm512_shuffle_f32x4(r01_even, r23_even, 0xDD);
        out[2 + h] = _mm512_shuffle_f32x4(r01_odd, r23_odd, 0x88);
        out[6 + h] = _mm512_shuffle_f32x4(r01_odd, r23_odd, 0xDD);
      }
      for (int i = 0; i < 8; ++i) natural[i] = out[i];
    }
    for (int q = 0; q < 4; ++q)
      _mm512_mask_storeu_epi16(dx + 32 * q, mask32(k - col - 32 * q), round16(natural[2 * q], natural[2 * q + 1]));
  }
}

void backward(const Backward16Params& p, int64_t begin, int64_t end, float* scratch) {
  const TileScope scope;
  const PackedWeight& w = p.weight;
  const int64_t all_steps = steps_of(w.n), extra = all_low_rank_steps(p);
  const int64_t pitch = p.row_steps * kTileBytes;
  const int64_t steps = w.packed != nullptr ? all_steps : 0;
  const uint8_t* token_rows = p.rows + (all_steps - steps) * kTileBytes;
  const int64_t most = backward_panel_chunks(p), chunks = ceil_div(w.k, kChunk), panels = ceil_div(chunks, most);
  auto* panel = reinterpret_cast<uint8_t*>(scratch);
  const int64_t panel_pitch = (kChunkSteps + extra) * kTileBytes;
  auto* results = reinterpret_cast<float*>(panel + most * kChunkTiles * panel_pitch);
  const int64_t results_pitch = most * kChunkTiles * kTileFloats;
  const __m512 levels = w.levels != nullptr ? _mm512_loadu_ps(w.levels) : _mm512_setzero_ps();

  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk0 = item % panels * most, count = min_i64(most, chunks - chunk0);
    const int64_t token0 = item / panels * kBlockTokenTiles;
    const int64_t tokens = min_i64(kBlockTokenTiles, tiles_of(p.m) - token0);
    const uint8_t* rows = token_rows + token0 * pitch;
    int64_t s0 = 0;
    do {
      const int64_t now = min_i64(kChunkSteps, steps - s0);
      const bool is_last = s0 + now == steps;
      for (int64_t s = 0; s < now; ++s)
        decode_pairs(p, levels, s0 + s, chunk0, count, panel + s * kTileBytes, panel_pitch);
      for (int64_t c = 0; c < count && is_last && extra > 0; ++c)
        pack_low_rank_columns(p, chunk0 + c, panel + c * kChunkTiles * panel_pitch + now * kTileBytes, panel_pitch);
      const int64_t sum_steps = now + (is_last ? extra : 0);
      for (int64_t i = 0; i < tokens; i += 2)
        for (int64_t j = 0; j < count * kChunkTiles; j += 2)
          multiply_any(min_i64(2, tokens - i), 2, rows + i * pitch + s0 * kTileBytes, pitch, panel + j * panel_pitch,
                       panel_pitch, sum_steps, s0 == 0, results + i * results_pitch + j * kTileFloats, results_pitch);
      s0 += kChunkSteps;
    } while (s0 < steps);
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t c = 0; c < count; ++c)
        store_columns(p, results + i * results_pitch + c * kChunkTiles * kTileFloats, (token0 + i) * kTile, chunk0 + c);
  }
}

// ---- gradients of the low-rank factors: sums over tokens ----

void pack_token_factor(const PackTokenFactor16Params& p, int64_t begin, int64_t end) {
  const int64_t steps = ceil_div(p.m, kStep);
  for (int64_t step = begin; step < end; ++step)
    for (int64_t q = 0; q < tiles_of(p.r); ++q)
      for (int part = 0; part < 2; ++part) {
        uint8_t* out = p.out + ((q * 2 + part) * steps + step) * kTileBytes;
        for (int64_t i = 0; i < kTile; ++i)
          for (int64_t t = 0; t < kStep; ++t) {
            const int64_t rank = q * kTile + i, token = step * kStep + t;
            const float value = rank < p.r && token < p.m ? p.values[token * p.r + rank] : 0.0f;
            const bf16 high = from_float<bf16>(value);
            const bf16 half = part == 0 ? high : from_float<bf16>(value - to_float(high));
            std::memcpy(out + i * 64 + t * 2, &half, sizeof half);
          }
      }
}

int64_t factor_grad_scratch(const FactorGrad16Params& p) {
  return (tiles_of(p.r) + kStep / kTile) * (kGradFeatures / kTile) * kTileFloats;
}

void factor_grad(const FactorGrad16Params& p, int64_t begin, int64_t end, float* scratch) {
  const TileScope scope;
  constexpr int64_t kCols = kGradFeatures / kTile;
  const int64_t steps = ceil_div(p.m, kStep), ranks = tiles_of(p.r);
  auto* cols = reinterpret_cast<uint8_t*>(scratch);  // [kCols] tiles, one step
  float* results = scratch + kCols * kTileFloats;    // [ranks][kCols] tiles
  const auto* matrix = static_cast<const uint16_t*>(p.matrix);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t feature0 = item * kGradFeatures, features = min_i64(kGradFeatures, p.features - feature0);
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t pair = 0; pair < kTile; ++pair)
        for (int64_t half = 0; half < kGradFeatures / 32; ++half) {
          __m512i row[2], words[2];
          for (int i = 0; i < 2; ++i) {
            const int64_t token = step * kStep + 2 * pair + i;
            row[i] = token < p.m ? load16(matrix + token * p.features + feature0 + 32 * half, features - 32 * half)
                                 : _mm512_setzero_si512();
          }
          pair_rows(row[0], row[1], words[0], words[1]);
          for (int i = 0; i < 2; ++i) _mm512_store_si512(cols + (2 * half + i) * kTileBytes + pair * 64, words[i]);
        }
      for (int64_t q = 0; q < ranks; ++q)
        for (int64_t part = 0; part < 2; ++part)
          for (int64_t j = 0; j < kCols; j += 2)
            multiply<1, 2>(p.factor + ((q * 2 + part) * steps + step) * kTileBytes, 0, cols + j * kTileBytes,
                           kTileBytes, 1, step == 0 && part == 0, results + (q * kCols + j) * kTileFloats, 0);
    }
    for (int64_t rank = 0; rank < p.r; ++rank)
      for (int64_t f = 0; f < features; ++f) {
        const float value =
            steps == 0 ? 0.0f
                       : results[(rank / kTile * kCols + f / kTile) * kTileFloats + rank % kTile * 16 + f % kTile];
        const int64_t within =
            p.r_is_major ? rank % p.group * p.features + feature0 + f : (feature0 + f) * p.group + rank % p.group;
        store_scalar(p.out, p.out_dtype, p.adapters.id(rank / p.group) * p.out_stride + within, value);
      }
  }
}

}  // namespace
}  // namespace qlora::cpu
