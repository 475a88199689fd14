// Interface of the CUDA kernels: one parameter struct and one launch function each. No torch, no CUDA headers.
//
// Extents: m tokens, n out features, k in features, r rank. A launch never allocates and never synchronizes, so it can
// be captured in a CUDA graph; workspaces come from the caller. Results are bitwise the same on every run.
#pragma once

#include <cstdint>

#include "cuda/select.h"
#include "format/adamw.h"
#include "format/dtype.h"
#include "format/layout.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace qlora::cuda {

// The result of a launch; `error` is null or a text with static lifetime.
struct Status {
  const char* error = nullptr;
  bool is_earlier = false;  // the error existed before this launch
};

Status query_gpu(int device, GpuInfo* info);

// ---- 4-bit packing ----

struct QuantizeParams {
  const void* weight;  // [numel], aligned to 16 bytes
  DType dtype;         // float32, bfloat16 or float16
  int64_t numel;
  int block_shift;
  QuantType quant_type;
  bool check_finite;        // false: only blocks with inf are reported, which cannot be double-quantized
  uint8_t* packed;          // [ceil(numel / 2)], aligned to 4 bytes
  float* absmax;            // [blocks]
  unsigned long long* bad;  // [1], must be 0: becomes 2^63 - the first position of nan or inf, or stays 0
};
Status launch_quantize(const QuantizeParams& p, cudaStream_t stream);

inline constexpr int kMeanParts = 256;  // doubles of workspace
struct DoubleQuantizeParams {
  const float* absmax;   // [blocks]
  int64_t blocks;        // > 0
  double* parts;         // [kMeanParts], workspace
  uint8_t* codes;        // [blocks]
  float* nested_absmax;  // [ceil(blocks / 256)]
  float* nested_offset;  // [1]: the mean, summed in double in a fixed order
};
Status launch_double_quantize(const DoubleQuantizeParams& p, cudaStream_t stream);

// Searches scales (format/scale_search.h), one warp for each block.
struct SearchScalesParams {
  const float* weight;      // [n, k]
  const float* importance;  // [k]: the weight of a column's squared errors
  int64_t n, k;
  int block_shift;
  QuantType quant_type;
  float* absmax;            // [blocks]
  unsigned long long* bad;  // as in QuantizeParams
};
Status launch_search_scales(const SearchScalesParams& p, cudaStream_t stream);

inline constexpr int kFeedbackRows = 32;  // rows of a thread block
// Quantizes a weight to given scales, with error feedback.
struct FeedbackParams {
  const float* weight;      // [n, k]
  WeightView scales;        // extents, format and scales; `packed` is not read
  const float* feedback;    // [k, k], read below the diagonal, or null: none
  const int64_t* order;     // [k]: the column of each step, a permutation; null: in order
  float* errors;            // [k, ceil(n / kFeedbackRows) * kFeedbackRows], workspace
  uint8_t* codes;           // [n, k], workspace
  uint8_t* packed;          // [ceil(n * k / 2)]
  unsigned long long* bad;  // [2], must be 0: positions of nan or inf in weight and feedback, as in QuantizeParams
};
Status launch_quantize_with_feedback(const FeedbackParams& p, cudaStream_t stream);

// A panel of the flat weight: row i of `rows` has row_elems elements from first + i * row_stride on. `first` must be a
// multiple of 32, so that 1024 elements overlap at most 32 blocks; with several rows, row_elems and row_stride too.
struct DequantizeParams {
  WeightView weight;
  int64_t first;
  int64_t rows, row_elems, row_stride;
  void* out;  // [rows, row_elems], aligned to 16 bytes
  DType dtype;
};
Status launch_dequantize(const DequantizeParams& p, cudaStream_t stream);

inline constexpr int kErrorParts = 256;
struct QuantizationErrorParams {
  WeightView weight;
  const void* exact;  // [n * k]
  DType dtype;
  double* parts;  // [kErrorParts, 3], workspace
  double* out;    // [3]: sum of squared differences, sum of squares, largest difference
};
Status launch_quantization_error(const QuantizationErrorParams& p, cudaStream_t stream);

// ---- optimizer ----

