// Products of bfloat16 tokens on tiles: what an instruction set implements that multiplies bfloat16. No torch, no
// threads.
//
// A tile holds 16 rows of 64 bytes, 1 KiB. As the left operand (a row tile) a row is 32 elements of the reduction; as
// the right one (a column tile) row j holds elements 2j and 2j + 1 for 16 columns. One step is one tile of each: 32
// elements. W is rounded to bfloat16 weight by weight, as dequantize -> matmul does; sums are float32 and rounded once.
#pragma once

#include <cstdint>

#include "format/dtype.h"
#include "format/layout.h"

namespace qlora::cpu {

inline constexpr int64_t kTile = 16;
inline constexpr int64_t kTileBytes = 1024;
inline constexpr int64_t kStep = 32;
inline constexpr int64_t kChunk = 128;  // elements of a row that are decoded together: four steps

constexpr int64_t tiles_of(int64_t count) { return ceil_div(count, kTile); }
constexpr int64_t steps_of(int64_t count) { return ceil_div(count, kChunk) * (kChunk / kStep); }

// Whether rows are decoded 64 weights at a time (whole words, one scale), which leaves them in an order of their own.
QLORA_INLINE bool decodes_by_nibble(const PackedWeight& w) { return w.k % 64 == 0 && w.block_shift >= 6; }

// The low-rank term is further steps of the same sum. Activations are split into high and low halves, float32 adapters
// too: [high, high] x [high, low], or [high, high, low] x [high, low, high].
constexpr int64_t low_rank_parts(DType adapter) { return adapter == DType::kBFloat16 ? 2 : 3; }
constexpr int64_t low_rank_steps(int64_t r, DType adapter) {
  return ceil_div(low_rank_parts(adapter) * tiles_of(r) * kTile, kStep);
}

// Steps from one tile of tokens to the next: room for both kinds of steps, and for as much that the same chunk of many
// tiles does not fall into the same sets of a cache (a stride of 128 KiB, k = 4096, took 1.3 times as long).
constexpr int64_t token_steps(int64_t features, int64_t low_rank) {
  const int64_t steps = steps_of(features) + low_rank, rest = steps % 32;
  return rest < 8 ? steps + 8 - rest : steps;
}

// The adapters of a batch that are in use: their low-rank steps follow each other, and meet zeros in the tokens of
// others.
struct Adapters16 {
  int64_t count = 1;
  const int64_t* ids = nullptr;               // [count]; null: {0}
  const int64_t* adapter_of_token = nullptr;  // [m]; null: one adapter for all
  const float* scales = nullptr;              // by id; null: `scale`
  float scale = 1.0f;

