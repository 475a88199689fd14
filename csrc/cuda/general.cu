// The general path: products of any shape, dtype and block size on the CUDA cores in float32. It runs whatever the
// tensor-core kernels do not support (float32 tokens, odd extents, affine weights).
#include "cuda/device/elements.cuh"
#include "cuda/device/experts.cuh"
#include "cuda/device/launch.cuh"

namespace qlora::cuda {
namespace general {

constexpr int kTile = 64;          // rows and columns of a block's tile
constexpr int kSteps = 16;         // steps in shared memory at a time
constexpr int kThreads = 256;      // 16 x 16 threads, 4 x 4 results each
constexpr int kPitch = kTile + 4;  // floats between steps, padded so that rows of four lanes lie in different banks
constexpr int kSharedBytes = 2 * kSteps * kPitch * static_cast<int>(sizeof(float));

template <OperandKind kKind>
QLORA_DEVICE float operand_at(const GeneralParams& p, const WeightView& weight, int64_t row, int64_t step) {
  if constexpr (kKind == OperandKind::kPacked) return weight_at(weight, row * weight.k + step);
  if constexpr (kKind == OperandKind::kPackedTransposed) return weight_at(weight, step * weight.k + row);
  const DenseMatrix& m = p.operand;
  const float value = load_element(m.data, m.dtype, row * m.row_stride + step * m.col_stride);
  if (p.affine.scale == nullptr) return value;
  const int64_t in = p.affine_rows_are_channels ? step : row, out = p.affine_rows_are_channels ? row : step;
  const int64_t cell = in / p.affine.group * p.affine.group_stride + out * p.affine.channel_stride;
  const float scaled = value * ptx::load(p.affine.scale + cell);
  return scaled + ptx::load(p.affine.zero_point + cell);
}

// Writes a tile [kSteps][kTile] of value(index in tile, step) to shared memory, zero outside the matrix. Adjacent lanes
// take adjacent elements of the contiguous extent.
template <class Value>
QLORA_DEVICE void fill_tile(SharedAddress tile, bool steps_are_contiguous, int64_t count, int64_t steps,
                            const Value& value) {
  for (int i = ptx::thread(); i < kSteps * kTile; i += kThreads) {
    const int step = steps_are_contiguous ? i % kSteps : i / kTile;
    const int index = steps_are_contiguous ? i / kSteps : i % kTile;
    const float v = index < count && step < steps ? value(index, step) : 0.0f;
    ptx::store_shared(tile + static_cast<SharedAddress>((step * kPitch + index) * sizeof(float)), v);
  }
}

// With kExperts, a block's columns are those of one tile of the plan.
template <OperandKind kKind, bool kExperts = false>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 2) kernel(QLORA_PARAMS GeneralParams p) {
  const SharedAddress rows_tile = ptx::shared_base();
  const SharedAddress cols_tile = rows_tile + kSteps * kPitch * sizeof(float);
  const int64_t row0 = static_cast<int64_t>(ptx::block_x()) * kTile,
                col0 = static_cast<int64_t>(ptx::block_y()) * kTile;
  const int my_row = ptx::thread() / 16 * 4, my_col = ptx::thread() % 16 * 4;
  const int64_t adapter = ptx::block_z();
  [[maybe_unused]] int expert = 0;
  if constexpr (kExperts) {
    expert = ptx::load(p.plan.adapter_of_tile + ptx::block_y());
    if (expert == kUnusedTile) return;
  }
  const auto& weight = weight_of<kExperts>(p.weight, expert);
  // The column of the result at a position; -1: none.
  const auto column_at = [&](int64_t position) -> int64_t {
    if constexpr (kExperts) return ptx::load(p.plan.order + position);
    return position;
  };
  const int64_t cols_end = kExperts ? col0 + kTile : p.cols;
  const bool operand_steps_contiguous =
      kKind == OperandKind::kPacked || (kKind == OperandKind::kDense && p.operand.col_stride == 1);
  const bool columns_steps_contiguous = p.columns.col_stride == 1;
  float sum[4][4] = {};

  const int64_t steps = kExperts && expert < 0 ? 0 : p.steps;
  for (int64_t step0 = 0; step0 < steps; step0 += kSteps) {
    const auto mine = [&](int step) {
      return p.adapter_of_step == nullptr || ptx::load(p.adapter_of_step + step0 + step) == adapter;
    };
    fill_tile(rows_tile, operand_steps_contiguous, p.rows - row0, p.steps - step0, [&](int i, int step) {
      return mine(step) ? operand_at<kKind>(p, weight, row0 + i, step0 + step) : 0.0f;
    });
    fill_tile(cols_tile, columns_steps_contiguous, cols_end - col0, p.steps - step0, [&](int i, int step) {
      int64_t col = col0 + i;
      if constexpr (kExperts) {
        col = ptx::load(p.column_row + col);
        if (col < 0) return 0.0f;
      }
      return mine(step) ? load_element(p.columns.data, p.columns.dtype,
                                       col * p.columns.row_stride + (step0 + step) * p.columns.col_stride)
                        : 0.0f;
    });
    ptx::sync_threads();
    // Sums these 16 steps separately: adding partial sums of 16 keeps the rounding error of long rows small.
    float part[4][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const auto a = ptx::load_shared<Floats4>(rows_tile + (step * kPitch + my_row) * sizeof(float));
      const auto b = ptx::load_shared<Floats4>(cols_tile + (step * kPitch + my_col) * sizeof(float));
      const float rows[4] = {a.x, a.y, a.z, a.w}, cols[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] = fmaf(rows[i], cols[j], part[i][j]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
    ptx::sync_threads();
  }

#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (col0 + my_col + j >= cols_end) continue;
    const int64_t col = column_at(col0 + my_col + j);
    if (kExperts && col < 0) continue;
    const int64_t of_col = kExperts ? expert : p.adapter_of_col != nullptr ? ptx::load(p.adapter_of_col + col) : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = row0 + my_row + i;
      if (row >= p.rows) continue;
      float value = p.scale * sum[i][j];
      if (p.r > 0 && of_col != -1 && !(kExperts && expert < 0)) {
        if (of_col < -1 || of_col >= p.adapters)
          value = __builtin_nanf("");  // invalid adapter
        else
          for (int64_t r = 0; r < p.r; ++r)
            value = fmaf(load_element(p.up.data, p.up.dtype,
                                      of_col * p.up_adapter_stride + row * p.up.row_stride + r * p.up.col_stride),
                         load_element(p.activation.data, p.activation.dtype,
                                      col * p.activation.row_stride + r * p.activation.col_stride),
                         value);
      }
      if (p.bias != nullptr && !(kExperts && expert < 0))
        value += load_element(p.bias, p.bias_dtype, (kExperts ? expert * p.rows : 0) + row);
      store_element(p.out, p.out_dtype,
                    adapter * p.out_adapter_stride + row * p.out_row_stride + col * p.out_col_stride, value);
    }
  }
}

// The adapter of a token, whether it exists, and its scaling.
struct TokenAdapter {
  QLORA_METHOD TokenAdapter(const TokenDotParams& p, int64_t token)
      : adapter(p.adapter_of_token != nullptr ? ptx::load(p.adapter_of_token + token) : 0),
        known(adapter >= 0 && adapter < p.adapters) {}
  QLORA_METHOD float scaling(const TokenDotParams& p) const {
    return p.scaling_of_adapter != nullptr && known ? ptx::load(p.scaling_of_adapter + adapter) : p.scaling;
  }
  int64_t adapter;
  bool known;
};

QLORA_DEVICE float sum_of_warp(float sum) {
  for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
  return sum;
}

// One warp for each token and row; any strides and dtypes.
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 2) token_dot(QLORA_PARAMS TokenDotParams p) {
  const int64_t item = static_cast<int64_t>(ptx::block_x()) * (kThreads / 32) + ptx::warp();
  if (item >= p.tokens * p.rows) return;
  const int64_t token = item / p.rows, row = item % p.rows;
  const TokenAdapter of(p, token);
  const int64_t of_token = token * p.x.row_stride;
  const int64_t of_row = of.adapter * p.adapter_stride + row * p.operand.row_stride;
  float sum = 0.0f;
  if (of.known)
    for (int64_t step = ptx::lane(); step < p.steps; step += 32)
      sum = fmaf(load_element(p.x.data, p.x.dtype, of_token + step * p.x.col_stride),
                 load_element(p.operand.data, p.operand.dtype, of_row + step * p.operand.col_stride), sum);
  sum = sum_of_warp(sum);
  if (ptx::lane() == 0) ptx::store(p.out + item, of.known ? of.scaling(p) * sum : 0.0f);
}

