// Kernel for many tokens: a panel of W is dequantized once into cache and used for every token. Forward, backward and
// low-rank gradients share one loop nest with different operands:
// out[row, col] = sum over steps of operand[row, step] * columns[step, col].
//
// Vectors hold columns (tokens), and elements of the operand are broadcast. So a row of W is used as it was
// dequantized, without a transpose; the backward only swaps which index of the panel is contiguous. For a few columns
// it also swaps their parts: vectors hold rows of the result, and tokens are broadcast.
#pragma once

#include <cstring>
#include <type_traits>

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

// The most columns of a block, whole tiles. Accumulators of a panel's rows are to stay in L2: 132 KiB of them, or 264
// KiB in the transposed form with AVX-512, whose processors have at least 512 KiB where others have 256.
template <class V, bool kTransposed>
constexpr int64_t most_cols() {
  constexpr int64_t kTileCols = V::kLanes * V::kTileVecs, kMost = kTransposed && V::kLanes <= 8 ? 264 : 528;
  return kMost / kTileCols * kTileCols;
}

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
// Missing rows of the last register tile or vector are zero. The next steps of packed weights are prefetched: a panel
// takes one cache line of each of 64 rows, which the hardware does not see coming.
template <class V, bool kTransposed>
void fill_panel(const Operand& a, int64_t row0, int64_t rows, int64_t step0, int64_t steps, float* panel) {
  using P = Panel<kTransposed>;
  constexpr int64_t kUnit = kTransposed && V::kLanes > V::kTileRows ? V::kLanes : V::kTileRows;
  const int64_t padded_rows = ceil_div(rows, kUnit) * kUnit;
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

// Multiplies one register tile, kRows x kVecs vectors of accumulators, over `steps` steps: element (row, step) of
// `scalars` is at row * kRowStride + step * kStepStride, vector j of a step at step * kVecStride + j * lanes. It adds
// to c, or overwrites c if `first`.
template <class V, int kRows, int kVecs, int64_t kRowStride, int64_t kStepStride, int64_t kVecStride>
void tile(const float* scalars, const float* vectors, int64_t steps, bool first, float* c, int64_t c_ld) {
  typename V::F acc[kRows][kVecs];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) acc[i][j] = V::zero();
#pragma GCC unroll 4  // AVX2: 20 instead of 22 instructions a step, which counts where hyperthreads share a core
  for (int64_t s = 0; s < steps; ++s) {
    typename V::F x[kVecs];
    for (int j = 0; j < kVecs; ++j) x[j] = V::load(vectors + s * kVecStride + j * V::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto w = V::set1(scalars[i * kRowStride + s * kStepStride]);
      for (int j = 0; j < kVecs; ++j) acc[i][j] = V::fma(w, x[j], acc[i][j]);
    }
  }
  const auto store = [&](const auto& sum) __attribute__((always_inline)) {
#pragma GCC unroll 16  // or GCC keeps the accumulators in memory
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        float* out = c + i * c_ld + j * V::kLanes;
        V::store(out, sum(out, acc[i][j]));
      }
  };
  if (first)
    store([](const float*, typename V::F x) { return x; });
  else
    store([](const float* out, typename V::F x) { return V::add(V::load(out), x); });
}