// One step of AdamW for up to sixteen parameters. Either all have 8-bit moments (codes are set) or none.
inline constexpr int kMostUpdates = 16;
struct AdamWJobs {
  AdamWParams job[kMostUpdates];
  int count = 0;
};
Status launch_adamw(const AdamWJobs& jobs, cudaStream_t stream);

// ---- products ----

// Element (row, col) of a dense matrix is data[row * row_stride + col * col_stride].
struct DenseMatrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
};

// ---- many adapters in one batch, and mixtures of experts ----

// Tokens sorted by adapter, those of each adapter padded to whole tiles of kAdapterTile positions. Tokens without an
// adapter or with an invalid one have no position.
//
// For experts, adapters are experts and tokens are rows of the result. There the rows without an expert have tiles too,
// because somebody has to write zeros to them.
inline constexpr int kAdapterTile = 64;
inline constexpr int kUnusedTile = -1;  // a tile without tokens
inline constexpr int kOthersTile = -2;  // a tile of rows without an expert
constexpr int64_t most_tiles(int64_t m, int64_t adapters, int tile) {
  return (m + tile - 1) / tile + (adapters < m ? adapters : m);
}
struct AdapterPlan {
  const int* order = nullptr;               // [tiles * kAdapterTile], token at each position, -1: none
  const int* adapter_of_tile = nullptr;     // [tiles], kUnusedTile or kOthersTile if it has none
  const int* first_tile = nullptr;          // [adapters + 1]
  const float* scale_of_adapter = nullptr;  // [adapters]; null: 1
  int64_t tiles = 0;                        // most_tiles() of kAdapterTile
  int64_t adapters = 1;
  // For experts: the row of x at each position, -1: none. Several tokens may read the same row.
  const int* x_row = nullptr;  // [tiles * kAdapterTile]
  // For experts: the pieces of `piece` positions that have tokens, piece i beginning at position piece * i; then -1. A
  // launch whose blocks take less than a tile would otherwise start a block for each empty part of a tile.
  const int* pieces = nullptr;  // [piece_count]
  int64_t piece_count = 0;      // most_tiles() of `piece`
  int piece = 0;                // divides kAdapterTile
};
inline constexpr int kPlanParts = 4;  // warps that share the tokens of one adapter
struct AdapterPlanParams {
  const int64_t* adapter_of_token;  // [m]
  int64_t m, adapters, tiles;
  int* counts;  // [adapters + 1, kPlanParts], workspace
  int* order;   // these three as in AdapterPlan
  int* adapter_of_tile;
  int* first_tile;
  int* pieces;          // null: for adapters, otherwise for experts
  int64_t piece_count;  // these as in AdapterPlan
  int piece;
  int* x_row;   // null: equal to order
  int choices;  // tokens for each row of x
};
Status launch_adapter_plan(const AdapterPlanParams& p, cudaStream_t stream);

// ---- tensor cores: 16-bit tokens, in_features a multiple of 64, blocks of at least 64 ----

// y = x Wᵀ + x_down lora_bᵀ + bias for m <= kGemvTokens.
struct GemvParams {
  WeightView weight;
  const void* x;  // [m, k], aligned to 16 bytes
  DType dtype;    // of x and y: bfloat16 or float16
  int64_t m;
  const float* x_down;  // [m, r], scaled; r == 0: none
  const void* lora_b;   // [n, r], or [adapters, n, r] with adapter_of_token
  DType lora_dtype;
  int64_t r;
  const int64_t* adapter_of_token;  // [m], -1: none; null: one adapter for all
  int64_t adapters;
  int64_t b_adapter_stride;  // elements
  bool b_is_vectorized;      // lora_b has the dtype of x and is aligned to 16 bytes; r is a multiple of 8
  const void* bias;          // [n] or null
  DType bias_dtype;
  void* y;                 // [m, n]
  GemvTile tile;           // select_gemv_tile()
  float level_multiplier;  // the launch sets these two
  float level_factor;
  // With a plan, a mixture of experts as in GemmOutput: a thread block takes a piece of the plan, kGemvExpertsPiece
  // rows of one expert, and every row_blocks-th group of 16 rows of its weight. m is kGemvExpertsPiece.
  AdapterPlan plan;
  int64_t row_blocks;  // select_gemv_row_blocks()
};
Status launch_gemv(GemvParams p, cudaStream_t stream);

