// Forward kernel on tiles for many bfloat16 tokens. Rows of W are unpacked into row tiles and used immediately; results
// are [rows, tokens]. The low-rank term adds a few steps to the same sums. See tiles.h.
#pragma once

#include "cpu/tiles/rows_impl.h"

namespace qlora::cpu {
namespace {

// For 256 tokens, one chunk of the tokens (128 KiB) and the results of a panel (256 KiB) stay in L2.
constexpr int64_t kForwardTokenTiles = 16, kForwardPanelTiles = 8, kForwardTallTiles = 16;
constexpr int64_t kRowsAtOnce = 4;

TokenBlocks forward_blocks(int64_t m) { return TokenBlocks(m, kForwardTokenTiles); }

// Every panel reads all tokens again. Many tokens come from the last-level cache, so they get fewer, taller panels.
int64_t forward_panel_tiles(const ForwardTilesParams& p) {
  const int64_t most = forward_blocks(p.m).tiles == kForwardTokenTiles ? kForwardTallTiles : kForwardPanelTiles;
  const int64_t wanted = ceil_div(ceil_div(tiles_of(p.weight.n), kFewItems), 2) * 2;
  return wanted < 2 ? 2 : min_i64(wanted, most);
}
int64_t forward_items(const ForwardTilesParams& p) {
  return ceil_div(tiles_of(p.weight.n), forward_panel_tiles(p)) * forward_blocks(p.m).count;
}

int64_t forward_scratch(const ForwardTilesParams& p) {
  const int64_t tiles = forward_panel_tiles(p);
  return row_scales_scratch(p.weight, tiles * kTile) +
         (2 * (kMostChunkSteps + all_low_rank_steps(p)) + tiles * forward_blocks(p.m).tiles) * kTileFloats;
}

void forward(const ForwardTilesParams& p, int64_t begin, int64_t end, float* scratch) {
  const TileScope scope;
  const WeightView& w = p.weight;
  const int64_t steps = steps_of(w.k), extra = all_low_rank_steps(p);
  const TokenColumns all(p);
  const int64_t pitch = all.x_pitch;
  const int64_t most = forward_panel_tiles(p), panels = ceil_div(tiles_of(w.n), most);
  RowUnpacker unpacker(p, most * kTile, scratch);
  auto* panel = reinterpret_cast<uint8_t*>(scratch + row_scales_scratch(w, most * kTile));
  const int64_t panel_pitch = (kMostChunkSteps + extra) * kTileBytes;
  auto* results = reinterpret_cast<float*>(panel + 2 * panel_pitch);
  const int64_t block = forward_blocks(p.m).tiles, results_pitch = block * kTileFloats;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile0 = item % panels * most, tiles = min_i64(most, tiles_of(w.n) - tile0), row0 = tile0 * kTile;
    const int64_t rows = min_i64(tiles * kTile, w.n - row0);
    const int64_t token0 = item / panels * block;
    const int64_t tokens = min_i64(block, tiles_of(p.m) - token0);
    const uint8_t* columns = all.x + token0 * pitch;
    unpacker.start(row0, rows);

    int64_t s0 = 0;
    do {  // runs once even if there are no steps, for the bias and the low-rank term
      const int64_t now = next_chunk_steps(steps - s0);
      const bool is_last = s0 + now == steps;
      const bool apart = is_last && p.low_rank != nullptr;
      const int64_t sum_steps = now + (is_last && !apart ? extra : 0);
      for (int64_t i = 0; i < tiles; i += 2) {  // unpacks two tiles of rows into L1, then multiplies all tokens
        const int64_t is = min_i64(2, tiles - i);
        // Unpacks a few rows, then prefetches their next chunk, or in the last chunk the same rows of the next panel.
        // (Prefetching the whole next panel in memory order would evict the tokens from L2 if k is large.)
        for (int64_t row = i * kTile; row < (i + is) * kTile; row += kRowsAtOnce) {
          unpacker.unpack(row, row + kRowsAtOnce, s0, now, panel + (row / kTile - i) * panel_pitch, panel_pitch);
          for (int64_t r = row0 + row; r < row0 + min_i64(row + kRowsAtOnce, rows); ++r) {
            const int64_t ahead =
                is_last ? min_i64(r + most * kTile, w.n - 1) * w.k : r * w.k + (s0 + kChunkSteps) * kStep;
            prefetch(w.packed + ahead / 2, kChunkSteps * kStep / 2);
          }
        }
        for (int64_t local = 0; local < is * kTile && is_last && extra > 0; ++local)
          pack_low_rank_row(p, row0 + i * kTile + local,
                            panel + local / kTile * panel_pitch + local % kTile * 64 + now * kTileBytes);
        for (int64_t j = 0; j < tokens; j += 2) {
          const int64_t js = min_i64(2, tokens - j);
          float* c = results + i * results_pitch + j * kTileFloats;
          multiply_any(is, js, panel, panel_pitch, columns + j * pitch + s0 * kTileBytes, pitch, sum_steps, s0 == 0, c,
                       results_pitch);
          if (apart)
            multiply_any(is, js, panel + now * kTileBytes, panel_pitch,
                         all.low_rank + (token0 + j) * all.low_rank_pitch, all.low_rank_pitch, extra, false, c,
                         results_pitch);
          if (is_last)
            for (int64_t t = 0; t < js; ++t)
              store_transposed(p, c + t * kTileFloats, results_pitch, row0 + i * kTile, (token0 + j + t) * kTile);
        }
      }
      s0 += now;
    } while (s0 < steps);
  }
}

}  // namespace
}  // namespace qlora::cpu