// Multiplies the rows of a panel with kVecs vectors of columns. Calls before_tile(row) before each register tile.
template <class V, bool kTransposed, int kVecs, class BeforeTile>
void panel_times_columns(const float* panel, const float* columns, int64_t steps, int64_t rows, bool first, float* c,
                         int64_t c_ld, const BeforeTile& before_tile) {
  constexpr int64_t kLd = Panel<kTransposed>::kLd, kTileCols = V::kLanes * V::kTileVecs;
  constexpr int64_t kRowStride = kTransposed ? 1 : kLd, kStepStride = kTransposed ? kLd : 1;
  const auto multiply = [&](auto tile_rows, int64_t i) {
    before_tile(i);
    tile<V, tile_rows, kVecs, kRowStride, kStepStride, kTileCols>(panel + i * kRowStride, columns, steps, first,
                                                                  c + i * c_ld, c_ld);
  };
  using Rows = std::integral_constant<int, V::kTileRows>;
  const int64_t end = ceil_div(rows, Rows::value) * Rows::value;  // the panel has rows of zeros up to here
  int64_t i = 0;
  if constexpr (kVecs < V::kTileVecs) {
    // A product waits four cycles for the sum before it, and two begin in each cycle. So eight sums are the least that
    // keep a processor busy, and taller tiles have twelve. What remains has to be whole tiles.
    using Tall = std::integral_constant<int, (12 / kVecs > V::kTileRows ? 12 / kVecs : V::kTileRows)>;
    for (; end - i == Tall::value || end - i >= Tall::value + Rows::value; i += Tall::value) multiply(Tall{}, i);
  }
  for (; i < end; i += Rows::value) multiply(Rows{}, i);
}

// Calls fn with the number of vectors that `width` elements take, 1 to V::kTileVecs, as a constant.
template <class V, class Fn>
void for_vectors(int64_t width, const Fn& fn) {
  static_assert(V::kTileVecs == 1 || V::kTileVecs == 3);
  if constexpr (V::kTileVecs == 3) {
    if (width <= V::kLanes) return fn(std::integral_constant<int, 1>{});
    if (width <= 2 * V::kLanes) return fn(std::integral_constant<int, 2>{});
  }
  fn(std::integral_constant<int, V::kTileVecs>{});
}

// Writes a vector of results, or its first `count` lanes.
template <class V, class T>
QLORA_INLINE void store_some(T* out, typename V::F x, int64_t count) {
  if (count == V::kLanes) return V::store(out, x);
  T all[V::kLanes];
  V::store(all, x);
  std::memcpy(out, all, static_cast<size_t>(count) * sizeof(T));
}

// Scales, adds the bias, converts, and writes one block of accumulators: c[row][c_ld], or c[col][c_ld] if `by_col`.
template <class V, class T>
void store_block(const GemmParams& p, int64_t row0, int64_t rows, int64_t col0, int64_t cols, const float* c,
                 int64_t c_ld, bool by_col) {
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
  const auto store_rows = [&](int64_t j, int64_t i, typename V::F sums) __attribute__((always_inline)) {
    const int64_t col = p.out_col_of != nullptr ? p.out_col_of[col0 + j] : col0 + j, count = min_i64(kLanes, rows - i);
    auto y = V::add(V::mul(sums, scale), V::load(bias + i));
    if (p.addend != nullptr) {
      float addend[kLanes] = {};
      std::memcpy(addend, p.addend + col * p.rows + row0 + i, static_cast<size_t>(count) * sizeof(float));
      y = V::add(y, V::load(addend));
    }
    store_some<V>(out + col * p.out_ld + row0 + i, y, count);
  };
  if (by_col) {
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = 0; i < rows; i += kLanes) store_rows(j, i, V::load(c + j * c_ld + i));
    return;
  }
  for (int64_t j0 = 0; j0 < cols; j0 += kLanes)
    for (int64_t i = 0; i < rows; i += kLanes) {
      typename V::F block[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) block[lane] = V::load(c + (i + lane) * c_ld + j0);
      V::transpose(block);
      for (int64_t j = 0; j < min_i64(kLanes, cols - j0); ++j) store_rows(j0 + j, i, block[j]);
    }
}

// How the rows and columns of a product are cut into items. Their sizes change no result.
struct Items {
  int64_t panel_rows, panels, block_cols, blocks;
};