// One thread block for each token and row, with loads of 16 bytes, four in flight.
constexpr int kDotThreads = 128;
template <DType kX, DType kOperand>
QLORA_KERNEL void QLORA_BOUNDS(kDotThreads, 4) token_dot_vectors(QLORA_PARAMS TokenDotParams p) {
  const int64_t item = ptx::block_x(), token = divide(item, p.rows), row = item - token * p.rows;
  const TokenAdapter of(p, token);
  const int64_t of_token = token * p.x.row_stride;
  const int64_t of_row = of.adapter * p.adapter_stride + row * p.operand.row_stride;
  float sum = 0.0f;
  if (of.known) {
#pragma unroll 4
    for (int64_t step = ptx::thread() * 8; step < p.steps; step += kDotThreads * 8) {
      float x[8], a[8];
      load_eight_elements(p.x.data, kX, (of_token + step) / 8, x);
      load_eight_elements(p.operand.data, kOperand, (of_row + step) / 8, a);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(x[i], a[i], sum);
    }
  }
  sum = sum_of_warp(sum);
  const SharedAddress sums = ptx::shared_base();
  if (ptx::lane() == 0) ptx::store_shared(sums + ptx::warp() * 4, sum);
  ptx::sync_threads();
  if (ptx::thread() != 0) return;
  const auto parts = ptx::load_shared<Floats4>(sums);
  const float total = (parts.x + parts.y) + (parts.z + parts.w);
  ptx::store(p.out + item, of.known ? of.scaling(p) * total : 0.0f);
}
static_assert(kDotThreads == 4 * 32, "one sum of each warp");

