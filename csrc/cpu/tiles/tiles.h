// Interface of the products of bfloat16 tokens on tiles, for instruction sets that multiply bfloat16. No torch, no
// threads.
//
// A tile is 16 rows of 64 bytes, 1 KiB. In a left operand (row tile) each row holds 32 elements of the reduction. In a
// right operand (column tile) row j holds elements 2j and 2j + 1 of the reduction for 16 columns. One step multiplies
// one tile of each, 32 elements of the reduction. Each weight is rounded to bfloat16, as if W were dequantized first;
// sums are float32 and rounded once.
#pragma once

#include <cstdint>

#include "format/dtype.h"
#include "format/layout.h"

namespace qlora::cpu {

inline constexpr int64_t kTile = 16;
inline constexpr int64_t kTileBytes = 1024;
inline constexpr int64_t kStep = 32;
inline constexpr int64_t kChunk = 128;             // elements of a row that are unpacked together: four steps
inline constexpr int64_t kHalfChunk = kChunk / 2;  // the last 64 elements of a row, or less, take two steps

constexpr int64_t tiles_of(int64_t count) { return ceil_div(count, kTile); }
constexpr int64_t steps_of(int64_t count) { return ceil_div(count, kHalfChunk) * (kHalfChunk / kStep); }

// Whether rows are unpacked in groups of 64 weights with one scale, which leaves the weights in nibble order instead of
// natural order.
QLORA_INLINE bool unpacks_by_nibble(const WeightView& w) { return w.k % 64 == 0 && w.block_shift >= 6; }

// The low-rank term adds further steps to the same sum. Activations are split into high and low bfloat16 halves, and so
// are float32 adapters: factor x activation is [high, high] x [high, low] or [high, high, low] x [high, low, high].
constexpr int64_t low_rank_parts(DType adapter) { return adapter == DType::kBFloat16 ? 2 : 3; }
constexpr int64_t low_rank_steps(int64_t r, DType adapter) {
  return ceil_div(low_rank_parts(adapter) * tiles_of(r) * kTile, kStep);
}

// Steps from one tile of tokens to the next: all steps of the sum, plus padding so that the same chunk of different
// tiles does not share cache sets (without it, a stride of 128 KiB at k = 4096 took 1.3 times as long).
constexpr int64_t token_steps(int64_t features, int64_t low_rank) {
  const int64_t steps = steps_of(features) + low_rank, rest = steps % 32;
  return rest < 8 ? steps + 8 - rest : steps;
}

// The adapters used by a batch. Their low-rank steps are consecutive; a token has zeros in the steps of all adapters
// but its own.
struct TileAdapters {
  int64_t count = 1;
  const int64_t* ids = nullptr;               // [count]; null: {0}
  const int64_t* adapter_of_token = nullptr;  // [m]; null: one adapter for all
  const float* scales = nullptr;              // indexed by id; null: all use `scale`
  float scale = 1.0f;