// Cuts them for the threads that share them, because each receives an equal number of items: the way that takes the
// least time if a product of a row and a column takes 1, unpacking a row as much as 12 columns, and loading a column as
// much as 2 rows. Rows of a transposed panel are a run of weights. On AVX2 they take twice as long to unpack if the
// panel does not end with a whole run of 32.
template <class V, bool kTransposed>
Items items_of(const GemmParams& p) {
  constexpr int64_t kTileCols = V::kLanes * V::kTileVecs, kMostRows = Panel<kTransposed>::kRows;
  const int64_t tiles = ceil_div(p.cols, kTileCols);
  const int64_t least_panels = ceil_div(p.rows, kMostRows),
                least_blocks = ceil_div(tiles, most_cols<V, kTransposed>() / kTileCols);
  Items best{};
  int64_t best_time = INT64_MAX;
  const auto consider_unit = [&](int64_t panels, int64_t blocks, int64_t unit, int64_t unpacking) {
    Items now;
    now.panel_rows = ceil_div(ceil_div(p.rows, unit), panels) * unit;
    now.panels = ceil_div(p.rows, now.panel_rows);
    now.block_cols = ceil_div(tiles, blocks) * kTileCols;
    now.blocks = ceil_div(p.cols, now.block_cols);
    const int64_t rounds = ceil_div(now.panels * now.blocks, p.threads);
    const int64_t rows = p.threads == 1 ? now.blocks * p.rows : rounds * now.panel_rows;  // of the slowest thread
    const int64_t time = (rows + 2 * rounds) * (now.block_cols + unpacking);
    if (time >= best_time) return;
    best = now;
    best_time = time;
  };
  const auto consider = [&](int64_t panels, int64_t blocks) {
    if (kTransposed) consider_unit(panels, blocks, 32, 12);
    consider_unit(panels, blocks, V::kTileRows, kTransposed ? 24 : 12);
  };
  if (p.rows <= 0 || p.cols <= 0) return best;
  consider(least_panels, least_blocks);
  if (p.threads == 1) return best;
  for (int64_t blocks = least_blocks; blocks <= min_i64(least_blocks + 6, tiles); ++blocks)
    for (int64_t rounds = ceil_div(least_panels * blocks, p.threads), i = 0; i < 2; ++i, ++rounds)
      consider(min_i64(max_i64(rounds * p.threads / blocks, least_panels), ceil_div(p.rows, V::kTileRows)), blocks);
  return best;
}

inline constexpr int64_t kMostKeptBytes = 512 << 10;  // columns that are taken to stay in L2 between two panels

inline void prefetch_into_l2(const float* data, int64_t floats) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t i = 0; i < floats; i += kLine) __builtin_prefetch(data + i, /*rw=*/0, /*locality=*/2);
}

// A block of columns of the product, and one panel's share of its steps.
struct Block {
  int64_t rows, col0, cols, step0, steps;
};

// Multiplies a panel with the columns of a block that the term has. It adds to c[row][col], or overwrites c if `first`.
template <class V, bool kTransposed>
void multiply_panel(const float* panel, const Term& t, const Block& b, bool first, float* c) {
  constexpr int64_t kTileCols = V::kLanes * V::kTileVecs, kLd = most_cols<V, kTransposed>(),
                    kSteps = Panel<kTransposed>::kSteps;
  const auto columns_of = [&](int64_t col, int64_t step) {
    return t.columns + (col - t.first_column) * t.steps + step * kTileCols;
  };
  const int64_t end = min_i64(b.col0 + b.cols, t.end);
  // A block of columns with all steps is read again for each panel. If it is too large to be still in L2 then, the
  // columns that are next are prefetched in parts, each beside a register tile of rows.
  const bool prefetches = b.cols * t.steps * int64_t{sizeof(float)} > kMostKeptBytes;
  const int64_t part = ceil_div(kTileCols * kSteps, ceil_div(b.rows, V::kTileRows));
  const auto next_of = [&](int64_t col) -> const float* {
    if (col + kTileCols < end) return columns_of(col + kTileCols, b.step0);
    if (col > b.col0 && t.begin <= b.col0 && b.step0 + kSteps < t.steps) return columns_of(b.col0, b.step0 + kSteps);
    return nullptr;
  };
  for (int64_t col = b.col0; col < end; col += kTileCols) {
    const int64_t j = col - b.col0, width = min_i64(kTileCols, b.cols - j);
    const int64_t from = max_i64(t.begin - col, 0), to = min_i64(end - col, width);
    if (from >= to) continue;
    const float* columns = columns_of(col, b.step0);
    if (from == 0 && to == width) {
      const float* next = prefetches ? next_of(col) : nullptr;
      const auto prefetch = [&](int64_t row) {
        if (next != nullptr) prefetch_into_l2(next + row / V::kTileRows * part, part);
      };
      for_vectors<V>(width, [&](auto vecs) {
        panel_times_columns<V, kTransposed, vecs>(panel, columns, b.steps, b.rows, first, c + j, kLd, prefetch);
      });
      continue;
    }
    for (int64_t v = from / V::kLanes * V::kLanes; v < to; v += V::kLanes)
      panel_times_columns<V, kTransposed, 1>(panel, columns + v, b.steps, b.rows, first, c + j + v, kLd,
                                             [](int64_t) {});
  }
}

