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
// Of all products that are added.
int64_t most_low_rank_steps(const BackwardTilesParams& p) {
  int64_t most = 0;
  for (const BackwardTilesParams* term = &p; term != nullptr; term = term->next)
    most = max_i64(most, all_low_rank_steps(*term));
  return most;
}
int64_t backward_scratch(const BackwardTilesParams& p) {
  const int64_t tiles = backward_panel_chunks(p) * kChunkTiles;
  return tiles * (kMostChunkSteps + most_low_rank_steps(p) + backward_blocks(p.m).tiles) * kTileFloats;
}

// Stores two rows of 128 columns as row `pair` of eight column tiles, `pitch` bytes apart. Column c of tile 2s + h is
// column 32 (c / 4) + 16 h + 4 (c % 4) + s of the chunk if by_nibble; else column c of tile t is column 16 t + c.
QLORA_INLINE void store_pair(const Words (&even)[4], const Words (&odd)[4], bool by_nibble, uint8_t* out,
                             int64_t pitch) {
  for (int s = 0; s < 4; ++s) {
    Words first, second;
    if (by_nibble) {
      pair_eights(even[s], odd[s], first, second);
    } else {
      pair_rows(even[s], odd[s], first, second);
    }
    store_words(out + 2 * s * pitch, first);
    store_words(out + (2 * s + 1) * pitch, second);
  }
}

// Unpacks one step of the reduction (32 rows of W) for `count` chunks of columns.
void unpack_pairs(const BackwardTilesParams& p, Vec::Table levels, int64_t step, int64_t chunk0, int64_t count,
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
      Words words[2][4] = {};
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
      Words high[2][4], low[2][4];
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
    Floats out[8];
    for (int i = 0; i < 8; ++i) out[i] = load_floats(c + i * kTileFloats + t * 16);
    if (p.by_nibble) natural_order(out);
    for (int q = 0; q < 4; ++q) store16(dx + 32 * q, k - col - 32 * q, round16(out[2 * q], out[2 * q + 1]));
  }
}

void backward(const BackwardTilesParams& p, int64_t begin, int64_t end, float* scratch) {
  const TileScope scope;
  const int64_t block = backward_blocks(p.m).tiles;
  const int64_t most = backward_panel_chunks(p), chunks = ceil_div(p.weight.k, kChunk), panels = ceil_div(chunks, most);
  auto* panel = reinterpret_cast<uint8_t*>(scratch);
  const int64_t panel_pitch = (kMostChunkSteps + most_low_rank_steps(p)) * kTileBytes;
  auto* results = reinterpret_cast<float*>(panel + most * kChunkTiles * panel_pitch);
  const int64_t results_pitch = most * kChunkTiles * kTileFloats;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk0 = item % panels * most, count = min_i64(most, chunks - chunk0);
    const int64_t token0 = item / panels * block;
    const int64_t tokens = min_i64(block, tiles_of(p.m) - token0);
    for (const BackwardTilesParams* term = &p; term != nullptr; term = term->next) {
      const int64_t all_steps = steps_of(term->weight.n), extra = all_low_rank_steps(*term);
      const int64_t steps = term->weight.packed != nullptr ? all_steps : 0;
      const int64_t pitch = term->row_steps * kTileBytes;
      const uint8_t* rows = term->rows + (all_steps - steps) * kTileBytes + token0 * pitch;
      const Vec::Table levels = Vec::table(codebook(term->weight.quant_type));
      int64_t s0 = 0;
      do {
        const int64_t now = next_chunk_steps(steps - s0);
        const bool is_last = s0 + now == steps;
        for (int64_t s = 0; s < now; ++s)
          unpack_pairs(*term, levels, s0 + s, chunk0, count, panel + s * kTileBytes, panel_pitch);
        for (int64_t c = 0; c < count && is_last && extra > 0; ++c)
          pack_low_rank_columns(*term, chunk0 + c, panel + c * kChunkTiles * panel_pitch + now * kTileBytes,
                                panel_pitch);
        const int64_t sum_steps = now + (is_last ? extra : 0);
        for (int64_t i = 0; i < tokens; i += 2)
          for (int64_t j = 0; j < count * kChunkTiles; j += 2)
            multiply_any(min_i64(2, tokens - i), 2, rows + i * pitch + s0 * kTileBytes, pitch, panel + j * panel_pitch,
                         panel_pitch, sum_steps, term == &p && s0 == 0, results + i * results_pitch + j * kTileFloats,
                         results_pitch);
        s0 += now;
      } while (s0 < steps);
    }
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
            const bool exists = rank < p.r && token < p.m;
            const float value = exists ? p.values[row_of_token(p.row_of, token) * p.pitch + rank] : 0.0f;
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
          Words row[2], words[2];
          for (int i = 0; i < 2; ++i) {
            const int64_t token = step * kStep + 2 * pair + i;
            row[i] = token < p.m ? load16(matrix + row_of_token(p.row_of, token) * p.features + feature0 + 32 * half,
                                          features - 32 * half)
                                 : zero_words();
          }
          pair_rows(row[0], row[1], words[0], words[1]);
          for (int i = 0; i < 2; ++i) store_words(cols + (2 * half + i) * kTileBytes + pair * 64, words[i]);
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
        const int64_t at = p.r_is_major ? rank * p.features + feature0 + f : (feature0 + f) * p.r + rank;
        store_scalar(p.out, p.out_dtype, at, value);
      }
  }
}

}  // namespace
}  // namespace qlora::cpu
