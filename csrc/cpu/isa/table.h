// Interface of the CPU kernels: parameter structs, and one table of functions per ISA. No torch, no threads.
//
// Extents: m tokens, n out features, k in features, r rank. A kernel works on the range [begin, end) of its unit and
// never starts a thread; csrc/ops owns the parallel loop. Results do not depend on how the range is divided.
#pragma once

#include <cstdint>

#include "cpu/tiles/tiles.h"
#include "format/dtype.h"
#include "format/layout.h"

namespace qlora::cpu {

// Quantizes a weight. Unit: block. Returns the flat position of the first nan or inf in the range, or -1.
struct QuantizeParams {
  const void* weight;  // [numel], float32, bfloat16 or float16
  DType dtype;
  int64_t numel;
  int64_t block;  // weights per absmax
  QuantType quant_type;
  bool check_finite;
  uint8_t* packed;  // [ceil(numel / 2)]
  float* absmax;    // [ceil(numel / block)]
};

// Searches scales (format/scale_search.h). Unit: block. Returns the flat position of the first nan or inf, or -1.
struct SearchScalesParams {
  const float* weight;      // [n, k]
  const float* importance;  // [k]: the weight of a column's squared errors
  int64_t n;
  int64_t k;
  int64_t block;  // weights per absmax
  QuantType quant_type;
  float* absmax;  // [ceil(n * k / block)]
};

inline constexpr int64_t kFeedbackRows = 64;  // rows of a panel

// Quantizes a weight to given scales, with error feedback. Unit: panel of kFeedbackRows rows.
struct FeedbackParams {
  const float* weight;    // [n, k]
  WeightView scales;      // extents, format and scales; `packed` is not read
  const float* feedback;  // [k, k], below the diagonal: [step, s] times the error of step s is added to the weight of
                          // `step`; null: none
  const int64_t* order;   // [k]: the column of each step; null: in order
  uint8_t* packed;        // [ceil(n * k / 2)]
};

// Dequantizes a weight. Unit: element. Range bounds must be even, or the end of the weight.
struct DequantizeParams {
  WeightView weight;
  void* out;  // begins with element `first`
  DType dtype;
  int64_t first = 0;
};

// Copies a matrix into column tiles of float32: out[tile][step][tile_cols], zero beyond the last column. Unit: tile.
struct PackParams {
  const void* src;
  DType dtype;
  int64_t ld;           // elements between rows of src
  bool steps_are_rows;  // true: element (col, step) is src[step * ld + col]; false: src[col * ld + step]
  int64_t cols;
  int64_t steps;
  float* out;
  const int64_t* row_of = nullptr;  // which row of src each col (or step, if they are rows) is; null: its own number
};

// The left matrix of one product: packed 4-bit, or dense (float, or integer with an affine grid).
struct Operand {
  const WeightView* packed = nullptr;
  const void* dense = nullptr;
  DType dtype = DType::kFloat32;
  int64_t ld = 0;
  AffineGrid affine;  // scale == nullptr: plain values
};

// One product of the sum: operand (rows x steps) times columns (steps x cols).
struct Term {
  Operand operand;
  const float* columns = nullptr;  // the layout of PackParams::out
  int64_t steps = 0;
  // The product is added to columns [begin, end), and to others in the same vectors. So it must be zero for those,
  // unless nobody reads them. `columns` begins at column `first_column`, a multiple of the tile width.
  int64_t begin = 0, end = INT64_MAX, first_column = 0;
};

// out = scale * sum over terms (operand * columns) + bias; all terms share one float32 accumulator.
// Unit: item, which is one panel of rows times one block of columns; gemm_items() counts them.
struct GemmParams {
  const Term* terms = nullptr;  // [term_count]
  int64_t term_count = 1;
  bool transposed = false;  // true: element (row, step) of an operand is at [step * ld + row]
  int64_t rows = 0;
  int64_t cols = 0;
  float scale = 1.0f;
  const void* bias = nullptr;  // [rows]
  DType bias_dtype = DType::kFloat32;
  void* out = nullptr;
  DType out_dtype = DType::kFloat32;
  int64_t out_ld = 0;
  bool rows_are_major = false;          // true: out[row * out_ld + col]; false: out[col * out_ld + row]
  const int64_t* out_col_of = nullptr;  // where each column goes in `out` unless rows_are_major; null: its own number
  const float* addend = nullptr;        // [cols of out, rows], added before the result is rounded; !rows_are_major
  int64_t threads = 1;                  // that share the items, which are cut for them
};

inline constexpr int64_t kGemvTokens = 8;  // `gemv` handles up to this many tokens, `gemm` more

// y[t, row] = x[t] · W[row] + bias[row] + sum_r x_down[t, r] * lora_b[row, r] for few tokens. Unit: row of W.
struct GemvParams {
  WeightView weight;
  int64_t m;             // <= kGemvTokens
  const float* x_plain;  // [m, k]
  const float* x_words;  // [m, words_floats(k)], in the order of pack_words; null if k % 32 != 0
  const void* bias;      // [n] or null
  DType bias_dtype;
  const float* x_down;  // [m, r], scaling * x lora_aᵀ, or null
  const void* lora_b;   // [n, r], or [adapters, n, r] with adapter_of_token
  DType lora_dtype;
  int64_t r;
  const int64_t* adapter_of_token;      // [m], -1 for none; null: one adapter for all
  void* y;                              // [m, n]
  DType dtype;                          // of y, and of the tokens before pack_words
  const int64_t* out_row_of = nullptr;  // [m], which row of y each token has; null: its own number
};

// Converts x to float32 and reorders it to the order in which `gemv` unpacks words (gemv/levels.h). Unit: token.
struct PackWordsParams {
  const void* x;  // [m, k]
  DType dtype;
  int64_t k;
  float* x_plain;                   // [m, k]
  float* x_words;                   // [m, words_floats(k)] or null
  const int64_t* row_of = nullptr;  // which row of x each token is; null: its own number
};

// out[t, row] = scale * x[t] · dense[row]: the low-rank down projection for few tokens. Unit: row.
struct DotParams {
  const void* dense;  // [rows, k]
  DType dtype;
  int64_t rows;
  int64_t k;
  const float* x_plain;  // [m, k]
  int64_t m;
  float scale;
  float* out;  // [m, rows]
};

struct KernelTable {
  const char* isa;
  int lanes;          // float32 lanes of a vector
  int64_t tile_cols;  // columns of one packed tile
  int64_t (*quantize)(const QuantizeParams&, int64_t begin_block, int64_t end_block);
  int64_t (*search_scales)(const SearchScalesParams&, int64_t begin_block, int64_t end_block);
  int64_t (*feedback_scratch)(int64_t k);  // scratch of one quantize_with_feedback call in floats
  void (*quantize_with_feedback)(const FeedbackParams&, int64_t begin_panel, int64_t end_panel, float* scratch);
  void (*dequantize)(const DequantizeParams&, int64_t begin, int64_t end);
  void (*pack)(const PackParams&, int64_t begin_tile, int64_t end_tile);
  int64_t (*gemm_items)(const GemmParams&);
  int64_t (*gemm_scratch)(const GemmParams&);  // scratch of one gemm call in floats, aligned to 64 bytes
  void (*gemm)(const GemmParams&, int64_t begin_item, int64_t end_item, float* scratch);
  void (*pack_words)(const PackWordsParams&, int64_t begin_token, int64_t end_token);
  int64_t (*gemv_scratch)(const GemvParams&);  // scratch of one gemv call in floats
  void (*gemv)(const GemvParams&, int64_t begin_row, int64_t end_row, float* scratch);
  void (*dot)(const DotParams&, int64_t begin_row, int64_t end_row);
  const TileKernels* tiles;  // null: bfloat16 tokens are converted to float32

  const TileKernels* tiles_for(DType tokens) const { return tokens == DType::kBFloat16 ? tiles : nullptr; }
  int64_t words_floats(int64_t k) const { return ceil_div(k, int64_t{8} * lanes) * 8 * lanes; }
  int64_t packed_floats(int64_t cols, int64_t steps) const { return ceil_div(cols, tile_cols) * tile_cols * steps; }
};

// One table per isa_*.cpp; null if the architecture does not have the instruction set.
extern const KernelTable* const kScalarTable;
extern const KernelTable* const kAvx2Table;
extern const KernelTable* const kAvx2OneShufflePortTable;  // see has_one_shuffle_port()
extern const KernelTable* const kAvx512Table;
extern const KernelTable* const kAvx512Bf16Table;
extern const KernelTable* const kAmxTable;
extern const KernelTable* const kNeonTable;
extern const KernelTable* const kNeonBf16Table;

}  // namespace qlora::cpu
