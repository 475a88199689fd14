// Packs tokens and low-rank factors into tiles, and computes the down projections of the tokens. See tiles.h.
#pragma once

#include <cstring>

#include "cpu/tiles/products.h"
#include "cpu/tiles/vectors.h"

namespace qlora::cpu {
namespace {

// Loads `count` elements of a row, at most 128, from `at` on, as high and low halves; the rest of the 128 are zero.
QLORA_INLINE void load_chunk(const void* data, DType dtype, int64_t at, int64_t count, bool by_nibble, Words (&high)[4],
                             Words (&low)[4]) {
  Words h[4], l[4];
  for (int q = 0; q < 4; ++q) {
    const Floats a = load_floats(data, dtype, at + 32 * q, count - 32 * q > 0 ? count - 32 * q : 0);
    const Floats b = load_floats(data, dtype, at + 32 * q + 16, count - 32 * q - 16 > 0 ? count - 32 * q - 16 : 0);
    h[q] = round16(a, b);
    l[q] = round16(a - widen16(lower(h[q])), b - widen16(upper(h[q])));
  }
  if (by_nibble) {
    nibble_order(h, high);
    nibble_order(l, low);
  } else {
    for (int q = 0; q < 4; ++q) high[q] = h[q], low[q] = l[q];
  }
}

void pack_factor_of(const PackFactorParams& p, const TileFactor& f, uint8_t* packed, int64_t begin, int64_t end) {
  const int64_t steps = steps_of(f.features), splits = f.splits(), pitch = steps * kTileBytes;
  for (int64_t chunk = begin; chunk < end; ++chunk)
    for (int64_t q = 0; q < tiles_of(f.r); ++q) {
      uint8_t* out = packed + (q * splits * steps + chunk * 4) * kTileBytes;
      const int64_t ranks = min_i64(kTile, f.r - q * kTile), first = chunk * kChunk;
      const int64_t chunk_steps = min_i64(kChunk / kStep, steps - chunk * 4);
      if (f.rank_stride == 1 && !p.as_rows) {  // the matrix is [features, ranks]: column tiles need no transpose
        for (int64_t pair = 0; pair < chunk_steps * kTile; ++pair) {
          Halves high[2], low[2];
          for (int i = 0; i < 2; ++i) {
            const int64_t feature = first + 2 * pair + i;
            const Floats values =
                load_floats(f.data, f.dtype, feature < f.features ? feature * f.feature_stride + q * kTile : 0,
                            feature < f.features ? ranks : 0);
            high[i] = round16(values);
            low[i] = rest16(values, high[i]);
          }
          uint8_t* to = out + pair / 16 * kTileBytes + pair % 16 * 64;
          store_words(to, pair_halves(high[0], high[1]));
          if (splits == 2) store_words(to + pitch, pair_halves(low[0], low[1]));
        }
        continue;
      }
      Words high[16][4], low[16][4];
      for (int64_t i = 0; i < kTile; ++i) {
        load_chunk(f.data, f.dtype, i < ranks ? (q * kTile + i) * f.rank_stride + first : 0,
                   i < ranks ? min_i64(kChunk, f.features - first) : 0, p.by_nibble, high[i], low[i]);
        if (p.by_nibble && chunk_steps == 2) {
          join_half_chunk(high[i]);
          join_half_chunk(low[i]);
        }
      }
      for (int s = 0; s < chunk_steps; ++s)
        for (int part = 0; part < splits; ++part) {
          Words rows[16];
          for (int i = 0; i < 16; ++i) rows[i] = part == 0 ? high[i][s] : low[i][s];
          if (!p.as_rows) transpose(rows);
          for (int i = 0; i < 16; ++i) store_words(out + part * pitch + s * kTileBytes + i * 64, rows[i]);
        }
    }
}

void pack_factor(const PackFactorParams& p, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < p.adapters.count; ++i) {
    TileFactor f = p.factor;
    f.data = static_cast<const char*>(f.data) + p.adapters.id(i) * f.adapter_stride * float_bytes(f.dtype);
    pack_factor_of(p, f, p.out + i * f.packed_bytes(), begin, end);
  }
}

// Packs 16 tokens of x [m, k] from `first` on into column tiles.
void pack_columns(const uint16_t* x, int64_t m, int64_t k, const int64_t* row_of, int64_t first, bool by_nibble,
                  uint8_t* out) {
  const int64_t tokens = min_i64(kTile, m - first);
  const uint16_t* row[kTile];
  for (int64_t t = 0; t < tokens; ++t) row[t] = x + row_of_token(row_of, first + t) * k;
  for (int64_t c = 0; c < ceil_div(k, kChunk); ++c) {
    const int64_t chunk_steps = min_i64(kChunk / kStep, steps_of(k) - 4 * c);
    for (int q = 0; q < chunk_steps; ++q) {
      const int64_t at = c * kChunk + 32 * q;
      Words rows[16];
      for (int64_t t = 0; t < kTile; ++t) rows[t] = t < tokens ? load16(row[t] + at, k - at) : zero_words();
      if (by_nibble)
        for (int t = 0; t < kTile; ++t) rows[t] = nibble_pairs(rows[t]);
      transpose(rows);
      for (int i = 0; i < 16; ++i) {
        // If by_nibble, word i belongs to vector i % 4 of the nibble order and holds elements of 8j … 8j + 7, where
        // j = 4q + i / 4. A vector is a step; in a half chunk two vectors are.
        const int64_t vector_rows = kTile * chunk_steps / 4;
        const int64_t row = by_nibble ? i % 4 * vector_rows + 4 * q + i / 4 : kTile * q + i;
        store_words(out + c * 4 * kTileBytes + row * 64, rows[i]);
      }
    }
  }
}

// Packs 16 tokens into row tiles, in natural order.
void pack_rows(const uint16_t* x, int64_t m, int64_t k, const int64_t* row_of, int64_t first, uint8_t* out) {
  const int64_t tokens = min_i64(kTile, m - first);
  for (int64_t t = 0; t < kTile; ++t) {
    const uint16_t* row = t < tokens ? x + row_of_token(row_of, first + t) * k : nullptr;
    for (int64_t s = 0; s < steps_of(k); ++s)
      store_words(out + s * kTileBytes + t * 64,
                  row != nullptr ? load16(row + s * kStep, k - s * kStep) : zero_words());
  }
}

int64_t token_pitch(int64_t features, const TileFactor& factor, const TileAdapters& adapters) {
  return token_steps(features, adapters.count * low_rank_steps(factor.r, factor.dtype)) * kTileBytes;
}

// Mask of the tokens, of 16 from `first` on, that use adapter i of those in use.
unsigned tokens_with(const TileAdapters& adapters, int64_t i, int64_t first, int64_t m) {
  if (adapters.adapter_of_token == nullptr) return 0xFFFF;
  unsigned mask = 0;
  for (int64_t t = 0; t < kTile && first + t < m; ++t)
    mask |= static_cast<unsigned>(adapters.adapter_of_token[first + t] == adapters.id(i)) << t;
  return mask;
}

constexpr int64_t kTileFloats = 256;

int64_t forward_tokens_scratch(const ForwardTokensParams& p) {
  return kTileFloats + (p.lora_x != nullptr ? steps_of(p.k) * kTileFloats : 0);
}

void forward_tokens(const ForwardTokensParams& p, int64_t begin, int64_t end, float* scratch) {
  const TileScope scope;
  const TileFactor& f = p.factor;
  const int64_t steps = steps_of(p.k), ranks = tiles_of(f.r), extra = low_rank_steps(f.r, f.dtype);
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint8_t* source;
    uint8_t* low_rank;
    if (p.columns != nullptr) {
      source = p.columns + tile * token_steps(p.k, 0) * kTileBytes;
      low_rank = p.out + tile * p.adapters.count * extra * kTileBytes;
    } else {
      uint8_t* out = p.out + tile * token_pitch(p.k, f, p.adapters);
      pack_columns(static_cast<const uint16_t*>(p.x), p.m, p.k, p.row_of, tile * kTile, p.by_nibble, out);
      source = out;
      low_rank = out + steps * kTileBytes;
    }
    if (f.r == 0) continue;
    if (p.lora_x != nullptr) {
      auto* dropped = reinterpret_cast<uint8_t*>(scratch + kTileFloats);
      pack_columns(static_cast<const uint16_t*>(p.lora_x), p.m, p.k, p.row_of, tile * kTile, p.by_nibble, dropped);
      source = dropped;
    }
    std::memset(low_rank, 0, static_cast<size_t>(p.adapters.count * extra * kTileBytes));
    for (int64_t a = 0; a < p.adapters.count; ++a, low_rank += extra * kTileBytes) {
      const unsigned mine = tokens_with(p.adapters, a, tile * kTile, p.m);
      if (mine == 0) continue;
      const Floats scale = spread(p.adapters.scale_of(a));
      for (int64_t q = 0; q < ranks; ++q) {
        const uint8_t* rows = p.factor_rows + a * f.packed_bytes() + q * f.splits() * steps * kTileBytes;
        for (int64_t part = 0; part < f.splits(); ++part)
          multiply<1, 1>(rows + part * steps * kTileBytes, 0, source, 0, steps, part == 0, scratch, 0);
        for (int64_t i = 0; i < kTile / 2; ++i) {  // pairs of ranks
          const Floats even = keep_lanes(mine, load_floats(scratch + 32 * i) * scale);
          const Floats odd = keep_lanes(mine, load_floats(scratch + 32 * i + 16) * scale);
          const Halves even_high = round16(even), odd_high = round16(odd);
          const Words high = pair_halves(even_high, odd_high);
          const Words low = pair_halves(rest16(even, even_high), rest16(odd, odd_high));
          for (int64_t part = 0; part < low_rank_parts(f.dtype); ++part) {
            const int64_t pair = (part * ranks + q) * (kTile / 2) + i;
            store_words(low_rank + pair * 64, part == 1 ? low : high);
          }
        }
      }
    }
  }
}