// Whether columns are broadcast, while vectors hold rows of the result.
template <class V, bool kTransposed>
bool has_few_cols(const GemmParams& p) {
  return kTransposed && p.cols <= V::kTileRows && !p.rows_are_major;
}

// The same for a few columns: adds to c[col][row]. Columns of the vector that the term does not have are zero in it.
template <class V>
void multiply_few(const float* panel, const Term& t, const Block& b, bool first, float* c) {
  constexpr int64_t kTileCols = V::kLanes * V::kTileVecs, kLd = Panel<true>::kLd;
  const float* columns = t.columns + (b.col0 - t.first_column) * t.steps + b.step0 * kTileCols;
  for (int64_t i = 0; i < b.rows; i += kTileCols)
    for_vectors<V>(b.rows - i, [&](auto vecs) {
      tile<V, V::kTileRows, vecs, 1, kTileCols, kLd>(columns, panel + i, b.steps, first, c + i, kLd);
    });
}

template <class V, bool kTransposed>
void gemm_items_typed(const GemmParams& p, int64_t begin, int64_t end, float* panel) {
  using P = Panel<kTransposed>;
  const Items items = items_of<V, kTransposed>(p);
  const bool few = has_few_cols<V, kTransposed>(p);
  const int64_t c_ld = few ? P::kLd : most_cols<V, kTransposed>();
  float* c = panel + P::kRows * P::kSteps;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t row0 = item / items.blocks * items.panel_rows, rows = min_i64(items.panel_rows, p.rows - row0);
    const int64_t col0 = item % items.blocks * items.block_cols, cols = min_i64(items.block_cols, p.cols - col0);
    bool first = true;
    const auto clear = [&] {
      const int64_t lines = few ? V::kTileRows : rows, count = few ? rows : cols;
      for (int64_t i = 0; i < lines; ++i) std::memset(c + i * c_ld, 0, static_cast<size_t>(count) * sizeof(float));
    };
    for (int64_t term = 0; term < p.term_count; ++term) {
      const Term& t = p.terms[term];
      if (t.begin >= col0 + cols || t.end <= col0) continue;
      if (first && (term > 0 || t.begin > col0 || t.end < col0 + cols)) {  // some columns may have no term
        clear();
        first = false;
      }
      for (int64_t s0 = 0; s0 < t.steps; s0 += P::kSteps) {
        const Block block{rows, col0, cols, s0, min_i64(P::kSteps, t.steps - s0)};
        fill_panel<V, kTransposed>(t.operand, row0, rows, s0, block.steps, panel);
        if (few)
          multiply_few<V>(panel, t, block, first, c);
        else
          multiply_panel<V, kTransposed>(panel, t, block, first, c);
        first = false;
      }
    }
    if (first) clear();
    switch (p.out_dtype) {
      case DType::kBFloat16:
        store_block<V, bf16>(p, row0, rows, col0, cols, c, c_ld, few);
        break;
      case DType::kFloat16:
        store_block<V, fp16>(p, row0, rows, col0, cols, c, c_ld, few);
        break;
      default:
        store_block<V, float>(p, row0, rows, col0, cols, c, c_ld, few);
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
  if (p.transposed) return Panel<true>::kRows * (Panel<true>::kSteps + most_cols<V, true>());
  return Panel<false>::kRows * (Panel<false>::kSteps + most_cols<V, false>());
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