// A low-rank factor: element (rank, feature) of adapter a is data[a * adapter_stride + rank * rank_stride + feature *
// feature_stride]. One of rank_stride and feature_stride is 1.
struct LowRankFactor {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rank_stride = 0, feature_stride = 0, adapter_stride = 0;
  bool is_vectorized = false;  // aligned to 16 bytes, and all strides other than 1 are multiples of 8
};

// y [m, rows] = product + activations · up + bias. Rows are out features in the forward, in features in the backward.
struct GemmOutput {
  void* y;
  int64_t m;
  int64_t rows;
  LowRankFactor up;                 // its features are the rows
  const float* activations;         // [m, r], scaled; aligned to 16 bytes
  int r;                            // 0: none
  const int64_t* adapter_of_token;  // [m], -1: none; null: one adapter for all
  int64_t adapters;
  const void* bias;  // [rows] or null
  DType bias_dtype;
  // With a plan, a mixture of experts: each row of y uses the weight, factor and bias [experts, rows] of its expert,
  // and adapter_of_token is null. Rows without an expert become zero.
  AdapterPlan plan;
};

// y = x Wᵀ + low-rank term + bias for any number of tokens; out.rows is n.
struct GemmParams {
  WeightView weight;  // of experts: the first of a stack
  const void* x;      // [m, k], aligned to 16 bytes; of experts: the rows that out.plan.x_row names
  DType dtype;        // of x and y: bfloat16 or float16
  GemmTile tile;
  GemmOutput out;
  float level_multiplier;  // the launch sets these two
  float level_factor;
};
Status launch_gemm(GemmParams p, cudaStream_t stream);
// Called by launch_gemm() for Hopper's tiles; its file is compiled for sm_90a.
Status launch_gemm_wgmma(const GemmParams& p, cudaStream_t stream);

// dx = dy W + low-rank term, for every block size; out.rows is k, a multiple of 32; n is a multiple of 8.
struct GemmDxParams {
  WeightView weight;
  const void* dy;  // [m, n], aligned to 16 bytes
  DType dtype;     // of dy and dx: bfloat16 or float16
  GemmTile tile;   // select_gemm_tile() of m and k
  GemmOutput out;
};
Status launch_gemm_dx(const GemmDxParams& p, cudaStream_t stream);
Status launch_gemm_dx_wgmma(const GemmDxParams& p, cudaStream_t stream);

// ---- the low-rank term ----

// out [m, r] = scale * x · factorᵀ: low-rank activations, x lora_aᵀ in the forward and dy lora_b in the backward. One
// launch computes up to two of them, because launches dominate the cost.
struct LoraDownJob {
  const void* x;     // [m, features], aligned to 16 bytes
  int64_t features;  // a multiple of 8
  LowRankFactor factor;
  float* out;  // [m, r]
  unsigned long long*
      largest;  // [1], must be 0: becomes the largest magnitude in out, as the bits of a float; null: not computed
  const int* row = nullptr;  // with a plan: the row of x at each position, plan.order or plan.x_row
};
struct LoraDownParams {
  LoraDownJob job[2];
  int count;
  DType dtype;  // of x: bfloat16 or float16
  int64_t m, r;
  float scale;
  int tokens_per_block;  // select_lora_down_tokens()
  // With a plan, each token uses its adapter's factor, and `scale` is multiplied by its adapter's scale. Rows of out
  // without an adapter are not written.
  AdapterPlan plan;
};
Status launch_lora_down(const LoraDownParams& p, cudaStream_t stream);

// out[s] [ranks, features] = activationsᵀ · x over part s of the tokens: the gradients of low-rank factors.
struct LoraGradJob {
  const void* x;                        // [m, features], aligned to 16 bytes
  int64_t features;                     // a multiple of 8
  const float* activations;             // [m, ranks], aligned to 16 bytes
  const unsigned long long* largest;    // LoraDownJob::largest, to scale float16 activations; null: no scaling
  int parts;                            // select_lora_grad_parts()
  float* out;                           // [parts, adapters, …], each of ranks * features elements
  int64_t rank_stride, feature_stride;  // of out; one of them is 1
  const int* row = nullptr;             // as in LoraDownJob
};
struct LoraGradParams {
  LoraGradJob job[2];
  int count;
  DType dtype;  // of x: bfloat16 or float16
  int64_t m, ranks;
  bool splits;          // whether activations are split into high and low parts, for nearly float32 precision
  int ranks_per_block;  // select_lora_grad_ranks()
  AdapterPlan plan;     // with it, a gradient for each adapter
};
Status launch_lora_grad(const LoraGradParams& p, cudaStream_t stream);