  int64_t id(int64_t i) const { return ids != nullptr ? ids[i] : 0; }
  float scale_of(int64_t i) const { return scales != nullptr ? scales[ids[i]] : scale; }
};

// A low-rank factor as the operand of a down projection, high and low halves apart (bfloat16 has no low one).
struct Factor16 {
  const void* data = nullptr;  // element (rank, feature) is data[rank * rank_stride + feature * feature_stride]
  DType dtype = DType::kFloat32;
  int64_t rank_stride = 0, feature_stride = 0;
  int64_t r = 0;               // 0: no adapter
  int64_t features = 0;        // of the down projection
  int64_t adapter_stride = 0;  // elements
  int64_t splits() const { return dtype == DType::kBFloat16 ? 1 : 2; }
  // Bytes of the packed operand of one adapter: [tiles_of(r)][splits][steps_of(features)] tiles.
  int64_t packed_bytes() const { return tiles_of(r) * splits() * steps_of(features) * kTileBytes; }
};

// Unit: step of the features.
struct PackFactor16Params {
  Factor16 factor;
  Adapters16 adapters;
  bool as_rows;    // row tiles (ranks are rows); else column tiles (ranks are columns)
  bool by_nibble;  // row tiles only: the order of decoded weights instead of the natural one
  uint8_t* out;
};

// The tokens of the forward product as column tiles, [tiles_of(m)][token_steps] tiles; the low-rank
// steps hold scale * x · factor. Unit: tile of 16 tokens.
struct ForwardTokens16Params {
  const void* x;  // [m, k] bfloat16
  int64_t m, k;
  bool by_nibble;
  const void* lora_x;          // null: x
  const uint8_t* factor_rows;  // packed lora_a, or null
  Factor16 factor;
  Adapters16 adapters;
  uint8_t* out;
};

// y [m, n] = columns · W + lora_b + bias. Unit: item, see forward_items().
struct Forward16Params {
  PackedWeight weight;
  int64_t m;
  bool by_nibble;
  const uint8_t* columns;  // ForwardTokens16Params::out
  const void* lora_b;      // [n, r] of each adapter, or null
  DType lora_dtype;
  int64_t r;
  int64_t adapter_stride;  // elements
  Adapters16 adapters;
  const void* bias;  // [n] or null
  DType bias_dtype;
  void* y;  // bfloat16
};

// The tokens of the backward product as row tiles, [tiles_of(m)][token_steps] tiles; the low-rank
// steps hold v = scale * dy · factor, which is also written as float32. Unit: tile of 16 tokens.
struct BackwardTokens16Params {
  const void* dy;  // [m, n] bfloat16
  int64_t m, n;
  const uint8_t* factor_columns;  // packed lora_b, or null
  Factor16 factor;
  Adapters16 adapters;
  float* v;      // [m, adapters, r] or null
  uint8_t* out;  // null: only v
};

// dx [m, k] = rows · W + lora_a. Unit: item, see backward_items(). Without a weight the low-rank term alone.
struct Backward16Params {
  PackedWeight weight;  // packed == nullptr: none; k is the width of dx
  int64_t m;
  bool by_nibble;
  const uint8_t* rows;  // BackwardTokens16Params::out
  int64_t row_steps;    // token_steps() there
  const void* lora_a;   // [r, k] of each adapter, or null
  DType lora_dtype;
  int64_t r;
  int64_t adapter_stride;  // elements
  Adapters16 adapters;
  void* dx;  // bfloat16
};

// out = factorᵀ matrix: sums over tokens. Unit: panel of kGradFeatures features.
inline constexpr int64_t kGradFeatures = 64;
struct FactorGrad16Params {
  const uint8_t* factor;  // PackTokenFactor16Params::out
  int64_t m, r, features;
  const void* matrix;  // [m, features] bfloat16
  bool r_is_major;     // out [r, features]; else [features, r]
  // Ranks are those of several adapters, `group` of each: out advances by out_stride elements for each id.
  int64_t group;
  Adapters16 adapters;
  int64_t out_stride;
  void* out;
  DType out_dtype;
};
// A float32 matrix [m, r] as row tiles whose reduction runs over tokens, high and low halves:
// [tiles_of(r)][2][ceil(m / kStep)] tiles. Unit: step of tokens.
struct PackTokenFactor16Params {
  const float* values;
  int64_t m, r;
  uint8_t* out;
};

struct Matmul16 {
  int64_t decode_tokens;  // up to so many tokens `decode` is as fast, which does not fill tiles of 16
  void (*pack_factor)(const PackFactor16Params&, int64_t begin, int64_t end);
  void (*forward_tokens)(const ForwardTokens16Params&, int64_t begin, int64_t end, float* scratch);
  int64_t (*forward_tokens_scratch)(const ForwardTokens16Params&);  // floats
  int64_t (*forward_items)(const Forward16Params&);
  int64_t (*forward_scratch)(const Forward16Params&);
  void (*forward)(const Forward16Params&, int64_t begin, int64_t end, float* scratch);
  void (*backward_tokens)(const BackwardTokens16Params&, int64_t begin, int64_t end, float* scratch);
  int64_t (*backward_tokens_scratch)(const BackwardTokens16Params&);
  int64_t (*backward_items)(const Backward16Params&);
  int64_t (*backward_scratch)(const Backward16Params&);
  void (*backward)(const Backward16Params&, int64_t begin, int64_t end, float* scratch);
  void (*pack_token_factor)(const PackTokenFactor16Params&, int64_t begin, int64_t end);
  void (*factor_grad)(const FactorGrad16Params&, int64_t begin, int64_t end, float* scratch);
  int64_t (*factor_grad_scratch)(const FactorGrad16Params&);
};

}  // namespace qlora::cpu
