// Packs tokens and low-rank factors into tiles, and computes the down projections of the tokens. See tiles.h.
#pragma once

#include <cstring>

#include "cpu/tiles/products.h"
#include "cpu/tiles/vectors.h"

namespace qlora::cpu {
namespace {

// Reorders 128 elements to the nibble order of unpacked weights (unpack_impl.h): out[s] holds elements 4i + s.
QLORA_INLINE void nibble_order(const __m512i (&natural)[4], __m512i (&out)[4]) {
  __m512i index = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 60, 56, 52, 48, 44, 40, 36, 32, 28,
                                   24, 20, 16, 12, 8, 4, 0);
  for (int s = 0; s < 4; ++s, index = _mm512_add_epi16(index, _mm512_set1_epi16(1))) {
    const __m512i low = _mm512_permutex2var_epi16(natural[0], index, natural[1]);
    const __m512i high = _mm512_permutex2var_epi16(natural[2], index, natural[3]);
    out[s] = _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
  }
}

// Loads `count` elements of a row, at most 128, from `at` on, as high and low halves; the rest of the 128 are zero.
QLORA_INLINE void load_chunk(const void* data, DType dtype, int64_t at, int64_t count, bool by_nibble,
                             __m512i (&high)[4], __m512i (&low)[4]) {
  __m512i h[4], l[4];
  for (int q = 0; q < 4; ++q) {
    const __m512 a = load_floats(data, dtype, at + 32 * q, count - 32 * q > 0 ? count - 32 * q : 0);
    const __m512 b = load_floats(data, dtype, at + 32 * q + 16, count - 32 * q - 16 > 0 ? count - 32 * q - 16 : 0);
    h[q] = round16(a, b);
    const __m512 a_high = widen16(_mm512_castsi512_si256(h[q])), b_high = widen16(_mm512_extracti64x4_epi64(h[q], 1));
    l[q] = round16(_mm512_sub_ps(a, a_high), _mm512_sub_ps(b, b_high));
  }
  if (by_nibble) {
    nibble_order(h, high);
    nibble_order(l, low);
  } else {
    for (int q = 0; q < 4; ++q) high[q] = h[q], low[q] = l[q];
  }
}

// Interleaves two rows of 16 ranks into the words of one row of a column tile.
QLORA_INLINE __m512i pair_halves(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

void pack_factor_of(const PackFactorParams& p, const TileFactor& f, uint8_t* packed, int64_t begin, int64_t end) {
  const int64_t steps = steps_of(f.features), splits = f.splits(), pitch = steps * kTileBytes;
  for (int64_t chunk = begin; chunk < end; ++chunk)
    for (int64_t q = 0; q < tiles_of(f.r); ++q) {
      uint8_t* out = packed + (q * splits * steps + chunk * 4) * kTileBytes;
      const int64_t ranks = min_i64(kTile, f.r - q * kTile), first = chunk * kChunk;
      if (f.rank_stride == 1 && !p.as_rows) {  // the matrix is [features, ranks]: column tiles need no transpose
        for (int64_t pair = 0; pair < kChunk / 2; ++pair) {
          __m256i high[2], low[2];
          for (int i = 0; i < 2; ++i) {
            const int64_t feature = first + 2 * pair + i;
            const __m512 values =
                load_floats(f.data, f.dtype, feature < f.features ? feature * f.feature_stride + q * kTile : 0,
                            feature < f.features ? ranks : 0);
            high[i] = round16(values);
            low[i] = rest16(values, high[i]);
          }
          uint8_t* to = out + pair / 16 * kTileBytes + pair % 16 * 64;
          _mm512_storeu_si512(to, pair_halves(high[0], high[1]));
          if (splits == 2) _mm512_storeu_si512(to + pitch, pair_halves(low[0], low[1]));
        }
        continue;
      }
      __m512i high[16][4], low[16][4];
      for (int64_t i = 0; i < kTile; ++i)
        load_chunk(f.data, f.dtype, i < ranks ? (q * kTile + i) * f.rank_stride + first : 0,
                   i < ranks ? min_i64(kChunk, f.features - first) : 0, p.by_nibble, high[i], low[i]);
      for (int s = 0; s < 4; ++s)
        for (int part = 0; part < splits; ++part) {
          __m512i rows[16];
          for (int i = 0; i < 16; ++i) rows[i] = part == 0 ? high[i][s] : low[i][s];
          if (!p.as_rows) VecAvx512::transpose(rows);
          for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + part * pitch + s * kTileBytes + i * 64, rows[i]);
        }
    }
}

void pack_factor(const PackFactorParams& p, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < p.adapters.count; ++i) {
    TileFactor f = p.factor;
    const int64_t element_bytes = f.dtype == DType::kFloat32 ? 4 : 2;
    f.data = static_cast<const char*>(f.data) + p.adapters.id(i) * f.adapter_stride * element_bytes;
    pack_factor_of(p, f, p.out + i * f.packed_bytes(), begin, end);
  }
}