  int64_t id(int64_t i) const { return ids != nullptr ? ids[i] : 0; }
  float scale_of(int64_t i) const { return scales != nullptr ? scales[ids[i]] : scale; }
};

// A low-rank factor as operand of a down projection, split into high and low halves; a bfloat16 factor has no low half.
struct TileFactor {
  const void* data = nullptr;  // element (rank, feature) is data[rank * rank_stride + feature * feature_stride]
  DType dtype = DType::kFloat32;
  int64_t rank_stride = 0, feature_stride = 0;
  int64_t r = 0;               // 0: no adapter
  int64_t features = 0;        // length of the reduction
  int64_t adapter_stride = 0;  // elements
  int64_t splits() const { return dtype == DType::kBFloat16 ? 1 : 2; }
  // Bytes of the packed operand of one adapter: [tiles_of(r)][splits][steps_of(features)] tiles.
  int64_t packed_bytes() const { return tiles_of(r) * splits() * steps_of(features) * kTileBytes; }
};

// Packs a factor into tiles. Unit: chunk of kChunk features.
struct PackFactorParams {
  TileFactor factor;
  TileAdapters adapters;
  bool as_rows;    // true: row tiles (ranks are rows); false: column tiles (ranks are columns)
  bool by_nibble;  // row tiles only: nibble order instead of natural order
  uint8_t* out;
};

// A list of rows: `row_of` says which row of a matrix each token is, in the order of the product; null: its own number.
QLORA_INLINE int64_t row_of_token(const int64_t* row_of, int64_t token) {
  return row_of != nullptr ? row_of[token] : token;
}

// Packs the tokens of the forward product into column tiles, [tiles_of(m)][token_steps]. The low-rank steps hold
// scale * x · factor. With `columns`, x is packed there already and `out` gets only the low-rank steps, [tiles_of(m)]
// [low-rank steps]. Unit: tile of 16 tokens.
struct ForwardTokensParams {
  const void* x;  // [m, k] bfloat16
  int64_t m, k;
  bool by_nibble;
  const void* lora_x;          // null: x
  const uint8_t* factor_rows;  // packed lora_a, or null
  TileFactor factor;
  TileAdapters adapters;
  uint8_t* out;
  const int64_t* row_of = nullptr;   // rows of x and lora_x
  const uint8_t* columns = nullptr;  // `out` of a call without a factor
};

// y [m, n] = x Wᵀ + low-rank term + bias. Unit: item; forward_items() counts them.
struct ForwardTilesParams {
  WeightView weight;
  int64_t m;
  bool by_nibble;
  const uint8_t* columns;  // ForwardTokensParams::out
  const void* lora_b;      // [n, r] of each adapter, or null
  DType lora_dtype;
  int64_t r;
  int64_t adapter_stride;  // elements
  TileAdapters adapters;
  const void* bias;  // [n] or null
  DType bias_dtype;
  const float* addend;                  // [m, n] or null; added before y is rounded
  void* y;                              // bfloat16
  const int64_t* out_row_of = nullptr;  // rows of y and addend
  const uint8_t* low_rank = nullptr;    // the low-rank steps, if `columns` has none
};

// Packs the tokens of the backward product into row tiles, [tiles_of(m)][token_steps]. The low-rank steps hold
// dy_down = scale * dy · factor, which is also written as float32. Unit: tile of 16 tokens.
struct BackwardTokensParams {
  const void* dy;  // [m, n] bfloat16
  int64_t m, n;
  const uint8_t* factor_columns;  // packed lora_b, or null
  TileFactor factor;
  TileAdapters adapters;
  float* dy_down;                   // [m, adapters, r] or null
  uint8_t* out;                     // null: only dy_down is computed
  const int64_t* row_of = nullptr;  // rows of dy, not of dy_down
};

// dx [m, k] = dy W + low-rank term, or only the low-rank term if there is no weight. Unit: item; backward_items()
// counts them.
struct BackwardTilesParams {
  WeightView weight;  // packed == nullptr: none; k is the width of dx
  int64_t m;
  bool by_nibble;
  const uint8_t* rows;  // BackwardTokensParams::out
  int64_t row_steps;    // token_steps() of `rows`
  const void* lora_a;   // [r, k] of each adapter, or null
  DType lora_dtype;
  int64_t r;
  int64_t adapter_stride;  // elements
  TileAdapters adapters;
  void* dx;                             // bfloat16
  const int64_t* out_row_of = nullptr;  // rows of dx
  // A further product of the same extents m and k, added to the same sums; its dx is not read. Its weight has the same
  // block size.
  const BackwardTilesParams* next = nullptr;
};

// out = factorᵀ matrix, a sum over tokens. Unit: panel of kGradFeatures features.
inline constexpr int64_t kGradFeatures = 64;
struct FactorGradParams {
  const uint8_t* factor;  // PackTokenFactorParams::out
  int64_t m, r, features;
  const void* matrix;  // [m, features] bfloat16
  bool r_is_major;     // true: out [r, features]; false: [features, r]
  void* out;
  DType out_dtype;
  const int64_t* row_of = nullptr;  // rows of matrix
};
// Packs a float32 matrix [m, r] into row tiles for a reduction over tokens, split into high and low halves:
// [tiles_of(r)][2][ceil(m / kStep)] tiles. Unit: step of kStep tokens.
struct PackTokenFactorParams {
  const float* values;
  int64_t m, r;
  uint8_t* out;
  int64_t pitch;                    // elements from one row of values to the next
  const int64_t* row_of = nullptr;  // rows of values
};

struct TileKernels {
  int64_t gemv_tokens;  // up to this many tokens `gemv` runs instead, because they fill too little of a tile of 16
  // From this many adapters in a batch on, a low-rank term in float32 for each adapter's own tokens is faster than
  // steps on tiles for all tokens.
  int64_t grouped_adapters;
  void (*pack_factor)(const PackFactorParams&, int64_t begin, int64_t end);
  void (*forward_tokens)(const ForwardTokensParams&, int64_t begin, int64_t end, float* scratch);
  int64_t (*forward_tokens_scratch)(const ForwardTokensParams&);  // floats
  int64_t (*forward_items)(const ForwardTilesParams&);
  int64_t (*forward_scratch)(const ForwardTilesParams&);
  void (*forward)(const ForwardTilesParams&, int64_t begin, int64_t end, float* scratch);
  void (*backward_tokens)(const BackwardTokensParams&, int64_t begin, int64_t end, float* scratch);
  int64_t (*backward_tokens_scratch)(const BackwardTokensParams&);
  int64_t (*backward_items)(const BackwardTilesParams&);
  int64_t (*backward_scratch)(const BackwardTilesParams&);
  void (*backward)(const BackwardTilesParams&, int64_t begin, int64_t end, float* scratch);
  void (*pack_token_factor)(const PackTokenFactorParams&, int64_t begin, int64_t end);
  void (*factor_grad)(const FactorGradParams&, int64_t begin, int64_t end, float* scratch);
  int64_t (*factor_grad_scratch)(const FactorGradParams&);
};

}  // namespace qlora::cpu
