// Parts shared by the forward products on tiles: unpacks rows of W into row tiles, packs lora_b into low-rank steps,
// and stores results to y. See tiles.h.
#pragma once

#include "cpu/tiles/unpack_impl.h"

namespace qlora::cpu {
namespace {

// Number of scales stored for a row of a panel: one per 64 weights, rounded up to whole chunks of 128 weights.
int64_t row_segments(const WeightView& w) { return ceil_div(w.k, kChunk) * 2; }

// Writes the scales of each row, one per segment of 64 weights. `row_scales` is scratch for one row's block scales.
void unpack_runs(const WeightView& w, int64_t row0, int64_t rows, float* row_scales, float* segments) {
  const int64_t count = row_segments(w), used = w.k / 64;
  for (int64_t i = 0; i < rows; ++i, segments += count) {
    if (w.block_shift == 6) {
      // Each block is one segment. dequantize_row_scales also writes zeros beyond the row: into the next row's scales,
      // which are written later, or into row_scales.
      dequantize_row_scales<Vec>(w, row0 + i, segments);
    } else {
      dequantize_row_scales<Vec>(w, row0 + i, row_scales);
      const int64_t first = ((row0 + i) * w.k) >> w.block_shift;
      for (int64_t g = 0; g < used; ++g)
        segments[g] = row_scales[(((row0 + i) * w.k + g * 64) >> w.block_shift) - first];
    }
    if (used < count) segments[used] = 0.0f;
  }
}

// Floats of scratch that RowUnpacker needs for `rows` rows.
int64_t row_scales_scratch(const WeightView& w, int64_t rows) {
  return ceil_div(rows * row_segments(w) + row_scales_floats<Vec>(w.k), 16) * 16;
}

// Unpacks parts of the rows of a panel; start() prepares the scales of the panel.
class RowUnpacker {
 public:
  RowUnpacker(const ForwardTilesParams& p, int64_t most_rows, float* scratch)
      : w_(p.weight),
        by_nibble_(p.by_nibble),
        segments_(row_segments(p.weight)),
        scales_(scratch),
        row_scales_(scratch + most_rows * segments_),
        levels_(Vec::table(codebook(p.weight.quant_type))) {}

  void start(int64_t row0, int64_t rows) {
    row0_ = row0;
    rows_ = rows;
    if (by_nibble_) unpack_runs(w_, row0, rows, row_scales_, scales_);
  }

  // Unpacks steps [s0, s0 + now) of rows [begin, end) of the panel into row tiles. `out` is the tile that contains row
  // `begin`; the next tile of rows is `pitch` bytes later. Rows beyond the last one are zero.
  void unpack(int64_t begin, int64_t end, int64_t s0, int64_t now, uint8_t* out, int64_t pitch) const {
    if (by_nibble_ && end <= rows_ && (s0 + now) * kStep <= w_.k) return unpack_whole(begin, end, s0, now, out, pitch);
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* to = out + (i / kTile - begin / kTile) * pitch + i % kTile * 64;
      for (int64_t s = 0; s < now; s += 4) {
        Words words[4] = {};
        if (i < rows_) unpack_any(row0_ + i, scales_ + i * segments_, (s0 + s) * kStep, words);
        for (int64_t j = 0; j < min_i64(4, now - s); ++j) store_words(to + (s + j) * kTileBytes, words[j]);
      }
    }
  }

 private:
  // The path of nearly all rows: the loop has no conditions and keeps its constants in registers.
  void unpack_whole(int64_t begin, int64_t end, int64_t s0, int64_t now, uint8_t* out, int64_t pitch) const {
    const Vec::Table levels = levels_;
    const uint8_t* packed = w_.packed + ((row0_ + begin) * w_.k + s0 * kStep) / 2;
    const float* scales = scales_ + begin * segments_ + s0 / 2;
    for (int64_t i = begin; i < end; ++i, packed += w_.k / 2, scales += segments_) {
      uint8_t* to = out + (i / kTile - begin / kTile) * pitch + i % kTile * 64;
      for (int64_t c = 0; c < now / 4; ++c) {
        Words words[4];
        unpack_chunk(packed + c * kChunk / 2, true, levels, scales[2 * c], scales[2 * c + 1], words);
        for (int s = 0; s < 4; ++s) store_words(to + (4 * c + s) * kTileBytes, words[s]);
      }
      if (now % 4 == 0) continue;
      Words words[4];
      unpack_chunk(packed + now / 4 * kChunk / 2, false, levels, scales[now / 2 - 1], 0.0f, words);
      join_half_chunk(words);
      store_words(to + (now - 2) * kTileBytes, words[0]);
      store_words(to + (now - 1) * kTileBytes, words[1]);
    }
  }