// Packs 16 tokens of x [m, k] from `first` on into column tiles.
void pack_columns(const uint16_t* x, int64_t m, int64_t k, const int64_t* row_of, int64_t first, bool by_nibble,
                  uint8_t* out) {
  const __m512i lanes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  const int64_t tokens = min_i64(kTile, m - first);
  const uint16_t* row[kTile];
  for (int64_t t = 0; t < tokens; ++t) row[t] = x + row_of_token(row_of, first + t) * k;
  for (int64_t c = 0; c < ceil_div(k, kChunk); ++c)
    for (int q = 0; q < 4; ++q) {
      const int64_t at = c * kChunk + 32 * q;
      __m512i rows[16];
      for (int64_t t = 0; t < kTile; ++t) {
        rows[t] = t < tokens ? load16(row[t] + at, k - at) : _mm512_setzero_si512();
        if (by_nibble) rows[t] = _mm512_shuffle_epi8(rows[t], lanes);
      }
      VecAvx512::transpose(rows);
      for (int i = 0; i < 16; ++i) {
        // If by_nibble, word i belongs to step i % 4 and holds elements of 8j … 8j + 7, where j = 4q + i / 4.
        const int step = by_nibble ? i % 4 : q, row = by_nibble ? 4 * q + i / 4 : i;
        _mm512_storeu_si512(out + (c * 4 + step) * kTileBytes + row * 64, rows[i]);
      }
    }
}

// Packs 16 tokens into row tiles, in natural order.
void pack_rows(const uint16_t* x, int64_t m, int64_t k, const int64_t* row_of, int64_t first, uint8_t* out) {
  const int64_t tokens = min_i64(kTile, m - first);
  for (int64_t t = 0; t < kTile; ++t) {
    const uint16_t* row = t < tokens ? x + row_of_token(row_of, first + t) * k : nullptr;
    for (int64_t s = 0; s < steps_of(k); ++s)
      _mm512_storeu_si512(out + s * kTileBytes + t * 64,
                          row != nullptr ? load16(row + s * kStep, k - s * kStep) : _mm512_setzero_si512());
  }
}

int64_t token_pitch(int64_t features, const TileFactor& factor, const TileAdapters& adapters) {
  return token_steps(features, adapters.count * low_rank_steps(factor.r, factor.dtype)) * kTileBytes;
}

