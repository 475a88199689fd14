// Backward kernels on tiles for bfloat16 tokens: the gradient of x, and the gradients of the low-rank factors. Tokens
// are row tiles, column tiles hold pairs of rows of W, and results are [tokens, columns]. See tiles.h.
#pragma once

#include "cpu/tiles/unpack_impl.h"

namespace qlora::cpu {
namespace {

constexpr int64_t kBackwardPanelChunks = 2;  // chunks of 128 columns
constexpr int64_t kChunkTiles = 8;           // column tiles of a chunk

TokenBlocks backward_blocks(int64_t m) { return TokenBlocks(m, 32); }  // 512 tokens

int64_t backward_panel_chunks(const BackwardTilesParams& p) {
  return ceil_div(p.weight.k, kChunk) >= kFewItems * kBackwardPanelChunks ? kBackwardPanelChunks : 1;
}
int64_t backward_items(const BackwardTilesParams& p) {
  return ceil_div(ceil_div(p.weight.k, kChunk), backward_panel_chunks(p)) * backward_blocks(p.m).count;
}
int64_t backward_scratch(const BackwardTilesParams& p) {
  const int64_t tiles = backward_panel_chunks(p) * kChunkTiles;
  return tiles * (kChunkSteps + all_low_rank_steps(p) + backward_blocks(p.m).tiles) * kTileFloats;
}

// Stores two rows of 128 columns as row `pair` of eight column tiles, `pitch` bytes apart. Column c of tile 2s + h is
// column 32 (c / 4) + 16 h + 4 (c % 4) + s of the chunk if by_nibble; else column c of tile t is column 16 t + c.
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

// Unpacks one step of the reduction (32 rows of W) for `count` chunks of columns.
void unpack_pairs(const BackwardTilesParams& p, __m512 levels, int64_t step, int64_t chunk0, int64_t count,
                  uint8_t* out, int64_t pitch) {
  const WeightView& w = p.weight;
  const int64_t col0 = chunk0 * kChunk;
  for (int64_t pair = 0; pair < kTile; ++pair) {
    const int64_t row = step * kStep + 2 * pair;
    if (p.by_nibble) {  // prefetch the rows of the same pair in the next step
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
          const float first = scale_of_block(w, at >> w.block_shift);
          const float second = whole ? scale_of_block(w, (at + 64) >> w.block_shift) : 0.0f;
          unpack_chunk(w.packed + at / 2, whole, levels, first, second, words[i]);
        } else {
          unpack_natural(w, levels, row + i, col, words[i]);
        }
      }
      store_pair(words[0], words[1], p.by_nibble, out + c * kChunkTiles * pitch + pair * 64, pitch);
    }
  }
}

// Packs lora_a into the low-rank steps of a chunk of columns.
void pack_low_rank_columns(const BackwardTilesParams& p, int64_t chunk, uint8_t* out, int64_t pitch) {
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

// Stores the results of 16 tokens and 128 columns, held in eight adjacent tiles.
void store_columns(const BackwardTilesParams& p, const float* c, int64_t token0, int64_t chunk) {
  const int64_t k = p.weight.k, col = chunk * kChunk, tokens = min_i64(kTile, p.m - token0);
  for (int64_t t = 0; t < tokens; ++t) {
    auto* dx = static_cast<uint16_t*>(p.dx) + row_of_token(p.out_row_of, token0 + t) * k + col;
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
        // 128-bit lane l of r<i> holds columns 32 l + 16 h + 4 i … + 3.
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

void backward(const BackwardTilesParams& p, int64_t begin, int64_t end, float* scratch) {
  const TileScope scope;
  const WeightView& w = p.weight;
  const int64_t all_steps = steps_of(w.n), extra = all_low_rank_steps(p);
  const int64_t pitch = p.row_steps * kTileBytes;
  const int64_t steps = w.packed != nullptr ? all_steps : 0;
  const uint8_t* token_rows = p.rows + (all_steps - steps) * kTileBytes;
  const int64_t block = backward_blocks(p.m).tiles;
  const int64_t most = backward_panel_chunks(p), chunks = ceil_div(w.k, kChunk), panels = ceil_div(chunks, most);
  auto* panel = reinterpret_cast<uint8_t*>(scratch);
  const int64_t panel_pitch = (kChunkSteps + extra) * kTileBytes;
  auto* results = reinterpret_cast<float*>(panel + most * kChunkTiles * panel_pitch);
  const int64_t results_pitch = most * kChunkTiles * kTileFloats;
  const __m512 levels = _mm512_loadu_ps(codebook(w.quant_type));

  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk0 = item % panels * most, count = min_i64(most, chunks - chunk0);
    const int64_t token0 = item / panels * block;
    const int64_t tokens = min_i64(block, tiles_of(p.m) - token0);
    const uint8_t* rows = token_rows + token0 * pitch;
    int64_t s0 = 0;
    do {
      const int64_t now = min_i64(kChunkSteps, steps - s0);
      const bool is_last = s0 + now == steps;
      for (int64_t s = 0; s < now; ++s)
        unpack_pairs(p, levels, s0 + s, chunk0, count, panel + s * kTileBytes, panel_pitch);
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

void pack_token_factor(const PackTokenFactorParams& p, int64_t begin, int64_t end) {
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

int64_t factor_grad_scratch(const FactorGradParams& p) {
  return (tiles_of(p.r) + kStep / kTile) * (kGradFeatures / kTile) * kTileFloats;
}

void factor_grad(const FactorGradParams& p, int64_t begin, int64_t end, float* scratch) {
  const TileScope scope;
  constexpr int64_t kCols = kGradFeatures / kTile;
  const int64_t steps = ceil_div(p.m, kStep), ranks = tiles_of(p.r);
  auto* cols = reinterpret_cast<uint8_t*>(scratch);  // [kCols] tiles of one step
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
            row[i] = token < p.m ? load16(matrix + row_of_token(p.row_of, token) * p.features + feature0 + 32 * half,
                                          features - 32 * half)
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