// out[i] = sum over parts of from[part][i], in order, for up to two arrays.
struct LoraSumJob {
  const float* from;  // [parts, count]
  int parts;
  int64_t count;
  void* out;
  DType dtype;
};
struct LoraSumJobs {
  LoraSumJob job[2];
  int count = 0;
};
Status launch_lora_sum(const LoraSumJobs& jobs, cudaStream_t stream);

// y = activations · up + bias, without a base product: the gradient of lora_x, and the term to which the vendor's GEMM
// adds its product. r > 0.
struct LoraUpParams {
  DType dtype;  // of y: bfloat16 or float16
  GemmOutput out;
};
Status launch_lora_up(const LoraUpParams& p, cudaStream_t stream);

// ---- the general path: any shape, dtype and block size, float32 products ----

enum class OperandKind { kPacked, kPackedTransposed, kDense };

// out(row, col) = scale * sum over steps operand(row, step) * columns(col, step)
//               + sum over r up(adapter of col; row, r) * activation(col, r) + bias[row]
struct GeneralParams {
  OperandKind kind = OperandKind::kDense;
  WeightView weight;    // kPacked: row is n and step is k; kPackedTransposed: row is k and step is n
  DenseMatrix operand;  // kDense
  AffineGrid affine;    // with kDense integers: (in feature, out feature) -> scale, zero point
  bool affine_rows_are_channels = false;
  DenseMatrix columns;
  int64_t rows = 0, cols = 0, steps = 0;
  float scale = 1.0f;
  // Low-rank term; r == 0: none.
  DenseMatrix up;          // (row, r) of one adapter
  DenseMatrix activation;  // (col, r)
  int64_t r = 0;
  const int64_t* adapter_of_col = nullptr;  // -1: none for this column; null: one adapter for all
  int64_t adapters = 1;
  int64_t up_adapter_stride = 0;  // elements
  const void* bias = nullptr;     // [rows]
  DType bias_dtype = DType::kFloat32;
  void* out = nullptr;
  DType out_dtype = DType::kFloat32;
  int64_t out_row_stride = 0, out_col_stride = 0;
  // If set: one product for each adapter over its own steps only; the results are out_adapter_stride apart.
  const int64_t* adapter_of_step = nullptr;
  int64_t out_adapter_stride = 0;
  // With a plan and a packed operand, a mixture of experts: `weight` is the first of a stack, columns are
  // tokens of the plan, of which `columns` has those that column_row names, and bias is [experts, rows]. Columns
  // without an expert become zero.
  AdapterPlan plan;
  const int* column_row = nullptr;  // plan.order or plan.x_row
};
Status launch_general(const GeneralParams& p, cudaStream_t stream);

// out[token, row] = scaling * x[token] · operand[adapter of token][row]; row_stride and step_stride as in DenseMatrix.
// Tokens without an adapter get zeros.
struct TokenDotParams {
  DenseMatrix x;        // (token, step)
  DenseMatrix operand;  // (row, step) of one adapter
  int64_t adapter_stride = 0;
  const int64_t* adapter_of_token = nullptr;  // null: one adapter for all
  int64_t adapters = 1;
  const float* scaling_of_adapter = nullptr;  // null: `scaling`
  float scaling = 1.0f;
  int64_t tokens = 0, rows = 0, steps = 0;
  // Rows of x and operand are contiguous, aligned to 16 bytes, and multiples of 8 long; operand has x's dtype or
  // float32.
  bool is_vectorized = false;
  float* out = nullptr;  // [tokens, rows]
};
Status launch_token_dot(const TokenDotParams& p, cudaStream_t stream);

// out[col] = sum over rows of matrix [rows, cols], float32. With a plan, [adapters, cols]: a sum for each adapter.
struct ColumnSumParams {
  const void* matrix;
  DType dtype;
  int64_t rows, cols;
  float* out;
  AdapterPlan plan;
};
Status launch_column_sum(const ColumnSumParams& p, cudaStream_t stream);

}  // namespace qlora::cuda
