// Unpacks W into tiles of bfloat16, and defines the block sizes of the products on tiles. See tiles.h.
#pragma once

#include <cstring>

#include "cpu/gemv/gemv_impl.h"
#include "cpu/tiles/tokens_impl.h"

namespace qlora::cpu {
namespace {

// Block sizes for a core with 48 KiB of L1 and 2 MiB of L2. With a chunk of 256 elements of the reduction, two tiles of
// rows and two of columns fit into L1 together. 512 elements took 1.2 times as long at m = 512, because rows and
// columns evicted each other (docs/notes/cpu-kernels.md).
constexpr int64_t kChunkSteps = 8;
constexpr int64_t kMostChunkSteps = kChunkSteps + 2;  // the last chunk takes a rest of two steps, which saves a pass
constexpr int64_t kFewItems = 8;  // with fewer items than this, panels get narrower so that every thread has work

// Blocks of tokens in pairs of tiles, as equal as possible, because threads receive equal numbers of items.
struct TokenBlocks {
  int64_t count, tiles;  // tiles: tiles of a block; the last block may have fewer
  TokenBlocks(int64_t m, int64_t most_tiles) {
    count = ceil_div(tiles_of(m), most_tiles);
    tiles = count > 0 ? ceil_div(tiles_of(m), 2 * count) * 2 : 0;
  }
};

int64_t next_chunk_steps(int64_t left) { return left <= kMostChunkSteps ? left : kChunkSteps; }

// Unpacks 128 elements of a row of any weight from `col` on, in natural order, with zeros beyond the end of the row.
void unpack_natural(const WeightView& w, Vec::Table levels, int64_t row, int64_t col, Words (&out)[4]) {
  alignas(64) bf16 buffer[kChunk];
  std::memset(buffer, 0, sizeof buffer);
  if (col < w.k) dequantize_run<Vec>(w, levels, row * w.k + col, min_i64(kChunk, w.k - col), buffer);
  for (int q = 0; q < 4; ++q) out[q] = load_words(buffer + 32 * q);
}

// Number of low-rank steps of all adapters.
template <class Params>
int64_t all_low_rank_steps(const Params& p) {
  return p.adapters.count * low_rank_steps(p.r, p.lora_dtype);
}

}  // namespace
}  // namespace qlora::cpu