int64_t backward_tokens_scratch(const BackwardTokensParams& p) {
  return kTileFloats + (p.out == nullptr ? steps_of(p.n) * kTileFloats : 0);
}

void backward_tokens(const BackwardTokensParams& p, int64_t begin, int64_t end, float* scratch) {
  const TileScope scope;
  const TileFactor& f = p.factor;
  const int64_t steps = steps_of(p.n), ranks = tiles_of(f.r), extra = low_rank_steps(f.r, f.dtype);
  for (int64_t tile = begin; tile < end; ++tile) {
    uint8_t* out = p.out != nullptr ? p.out + tile * token_pitch(p.n, f, p.adapters)
                                    : reinterpret_cast<uint8_t*>(scratch + kTileFloats);
    pack_rows(static_cast<const uint16_t*>(p.dy), p.m, p.n, p.row_of, tile * kTile, out);
    if (f.r == 0) continue;
    uint8_t* low_rank = out + steps * kTileBytes;
    if (p.out != nullptr) std::memset(low_rank, 0, static_cast<size_t>(p.adapters.count * extra * kTileBytes));
    for (int64_t a = 0; a < p.adapters.count; ++a, low_rank += extra * kTileBytes) {
      const unsigned mine = tokens_with(p.adapters, a, tile * kTile, p.m);
      const Floats scale = spread(p.adapters.scale_of(a));
      for (int64_t q = 0; q < ranks; ++q) {
        const uint8_t* cols = p.factor_columns + a * f.packed_bytes() + q * f.splits() * steps * kTileBytes;
        for (int64_t part = 0; part < f.splits() && mine != 0; ++part)
          multiply<1, 1>(out, 0, cols + part * steps * kTileBytes, 0, steps, part == 0, scratch, 0);
        for (int64_t t = 0; t < kTile; ++t) {
          const unsigned all = (mine >> t & 1) != 0 ? 0xFFFF : 0;
          const Floats v = keep_lanes(all, load_floats(scratch + 16 * t) * scale);
          const int64_t token = tile * kTile + t;
          if (p.dy_down != nullptr && token < p.m)
            store_floats(p.dy_down + (token * p.adapters.count + a) * f.r + q * kTile, f.r - q * kTile, v);
          if (p.out == nullptr || all == 0) continue;
          const Halves high = round16(v), low = rest16(v, high);
          for (int64_t part = 0; part < low_rank_parts(f.dtype); ++part) {
            const int64_t at = (part * ranks + q) * kTile;  // element of the row
            uint8_t* to = low_rank + at / kStep * kTileBytes + t * 64 + at % kStep * 2;
            store_halves(to, part == 1 ? low : high);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace qlora::cpu
