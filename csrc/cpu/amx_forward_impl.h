// Many bfloat16 tokens forward: rows of W are row tiles, decoded and used at once, results [rows, tokens]; the low-rank
// term is a few more steps of the same sums. Included by isa_amx.cpp alone.
#pragma once

#include "cpu/amx_decode_impl.h"

namespace qlora::cpu {
namespace {

constexpr int64_t kForwardPanelTiles = 8;
int64_t forward_panel_tiles(const Forward16Params& p) {
  const int64_t wanted = ceil_div(ceil_div(tiles_of(p.weight.n), kFewItems), 2) * 2;
  return wanted < 2 ? 2 : min_i64(wanted, kForwardPanelTiles);
}
int64_t forward_items(const Forward16Params& p) {
  return ceil_div(tiles_of(p.weight.n), forward_panel_tiles(p)) * ceil_div(tiles_of(p.m), kBlockTokenTiles);
}

// Scales of 64 weights each for a row of a panel; one more for an odd half chunk, and what decode_row_scales writes
// behind.
int64_t row_segments(const PackedWeight& w) { return ceil_div(w.k, kChunk) * 2; }

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
    if (w.block_shift == 6) {
      // A block is a segment; what is written behind the last one is the next row's, or row_scales.
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

}  // namespace
}  // namespace qlora::cpu