// Mask of the tokens, of 16 from `first` on, that use adapter i of those in use.
__mmask16 tokens_with(const TileAdapters& adapters, int64_t i, int64_t first, int64_t m) {
  if (adapters.adapter_of_token == nullptr) return 0xFFFF;
  unsigned mask = 0;
  for (int64_t t = 0; t < kTile && first + t < m; ++t)
    mask |= static_cast<unsigned>(adapters.adapter_of_token[first + t] == adapters.id(i)) << t;
  return static_cast<__mmask16>(mask);
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
    uint8_t* out = p.out + tile * token_pitch(p.k, f, p.adapters);
    pack_columns(static_cast<const uint16_t*>(p.x), p.m, p.k, p.row_of, tile * kTile, p.by_nibble, out);
    if (f.r == 0) continue;
    const uint8_t* source = out;
    if (p.lora_x != nullptr) {
      auto* dropped = reinterpret_cast<uint8_t*>(scratch + kTileFloats);
      pack_columns(static_cast<const uint16_t*>(p.lora_x), p.m, p.k, p.row_of, tile * kTile, p.by_nibble, dropped);
      source = dropped;
    }
    uint8_t* low_rank = out + steps * kTileBytes;
    std::memset(low_rank, 0, static_cast<size_t>(p.adapters.count * extra * kTileBytes));
    for (int64_t a = 0; a < p.adapters.count; ++a, low_rank += extra * kTileBytes) {
      const __mmask16 mine = tokens_with(p.adapters, a, tile * kTile, p.m);
      if (mine == 0) continue;
      const __m512 scale = _mm512_set1_ps(p.adapters.scale_of(a));
      for (int64_t q = 0; q < ranks; ++q) {
        const uint8_t* rows = p.factor_rows + a * f.packed_bytes() + q * f.splits() * steps * kTileBytes;
        for (int64_t part = 0; part < f.splits(); ++part)
          multiply<1, 1>(rows + part * steps * kTileBytes, 0, source, 0, steps, part == 0, scratch, 0);
        for (int64_t i = 0; i < kTile / 2; ++i) {  // pairs of ranks
          const __m512 even = _mm512_maskz_mul_ps(mine, _mm512_loadu_ps(scratch + 32 * i), scale);
          const __m512 odd = _mm512_maskz_mul_ps(mine, _mm512_loadu_ps(scratch + 32 * i + 16), scale);
          const __m256i even_high = round16(even), odd_high = round16(odd);
          const __m512i high = pair_halves(even_high, odd_high);
          const __m512i low = pair_halves(rest16(even, even_high), rest16(odd, odd_high));
          for (int64_t part = 0; part < low_rank_parts(f.dtype); ++part) {
            const int64_t pair = (part * ranks + q) * (kTile / 2) + i;
            _mm512_storeu_si512(low_rank + pair * 64, part == 1 ? low : high);
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
      const __mmask16 mine = tokens_with(p.adapters, a, tile * kTile, p.m);
      const __m512 scale = _mm512_set1_ps(p.adapters.scale_of(a));
      for (int64_t q = 0; q < ranks; ++q) {
        const uint8_t* cols = p.factor_columns + a * f.packed_bytes() + q * f.splits() * steps * kTileBytes;
        for (int64_t part = 0; part < f.splits() && mine != 0; ++part)
          multiply<1, 1>(out, 0, cols + part * steps * kTileBytes, 0, steps, part == 0, scratch, 0);
        for (int64_t t = 0; t < kTile; ++t) {
          const __mmask16 all = (mine >> t & 1) != 0 ? 0xFFFF : 0;
          const __m512 v = _mm512_maskz_mul_ps(all, _mm512_loadu_ps(scratch + 16 * t), scale);
          const int64_t token = tile * kTile + t;
          if (p.dy_down != nullptr && token < p.m)
            _mm512_mask_storeu_ps(p.dy_down + (token * p.adapters.count + a) * f.r + q * kTile,
                                  static_cast<__mmask16>(mask32(min_i64(16, f.r - q * kTile))), v);
          if (p.out == nullptr || all == 0) continue;
          const __m256i high = round16(v), low = rest16(v, high);
          for (int64_t part = 0; part < low_rank_parts(f.dtype); ++part) {
            const int64_t at = (part * ranks + q) * kTile;  // element of the row
            uint8_t* to = low_rank + at / kStep * kTileBytes + t * 64 + at % kStep * 2;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), part == 1 ? low : high);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace qlora::cpu