  void unpack_any(int64_t row, const float* scales, int64_t col, Words (&words)[4]) const {
    if (!by_nibble_) return unpack_natural(w_, levels_, row, col, words);
    if (col >= w_.k) return;
    const float* of_chunk = scales + col / 64;
    const bool whole = col + kChunk <= w_.k;
    unpack_chunk(w_.packed + (row * w_.k + col) / 2, whole, levels_, of_chunk[0], of_chunk[1], words);
    if (!whole) join_half_chunk(words);
  }

  const WeightView& w_;
  bool by_nibble_;
  int64_t segments_, row0_ = 0, rows_ = 0;
  float *scales_, *row_scales_;
  Vec::Table levels_;
};

// Where the packed tokens of a product are: the steps of x, and the low-rank steps.
struct TokenColumns {
  const uint8_t *x, *low_rank;
  int64_t x_pitch, low_rank_pitch;  // bytes from one tile of tokens to the next

  explicit TokenColumns(const ForwardTilesParams& p) : x(p.columns) {
    const int64_t extra = all_low_rank_steps(p);
    x_pitch = token_steps(p.weight.k, p.low_rank != nullptr ? 0 : extra) * kTileBytes;
    low_rank = p.low_rank != nullptr ? p.low_rank : x + steps_of(p.weight.k) * kTileBytes;
    low_rank_pitch = p.low_rank != nullptr ? extra * kTileBytes : x_pitch;
  }
};

// Packs row `row` of lora_b into low-rank steps, which are multiplied with those of the tokens.
void pack_low_rank_row(const ForwardTilesParams& p, int64_t row, uint8_t* out) {
  const int64_t ranks = tiles_of(p.r), extra = low_rank_steps(p.r, p.lora_dtype);
  for (int64_t s = 0; s < p.adapters.count * extra; ++s) store_words(out + s * kTileBytes, zero_words());
  if (row >= p.weight.n) return;
  for (int64_t a = 0; a < p.adapters.count; ++a, out += extra * kTileBytes)
    for (int64_t q = 0; q < ranks; ++q) {
      const int64_t from = p.adapters.id(a) * p.adapter_stride + row * p.r + q * kTile;
      const Floats values = load_floats(p.lora_b, p.lora_dtype, from, p.r - q * kTile);
      const Halves high = round16(values), low = rest16(values, high);
      for (int64_t part = 0; part < low_rank_parts(p.lora_dtype); ++part) {
        const int64_t at = (part * ranks + q) * kTile;
        store_halves(out + at / kStep * kTileBytes + at % kStep * 2, part == 2 ? low : high);
      }
    }
}

// Stores the results of up to 32 rows and 16 tokens: transposes them, adds bias and addend, and rounds.
void store_transposed(const ForwardTilesParams& p, const float* c, int64_t c_pitch, int64_t row0, int64_t token0) {
  Words low[16], high[16];
  const int64_t rows = p.weight.n - row0, tokens = min_i64(kTile, p.m - token0);
  if (rows <= 0) return;
  for (int i = 0; i < 16; ++i) low[i] = load_words(c + 16 * i);
  transpose(low);
  if (rows > kTile) {
    for (int i = 0; i < 16; ++i) high[i] = load_words(c + c_pitch + 16 * i);
    transpose(high);
  }
  Floats bias_low = zero_floats(), bias_high = bias_low;
  if (p.bias != nullptr) {
    bias_low = load_floats(p.bias, p.bias_dtype, row0, rows);
    if (rows > kTile) bias_high = load_floats(p.bias, p.bias_dtype, row0 + kTile, rows - kTile);
  }
  auto* y = static_cast<uint16_t*>(p.y) + row0;
  const float* addend = p.addend != nullptr ? p.addend + row0 : nullptr;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = row_of_token(p.out_row_of, token0 + t) * p.weight.n;
    Floats a = as_floats(low[t]) + bias_low;
    Floats b = rows > kTile ? as_floats(high[t]) + bias_high : zero_floats();
    if (addend != nullptr) {
      a = a + load_floats(addend, DType::kFloat32, at, rows);
      if (rows > kTile) b = b + load_floats(addend, DType::kFloat32, at + kTile, rows - kTile);
    }
    store16(y + at, rows, round16(a, b));
  }
}

}  // namespace
}  // namespace qlora::cpu
