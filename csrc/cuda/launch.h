// What the glue sees of the CUDA kernels: one parameter struct and one launch function each. No torch, no CUDA headers.
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

// What became of a launch; `error` is a text that lives forever, or null.
struct Status {
  const char* error = nullptr;
  bool is_earlier = false;  // it was there before this launch
};

Status query_gpu(int device, GpuInfo* info);

// A packed matrix (n, k) in device memory. Exactly one of absmax and absmax_codes is set.
struct Weight {
  const uint8_t* packed = nullptr;        // [ceil(n * k / 2)]
  const float* absmax = nullptr;          // [blocks]
  const uint8_t* absmax_codes = nullptr;  // [blocks], double quantization
  const float* nested_absmax = nullptr;   // [ceil(blocks / 256)]
  const float* nested_offset = nullptr;   // [1]
  int64_t n = 0;
  int64_t k = 0;
  int block_shift = 0;  // log2(weights per absmax)
  int quant_type = 0;   // QuantType
};

// ---- 4-bit packing ----

struct QuantizeParams {
  const void* weight;  // [numel], aligned to 16 bytes
  DType dtype;         // float32, bfloat16 or float16
  int64_t numel;
  int block_shift;
  int quant_type;
  bool check_finite;        // else an inf is reported instead: it cannot be double-quantized
  uint8_t* packed;          // [ceil(numel / 2)], aligned to 4 bytes
  float* absmax;            // [blocks]
  unsigned long long* bad;  // [1], zero before: 2^63 - the first position that is nan or inf, or 0
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

// A panel of the flat weight: row_elems elements from first + i * row_stride on, for each of `rows` rows i. `first` is
// a multiple of 32, so that no group of 1024 elements meets more than 32 blocks; with several rows the others are too.
struct DequantizeParams {
  Weight weight;
  int64_t first;
  int64_t rows, row_elems, row_stride;
  void* out;  // [rows, row_elems], aligned to 16 bytes
  DType dtype;
};
Status launch_dequantize(const DequantizeParams& p, cudaStream_t stream);

inline constexpr int kErrorParts = 256;
struct QuantizationErrorParams {
  Weight weight;
  const void* exact;  // [n * k]
  DType dtype;
  double* parts;  // [kErrorParts, 3], workspace
  double* out;    // [3]: sum of squared differences, sum of squares, largest difference
};
Status launch_quantization_error(const QuantizationErrorParams& p, cudaStream_t stream);

// ---- optimizer ----

// A step of AdamW for up to sixteen parameters; all with moments in 8 bit, if codes are set, or none.
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

// ---- tensor cores: 16-bit tokens, in_features a multiple of 64, blocks of at least 64 ----

// y = x Wᵀ + lora_t lora_bᵀ + bias for m <= kDecodeTokens.
struct DecodeParams {
  Weight weight;
  const void* x;  // [m, k], aligned to 16 bytes
  DType dtype;    // of x and y: bfloat16 or float16
  int64_t m;
  const float* lora_t;  // [m, r], scaled; r == 0: none
  const void* lora_b;   // [n, r], or [adapters, n, r] with adapter_of_token
  DType lora_dtype;
  int64_t r;
  const int64_t* adapter_of_token;  // [m], -1: none; null: one adapter for all
  int64_t adapters;
  int64_t b_adapter_stride;  // elements
  bool b_is_vectorized;      // lora_b has the dtype of x, r is a multiple of 8, all aligned to 16 bytes
  const void* bias;          // [n] or null
  DType bias_dtype;
  void* y;                 // [m, n]
  DecodeTile tile;         // select_decode_tile()
  float level_multiplier;  // the launch sets these two
  float level_factor;
};
Status launch_decode(DecodeParams p, cudaStream_t stream);

// y [m, rows] = product + lora_t lora_upᵀ + bias: rows are out features in the forward, in features in the backward.
struct GemmOutput {
  void* y;
  int64_t m;
  int64_t rows;
  const void* lora_up;              // [rows, r], or [adapters, rows, r] with adapter_of_token; aligned to 16 bytes
  const void* lora_t;               // [m, r], scaled; aligned to 16 bytes
  int r;                            // a multiple of 16; 0: none
  const int64_t* adapter_of_token;  // [m], -1: none; null: one adapter for all
  int64_t adapters;
  const void* bias;  // [rows] or null
  DType bias_dtype;
};

// y = x Wᵀ + … for any number of tokens; out.rows is n.
struct GemmParams {
  Weight weight;
  const void* x;  // [m, k], aligned to 16 bytes
  DType dtype;    // of x, y, lora_up and lora_t: bfloat16 or float16
  GemmTile tile;
  GemmOutput out;
  float level_multiplier;  // the launch sets these two
  float level_factor;
};
Status launch_gemm(GemmParams p, cudaStream_t stream);

// dx = dy W + …; out.rows is k, a multiple of 32; n is a multiple of 8. Every block size.
struct GemmDxParams {
  Weight weight;
  const void* dy;  // [m, n], aligned to 16 bytes
  DType dtype;     // of dy, dx, lora_up and lora_t: bfloat16 or float16
  GemmTile tile;   // select_gemm_tile() of m and k
  GemmOutput out;
};
Status launch_gemm_dx(const GemmDxParams& p, cudaStream_t stream);

// ---- many adapters in one batch ----

// Tokens sorted by adapter, each adapter's padded to whole tiles of kAdapterTile positions. Tokens without an adapter,
// and those of one that does not exist, have no position.
inline constexpr int kAdapterTile = 64;
constexpr int64_t most_adapter_tiles(int64_t m, int64_t adapters) {
  return (m + kAdapterTile - 1) / kAdapterTile + (adapters < m ? adapters : m);
}
struct AdapterPlan {
  const int* order = nullptr;               // [tiles * kAdapterTile], token at each position, -1: none
  const int* adapter_of_tile = nullptr;     // [tiles], -1: not needed
  const int* first_tile = nullptr;          // [adapters + 1]
  const float* scale_of_adapter = nullptr;  // [adapters]
  int64_t tiles = 0;                        // most_adapter_tiles()
  int64_t adapters = 1;
};
struct AdapterPlanParams {
  const int64_t* adapter_of_token;  // [m]
  int64_t m, adapters, tiles;
  int* counts;  // [adapters], workspace
  int* order;   // these three as in AdapterPlan
  int* adapter_of_tile;
  int* first_tile;
};
Status launch_adapter_plan(const AdapterPlanParams& p, cudaStream_t stream);

// ---- the low-rank term ----

// parts[s] [m, rows] = x · operandᵀ over the s-th stretch of the reduction: the low-rank activations, x lora_aᵀ in the
// forward and dy lora_b in the backward.
struct LoraDownParams {
  const void* x;        // [m, elems], aligned to 16 bytes
  const void* operand;  // [splits, rows, elems], aligned to 16 bytes; a second one is added to the first
  DType dtype;          // of both: bfloat16 or float16
  int64_t m, rows;
  int64_t elems;  // a multiple of 8
  int splits;     // 1 or 2
  int parts;      // select_lora_parts()
  float* out;     // [parts, m, rows]
  unsigned long long*
      largest;  // [1], zero before: the largest magnitude in out, as the bits of a float; null: not asked
  // With a plan `operand` is [adapters, splits, rows, elems]; rows of out without an adapter are not written.
  AdapterPlan plan;
};
Status launch_lora_down(const LoraDownParams& p, cudaStream_t stream);

// Low-rank factors and activations as the other kernels want them.
// value(row, r) = scale * sum over parts source(row, r)
// out [adapters, rows, padded_r], zero from r on. With `split`, three such parts side by side whose products add up to
// one of nearly float32: an operand (kOperand) is [high, high, low], the activations that it meets (kActivation) are
// [high, low, high]; kStacked puts the low part below the high one, [adapters, 2, rows, padded_r].
enum class Split : int { kNone, kOperand, kActivation, kStacked };
// float16 ends at 65504 and 2^-24: kMultiply brings values into its range by a power of two, kDivide takes them back.
enum class HalfRange : int { kLeave, kMultiply, kDivide };
struct LoraPackParams {
  DenseMatrix source;  // (row, r) of one adapter and part
  int64_t rows;        // of one adapter
  int64_t r;
  int64_t padded_r;  // of one part of the split
  Split split;
  void* out;
  DType dtype;  // of out; float32 only without split
  float scale = 1.0f;
  int64_t adapters = 1;
  int64_t adapter_stride = 0;  // elements of the source
  int parts = 1;
  int64_t part_stride = 0;  // elements of the source
  HalfRange half_range = HalfRange::kLeave;
  const unsigned long long* largest = nullptr;  // [1], see LoraDownParams
  float largest_factor = 1.0f;                  // no value to be scaled is larger than this times *largest
  // Activations of many adapters: each token's value is multiplied by the scale of its adapter as well; zero for a
  // token without one. Tokens are rows of the source, or its columns if tokens_are_columns. With token_order, position
  // i of the result is token token_order[i], -1: zero.
  const int64_t* adapter_of_token = nullptr;
  const float* scale_of_adapter = nullptr;
  int64_t adapter_count = 0;
  bool tokens_are_columns = false;
  const int* token_order = nullptr;
};
// Up to four at once, all to the same dtype: what costs here is the launch.
inline constexpr int kMostPacks = 4;
struct LoraPackJobs {
  LoraPackParams job[kMostPacks];
  int count = 0;
};
Status launch_lora_pack(const LoraPackJobs& jobs, cudaStream_t stream);

// out[s] [ranks, features] = factor · x over the s-th stretch of the tokens: gradients of low-rank factors. With a down
// operand also down_out[f] [m, ranks] = x · down_operandᵀ over the f-th stretch of lora_grad_features().
struct LoraGradParams {
  const void* x;             // [m, features], aligned to 16 bytes
  const void* factor;        // [splits, ranks, padded_m], aligned to 16 bytes, zero from m on
  const void* down_operand;  // [splits, ranks, features], aligned to 16 bytes; null: none
  DType dtype;               // of all three: bfloat16 or float16
  int64_t m, ranks;
  int64_t padded_m, features;  // multiples of 8
  int splits;                  // 1 or 2
  int ranks_per_block;         // select_lora_grad()
  int parts;
  float* out;                   // [parts, ranks, features]
  float* down_out;              // [ceil(features / lora_grad_features()), m, ranks]
  unsigned long long* largest;  // of down_out, as in LoraDownParams
  // With a plan `factor` is by position (padded_m = tiles * kAdapterTile), down_operand [adapters, splits, ranks,
  // features], out [parts, adapters, ranks, features]; rows of down_out without an adapter are not written.
  AdapterPlan plan;
};
Status launch_lora_grad(const LoraGradParams& p, cudaStream_t stream);

// y = lora_t lora_upᵀ alone: the gradient of lora_x. r > 0, one adapter, no bias.
struct LoraUpParams {
  DType dtype;  // of all matrices: bfloat16 or float16
  GemmOutput out;
};
Status launch_lora_up(const LoraUpParams& p, cudaStream_t stream);

// ---- the general path: any shape, dtype and block size, float32 products ----

enum class OperandKind { kPacked, kPackedTransposed, kDense };

// out(row, col) = scale * sum over steps operand(row, step) * columns(col, step)
//               + sum over r up(adapter of col; row, r) * activation(col, r) + bias[row]
struct GeneralParams {
  OperandKind kind = OperandKind::kDense;
  Weight weight;        // kPacked: row is n and step is k; kPackedTransposed: row is k and step is n
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
  // One product for each adapter, over its own steps only: out advances by out_adapter_stride.
  const int64_t* adapter_of_step = nullptr;
  int64_t out_adapter_stride = 0;
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
  // Rows of x and operand are contiguous, aligned to 16 bytes, multiples of 8 long; operand is of x's dtype or float32.
  bool is_vectorized = false;
  float* out = nullptr;  // [tokens, rows]
};
Status launch_token_dot(const TokenDotParams& p, cudaStream_t stream);

// out[col] = sum over rows of matrix [rows, cols], in order, float32.
struct ColumnSumParams {
  const void* matrix;
  DType dtype;
  int64_t rows, cols;
  float* out;
};
Status launch_column_sum(const ColumnSumParams& p, cudaStream_t stream);

}  // namespace qlora::cuda
