// Kernel for many tokens: a panel of W is dequantized once into cache and used for every token. Forward, backward and
// low-rank gradients share one loop nest with different operands:
// out[row, col] = sum over steps of operand[row, step] * columns[step, col].
//
// Vectors hold columns (tokens), and elements of the operand are broadcast. So a row of W is used as it was
// dequantized, without a transpose; the backward only swaps which index of the panel is contiguous.
#pragma once

#include <cstring>

#include "cpu/gemm/pack_impl.h"
#include "cpu/gemv/gemv_impl.h"
#include "cpu/isa/table.h"
#include "cpu/quantize/dequantize_impl.h"

namespace qlora::cpu {
namespace {

// Panel sizes: 32 KiB of float32, the size of L1, in either orientation.
template <bool kTransposed>
struct Panel {
  static constexpr int64_t kRows = kTransposed ? 128 : 64;  // transposed: one cache line is 128 weights of a row of W
  static constexpr int64_t kSteps = kTransposed ? 64 : 128;
  static constexpr int64_t kLd = kTransposed ? kRows : kSteps;
};
inline constexpr int64_t kMostTilesPerBlock = 10;  // 480 columns of 128 rows: 245 KiB of accumulators stay in L2

// Loads elements [offset, offset + count) of row `line` of a dense matrix as float32.
template <class V>
void load_dense_line(const Operand& a, int64_t line, int64_t offset, int64_t count, float* out) {
  const int64_t base = line * a.ld + offset;
  if (a.affine.scale != nullptr) {  // value * scale + zero_point, each operation rounded
    const int64_t grid = line / a.affine.group * a.affine.group_stride;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t cell = grid + (offset + i) * a.affine.channel_stride;
      const float scaled = load_scalar(a.dense, a.dtype, base + i) * a.affine.scale[cell];
      out[i] = scaled + a.affine.zero_point[cell];
    }
    return;
  }
  if (a.dtype == DType::kFloat32) {
    std::memcpy(out, static_cast<const float*>(a.dense) + base, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  switch (a.dtype) {
    case DType::kBFloat16:
      return to_floats<V>(static_cast<const bf16*>(a.dense) + base, count, out);
    case DType::kFloat16:
      return to_floats<V>(static_cast<const fp16*>(a.dense) + base, count, out);
    default:
      for (int64_t i = 0; i < count; ++i) out[i] = load_scalar(a.dense, a.dtype, base + i);
  }
}

// Fills panel[row][step] (or [step][row] if transposed) with `rows` rows from row0 and `steps` steps from step0.
// Missing rows of the last register tile are zero. The next steps of packed weights are prefetched: a panel takes one
// cache line of each of 64 rows, which the hardware does not see coming.
template <class V, bool kTransposed>
void fill_panel(const Operand& a, int64_t row0, int64_t rows, int64_t step0, int64_t steps, float* panel) {
  using P = Panel<kTransposed>;
  const int64_t padded_rows = ceil_div(rows, V::kTileRows) * V::kTileRows;
  const int64_t lines = kTransposed ? steps : rows;  // lines of the matrix in memory
  const int64_t line0 = kTransposed ? step0 : row0;
  const int64_t offset = kTransposed ? row0 : step0;
  const int64_t count = kTransposed ? rows : steps;
  typename V::Table table{};
  if (a.packed != nullptr) table = V::table(codebook(a.packed->quant_type));
  for (int64_t i = 0; i < lines; ++i) {
    float* out = panel + i * P::kLd;
    if (a.packed != nullptr) {
      const int64_t first = (line0 + i) * a.packed->k + offset;
      dequantize_run<V>(*a.packed, table, first, count, out);
      const uint8_t* next = a.packed->packed + (first + (kTransposed ? P::kSteps * a.packed->k : P::kSteps)) / 2;
      __builtin_prefetch(next);
      __builtin_prefetch(next + 63);
    } else {
      load_dense_line<V>(a, line0 + i, offset, count, out);
    }
    if (kTransposed)
      for (int64_t j = rows; j < padded_rows; ++j) out[j] = 0.0f;
  }
  if (!kTransposed && padded_rows > rows)
    std::memset(panel + rows * P::kLd, 0, static_cast<size_t>((padded_rows - rows) * P::kLd) * sizeof(float));
}

// Multiplies one register tile, kRows x kVecs vectors of accumulators, over `steps` steps. It adds to c, or overwrites
// c if `first`.
template <class V, bool kTransposed, int kVecs, int kRows = V::kTileRows>
void tile(const float* panel, const float* columns, int64_t steps, bool first, float* c, int64_t c_ld) {
  constexpr int64_t kRowStride = kTransposed ? 1 : Panel<kTransposed>::kLd;
  constexpr int64_t kStepStride = kTransposed ? Panel<kTransposed>::kLd : 1;
  constexpr int64_t kTileCols = V::kLanes * V::kTileVecs;
  typename V::F acc[kRows][kVecs];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) acc[i][j] = V::zero();
#pragma GCC unroll 4  // AVX2: 20 instead of 22 instructions a step, which counts where hyperthreads share a core
  for (int64_t s = 0; s < steps; ++s) {
    typename V::F x[kVecs];
    for (int j = 0; j < kVecs; ++j) x[j] = V::load(columns + s * kTileCols + j * V::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto w = V::set1(panel[i * kRowStride + s * kStepStride]);
      for (int j = 0; j < kVecs; ++j) acc[i][j] = V::fma(w, x[j], acc[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) {
      float* out = c + i * c_ld + j * V::kLanes;
      V::store(out, first ? acc[i][j] : V::add(V::load(out), acc[i][j]));
    }
}

// One vector of columns, for two register tiles of rows together: a product waits four cycles for the sum before it,
// and two begin in each cycle, so four accumulators would leave half of them unused.
template <class V, bool kTransposed>
void narrow_tiles(const float* panel, const float* columns, int64_t steps, int64_t rows, bool first, float* c,
                  int64_t c_ld) {
  constexpr int64_t kRowStride = kTransposed ? 1 : Panel<kTransposed>::kLd;
  constexpr int kRows = V::kTileRows, kPair = V::kTileRows < 8 ? 2 * kRows : kRows;
  int64_t i = 0;
  for (; i + kPair <= rows; i += kPair)
    tile<V, kTransposed, 1, kPair>(panel + i * kRowStride, columns, steps, first, c + i * c_ld, c_ld);
  for (; i < rows; i += kRows)
    tile<V, kTransposed, 1>(panel + i * kRowStride, columns, steps, first, c + i * c_ld, c_ld);
}

template <class V, bool kTransposed>
void tile_any_width(const float* panel, const float* columns, int64_t steps, int64_t cols, bool first, float* c,
                    int64_t c_ld) {
  static_assert(V::kTileVecs == 1 || V::kTileVecs == 3);
  if constexpr (V::kTileVecs == 3) {
    if (cols <= 2 * V::kLanes) return tile<V, kTransposed, 2>(panel, columns, steps, first, c, c_ld);
  }
  tile<V, kTransposed, V::kTileVecs>(panel, columns, steps, first, c, c_ld);
}

// Writes a vector of results, or its first `count` lanes.
template <class V, class T>
QLORA_INLINE void store_some(T* out, typename V::F x, int64_t count) {
  if (count == V::kLanes) return V::store(out, x);
  T all[V::kLanes];
  V::store(all, x);
  std::memcpy(out, all, static_cast<size_t>(count) * sizeof(T));
}

// Scales, adds the bias, converts, and writes one block of accumulators c[rows][c_ld].
template <class V, class T>
void store_block(const GemmParams& p, int64_t row0, int64_t rows, int64_t col0, int64_t cols, const float* c,
                 int64_t c_ld) {
  constexpr int64_t kLanes = V::kLanes;
  T* out = static_cast<T*>(p.out);
  const auto scale = V::set1(p.scale);
  float bias[Panel<true>::kRows + V::kLanes] = {};
  for (int64_t i = 0; i < rows && p.bias != nullptr; ++i) bias[i] = load_scalar(p.bias, p.bias_dtype, row0 + i);
  if (p.rows_are_major) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; j += kLanes)
        store_some<V>(out + (row0 + i) * p.out_ld + col0 + j,
                      V::add(V::mul(V::load(c + i * c_ld + j), scale), V::set1(bias[i])), min_i64(kLanes, cols - j));
    return;
  }
  for (int64_t j0 = 0; j0 < cols; j0 += kLanes)
    for (int64_t i = 0; i < rows; i += kLanes) {
      typename V::F block[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) block[lane] = V::load(c + (i + lane) * c_ld + j0);
      V::transpose(block);
      const int64_t count = min_i64(kLanes, rows - i);
      for (int64_t j = 0; j < min_i64(kLanes, cols - j0); ++j) {
        const int64_t col = p.out_col_of != nullptr ? p.out_col_of[col0 + j0 + j] : col0 + j0 + j;
        auto y = V::add(V::mul(block[j], scale), V::load(bias + i));
        if (p.addend != nullptr) {
          float addend[kLanes] = {};
          std::memcpy(addend, p.addend + col * p.rows + row0 + i, static_cast<size_t>(count) * sizeof(float));
          y = V::add(y, V::load(addend));
        }
        store_some<V>(out + col * p.out_ld + row0 + i, y, count);
      }
    }
}

// How the rows and columns of a product are cut into items. Their sizes change no result.
struct Items {
  int64_t panel_rows, panels, block_cols, blocks;
};

// Cuts them for the threads that share them, because each receives an equal number of items: the way that takes the
// least time if a product of a row and a column takes 1, unpacking a row as much as 12 columns, and loading a column as
// much as 2 rows.
template <class V, bool kTransposed>
Items items_of(const GemmParams& p) {
  constexpr int64_t kTileCols = V::kLanes * V::kTileVecs, kMostRows = Panel<kTransposed>::kRows;
  const int64_t row_tiles = ceil_div(p.rows, V::kTileRows), tiles = ceil_div(p.cols, kTileCols);
  const int64_t least_panels = ceil_div(p.rows, kMostRows), least_blocks = ceil_div(tiles, kMostTilesPerBlock);
  Items best{};
  int64_t best_time = INT64_MAX;
  const auto consider = [&](int64_t panels, int64_t blocks) {
    Items now;
    now.panel_rows = ceil_div(row_tiles, panels) * V::kTileRows;
    now.panels = ceil_div(p.rows, now.panel_rows);
    now.block_cols = ceil_div(tiles, blocks) * kTileCols;
    now.blocks = ceil_div(p.cols, now.block_cols);
    const int64_t time = ceil_div(now.panels * now.blocks, p.threads) * (now.panel_rows + 2) * (now.block_cols + 12);
    if (time >= best_time) return;
    best = now;
    best_time = time;
  };
  if (p.rows <= 0 || p.cols <= 0) return best;
  consider(least_panels, least_blocks);
  if (p.threads == 1) return best;
  for (int64_t blocks = least_blocks; blocks <= min_i64(least_blocks + 3, tiles); ++blocks)
    for (int64_t rounds = ceil_div(least_panels * blocks, p.threads), i = 0; i < 2; ++i, ++rounds)
      consider(min_i64(max_i64(rounds * p.threads / blocks, least_panels), row_tiles), blocks);
  return best;
}

template <class V, bool kTransposed>
void gemm_items_typed(const GemmParams& p, int64_t begin, int64_t end, float* panel) {
  using P = Panel<kTransposed>;
  constexpr int64_t kTileCols = V::kLanes * V::kTileVecs, kBlockCols = kMostTilesPerBlock * kTileCols;
  const Items items = items_of<V, kTransposed>(p);
  float* c = panel + P::kRows * P::kSteps;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t row0 = item / items.blocks * items.panel_rows, rows = min_i64(items.panel_rows, p.rows - row0);
    const int64_t col0 = item % items.blocks * items.block_cols, cols = min_i64(items.block_cols, p.cols - col0);
    bool first = true;
    const auto clear = [&] {
      for (int64_t i = 0; i < rows; ++i) std::memset(c + i * kBlockCols, 0, static_cast<size_t>(cols) * sizeof(float));
    };
    for (int64_t term = 0; term < p.term_count; ++term) {
      const Term& t = p.terms[term];
      if (t.begin >= col0 + cols || t.end <= col0) continue;
      if (first && (term > 0 || t.begin > col0 || t.end < col0 + cols)) {  // some columns may have no term
        clear();
        first = false;
      }
      for (int64_t s0 = 0; s0 < t.steps; s0 += P::kSteps) {
        const int64_t steps = min_i64(P::kSteps, t.steps - s0);
        fill_panel<V, kTransposed>(t.operand, row0, rows, s0, steps, panel);
        for (int64_t j = 0; j < cols; j += kTileCols) {
          const int64_t width = min_i64(kTileCols, cols - j), col = col0 + j;
          const int64_t from = max_i64(t.begin - col, 0), to = min_i64(t.end - col, width);
          if (from >= to) continue;
          const float* columns = t.columns + (col - t.first_column) * t.steps + s0 * kTileCols;
          const bool whole = from == 0 && to == width;
          if (V::kTileVecs > 1 && whole && width <= V::kLanes) {
            narrow_tiles<V, kTransposed>(panel, columns, steps, rows, first, c + j, kBlockCols);
            continue;
          }
          for (int64_t i = 0; i < rows; i += V::kTileRows) {
            const float* panel_rows = panel + i * (kTransposed ? 1 : P::kLd);
            float* out = c + i * kBlockCols + j;
            if (whole) {
              tile_any_width<V, kTransposed>(panel_rows, columns, steps, cols - j, first, out, kBlockCols);
              continue;
            }
            for (int64_t v = from / V::kLanes * V::kLanes; v < to; v += V::kLanes)
              tile<V, kTransposed, 1>(panel_rows, columns + v, steps, first, out + v, kBlockCols);
          }
        }
        first = false;
      }
    }
    if (first) clear();
    switch (p.out_dtype) {
      case DType::kBFloat16:
        store_block<V, bf16>(p, row0, rows, col0, cols, c, kBlockCols);
        break;
      case DType::kFloat16:
        store_block<V, fp16>(p, row0, rows, col0, cols, c, kBlockCols);
        break;
      default:
        store_block<V, float>(p, row0, rows, col0, cols, c, kBlockCols);
    }
  }
}

template <class V>
int64_t gemm_items(const GemmParams& p) {
  const Items items = p.transposed ? items_of<V, true>(p) : items_of<V, false>(p);
  return items.panels * items.blocks;
}

// Floats for one panel of the operand and the accumulators of its rows.
template <class V>
int64_t gemm_scratch(const GemmParams& p) {
  constexpr int64_t kBlockCols = kMostTilesPerBlock * V::kLanes * V::kTileVecs;
  if (p.transposed) return Panel<true>::kRows * (Panel<true>::kSteps + kBlockCols);
  return Panel<false>::kRows * (Panel<false>::kSteps + kBlockCols);
}

template <class V>
void gemm(const GemmParams& p, int64_t begin, int64_t end, float* scratch) {
  if (p.transposed) {
    gemm_items_typed<V, true>(p, begin, end, scratch);
  } else {
    gemm_items_typed<V, false>(p, begin, end, scratch);
  }
}

}  // namespace
}  // namespace qlora::cpu