template <DType kX>
auto dot_kernel_of(DType operand) {
  return operand == kX ? token_dot_vectors<kX, kX> : token_dot_vectors<kX, DType::kFloat32>;
}

// One warp for each part of the rows and 32 columns; the parts are added in order. With kPlan, the rows are the tokens
// of adapter block_y.
constexpr int kColumnWarps = 16;
template <bool kPlan>
QLORA_KERNEL void QLORA_BOUNDS(32 * kColumnWarps, 1) column_sum(QLORA_PARAMS ColumnSumParams p) {
  const int64_t col = int64_t{ptx::block_x()} * 32 + ptx::lane();
  int64_t first = 0, rows = p.rows;
  if constexpr (kPlan) {
    first = int64_t{ptx::load(p.plan.first_tile + ptx::block_y())} * kAdapterTile;
    rows = int64_t{ptx::load(p.plan.first_tile + ptx::block_y() + 1)} * kAdapterTile - first;
  }
  const int64_t begin = first + rows * ptx::warp() / kColumnWarps,
                end = first + rows * (ptx::warp() + 1) / kColumnWarps;
  float sum = 0.0f;
  if (kPlan && col < p.cols) {
    constexpr int kAtOnce = 8;  // loads in flight
    for (int64_t at = begin; at < end; at += kAtOnce) {
      float value[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t row = at + i < end ? ptx::load(p.plan.order + at + i) : -1;
        value[i] = row < 0 ? 0.0f : load_element(p.matrix, p.dtype, row * p.cols + col);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += value[i];
    }
  } else if (col < p.cols) {
#pragma unroll 8
    for (int64_t row = begin; row < end; ++row) sum += load_element(p.matrix, p.dtype, row * p.cols + col);
  }
  const SharedAddress mine = ptx::shared_base() + ptx::lane() * 4;
  ptx::store_shared(mine + ptx::warp() * 128, sum);
  ptx::sync_threads();
  if (ptx::warp() > 0 || col >= p.cols) return;
  for (int warp = 1; warp < kColumnWarps; ++warp) sum += ptx::load_shared<float>(mine + warp * 128);
  ptx::store(p.out + (kPlan ? ptx::block_y() * p.cols : 0) + col, sum);
}

}  // namespace general

Status launch_general(const GeneralParams& p, cudaStream_t stream) {
  if (p.plan.order != nullptr) {
    static_assert(general::kTile == kAdapterTile, "a block's columns are one tile of a plan");
    const auto kernel = p.kind == OperandKind::kPacked ? general::kernel<OperandKind::kPacked, true>
                                                       : general::kernel<OperandKind::kPackedTransposed, true>;
    const Grid grid{ceil_div(p.rows, general::kTile), p.plan.tiles};
    return start(kernel, grid, general::kThreads, general::kSharedBytes, stream, p);
  }
  const Grid grid{ceil_div(p.rows, general::kTile), ceil_div(p.cols, general::kTile),
                  p.adapter_of_step != nullptr ? p.adapters : 1};
  const auto kernel = p.kind == OperandKind::kPacked             ? general::kernel<OperandKind::kPacked>
                      : p.kind == OperandKind::kPackedTransposed ? general::kernel<OperandKind::kPackedTransposed>
                                                                 : general::kernel<OperandKind::kDense>;
  return start(kernel, grid, general::kThreads, general::kSharedBytes, stream, p);
}

Status launch_token_dot(const TokenDotParams& p, cudaStream_t stream) {
  using namespace general;
  const int64_t items = p.tokens * p.rows;
  if (!p.is_vectorized) return start(token_dot, {ceil_div(items, kThreads / 32)}, kThreads, 0, stream, p);
  const auto kernel = p.x.dtype == DType::kBFloat16  ? dot_kernel_of<DType::kBFloat16>(p.operand.dtype)
                      : p.x.dtype == DType::kFloat16 ? dot_kernel_of<DType::kFloat16>(p.operand.dtype)
                                                     : dot_kernel_of<DType::kFloat32>(p.operand.dtype);
  return start(kernel, {items}, kDotThreads, 4 * sizeof(float), stream, p);
}

Status launch_column_sum(const ColumnSumParams& p, cudaStream_t stream) {
  constexpr int kWarps = general::kColumnWarps;
  const bool by_plan = p.plan.order != nullptr;
  const Grid grid{ceil_div(p.cols, 32), by_plan ? p.plan.adapters : 1};
  return start(by_plan ? general::column_sum<true> : general::column_sum<false>, grid, 32 * kWarps, 128 * kWarps,
               stream, p);
}

}  // namespace qlora::cuda
