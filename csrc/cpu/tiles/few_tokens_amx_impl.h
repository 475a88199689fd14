// Forward kernel for up to 32 bfloat16 tokens on AMX; included only by isa_amx.cpp. It makes one pass over the rows of
// W, four or two tiles of rows at a time, and keeps their results in tile registers for the whole reduction.
//
// The vector units unpack and the tile unit multiplies, so the two kinds of work overlap: while one half of the panel
// receives the next chunk of the rows, the previous chunk is multiplied from the other half.
#pragma once

#include "cpu/tiles/rows_impl.h"

namespace qlora::cpu {
namespace {

constexpr int64_t kFewTokenTiles = 2;

// Tiles of rows processed together, and steps of a chunk. The eight tile registers hold 4 x 1 or 2 x 2 results and
// their operands; L1 holds two chunks.
template <int kCols>
struct Few {
  static constexpr int kRows = kCols == 1 ? 4 : 2;
  static constexpr int64_t kSteps = kCols == 1 ? 4 : 8;
  static constexpr int64_t kPanelRows = kRows * kTile;
};

bool has_few_tokens(const ForwardTilesParams& p) { return tiles_of(p.m) <= kFewTokenTiles; }

int64_t few_panel_rows(const ForwardTilesParams& p) {
  return tiles_of(p.m) == 1 ? Few<1>::kPanelRows : Few<2>::kPanelRows;
}

int64_t few_items(const ForwardTilesParams& p) { return ceil_div(p.weight.n, few_panel_rows(p)); }

// Floats for the scales of the rows, two halves of the panel, the low-rank steps of the rows, and the results.
int64_t few_scratch(const ForwardTilesParams& p) {
  constexpr int64_t kPanelTiles = 16, kResults = 4;
  static_assert(Few<1>::kRows * Few<1>::kSteps == kPanelTiles && Few<2>::kRows * Few<2>::kSteps == kPanelTiles);
  const int64_t rows = few_panel_rows(p);
  return row_scales_scratch(p.weight, rows) +
         (2 * kPanelTiles + rows / kTile * all_low_rank_steps(p) + kResults) * kTileFloats;
}

// Prefetches into L2, for data used so late that L1 would have evicted it.
void prefetch_far(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
}

// Multiplies one step of the row tiles with kCols tiles of tokens; results are in tile registers 0 … 3.
template <int kCols>
QLORA_INLINE void few_step(const uint8_t* rows, int64_t row_pitch, const uint8_t* columns, int64_t column_pitch) {
  _tile_loadd(7, columns, 64);
  _tile_loadd(4, rows, 64);
  _tile_dpbf16ps(0, 4, 7);
  _tile_loadd(5, rows + row_pitch, 64);
  _tile_dpbf16ps(1, 5, 7);
  if constexpr (kCols == 1) {
    _tile_loadd(6, rows + 2 * row_pitch, 64);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(4, rows + 3 * row_pitch, 64);
    _tile_dpbf16ps(3, 4, 7);
  } else {
    _tile_loadd(6, columns + column_pitch, 64);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 5, 6);
  }
}

template <int kCols>
void forward_few_typed(const ForwardTilesParams& p, int64_t begin, int64_t end, float* scratch) {
  using F = Few<kCols>;
  constexpr int64_t kRowsOfTurn = F::kPanelRows / F::kSteps;  // a turn unpacks these rows and multiplies one step
  constexpr int64_t kRowPitch = F::kSteps * kTileBytes, kHalf = F::kRows * kRowPitch;
  static_assert(kTile % kRowsOfTurn == 0);
  const WeightView& w = p.weight;
  const int64_t steps = steps_of(w.k), extra = all_low_rank_steps(p);
  const TokenColumns tokens(p);
  const int64_t pitch = tokens.x_pitch;
  RowUnpacker unpacker(p, F::kPanelRows, scratch);
  auto* panel = reinterpret_cast<uint8_t*>(scratch + row_scales_scratch(w, F::kPanelRows));
  uint8_t* low_rank = panel + 2 * kHalf;
  auto* results = reinterpret_cast<float*>(low_rank + F::kRows * extra * kTileBytes);
  const int64_t panel_bytes = F::kPanelRows * w.k / 2;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t row0 = item * F::kPanelRows, rows = min_i64(F::kPanelRows, w.n - row0);
    unpacker.start(row0, rows);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const uint8_t *unpacked = panel, *columns = p.columns;
    for (int64_t s0 = 0; s0 < steps; s0 += F::kSteps) {
      const int64_t now = min_i64(F::kSteps, steps - s0);
      uint8_t* out = panel + (s0 / F::kSteps % 2 != 0 ? kHalf : 0);
      // Prefetched: the bytes of the next panel at this chunk's relative position. The panels are adjacent in memory.
      const int64_t ahead = now * panel_bytes / steps / F::kSteps;
      const uint8_t* next = w.packed + row0 * w.k / 2 + panel_bytes + s0 * panel_bytes / steps;
      for (int64_t turn = 0; turn < F::kSteps; ++turn) {
        const int64_t first = turn * kRowsOfTurn;
        if (item + 1 < end) prefetch_far(next + turn * ahead, ahead);
        unpacker.unpack(first, first + kRowsOfTurn, s0, now, out + first / kTile * kRowPitch, kRowPitch);
        if (s0 > 0) few_step<kCols>(unpacked + turn * kTileBytes, kRowPitch, columns + turn * kTileBytes, pitch);
      }
      asm volatile("" ::: "memory");  // GCC 12 does not know that its tile loads read memory
      unpacked = out;
      columns = p.columns + s0 * kTileBytes;
    }
    for (int64_t i = 0; i < F::kPanelRows && extra > 0; ++i)
      pack_low_rank_row(p, row0 + i, low_rank + i / kTile * extra * kTileBytes + i % kTile * 64);
    asm volatile("" ::: "memory");
    const int64_t left = steps == 0 ? 0 : steps - (steps - 1) / F::kSteps * F::kSteps;  // steps of the last chunk
    for (int64_t s = 0; s < left; ++s)
      few_step<kCols>(unpacked + s * kTileBytes, kRowPitch, columns + s * kTileBytes, pitch);
    for (int64_t s = 0; s < extra; ++s)
      few_step<kCols>(low_rank + s * kTileBytes, extra * kTileBytes, tokens.low_rank + s * kTileBytes,
                      tokens.low_rank_pitch);
    _tile_stored(0, results, 64);
    _tile_stored(1, results + kTileFloats, 64);
    _tile_stored(2, results + 2 * kTileFloats, 64);
    _tile_stored(3, results + 3 * kTileFloats, 64);
    asm volatile("" ::: "memory");
    for (int i = 0; i < F::kRows; i += 2)
      for (int64_t t = 0; t < kCols; ++t)
        store_transposed(p, results + (i + t * F::kRows) * kTileFloats, kTileFloats, row0 + i * kTile, t * kTile);
  }
}

void forward_few(const ForwardTilesParams& p, int64_t begin, int64_t end, float* scratch) {
  const TileScope scope;
  if (tiles_of(p.m) == 1)
    forward_few_typed<1>(p, begin, end, scratch);
  else
    forward_few_typed<2>(p, begin, end, scratch);
}

}  // namespace
}  // namespace qlora::cpu
