// Quantizes a matrix to given scales column by column; the error of each column is fed back into the columns after it.
//
// Rows are independent: a thread block takes 32 of them, one for each lane, and goes through all columns in tiles of
// 32, four for each warp. A tile adds up the errors of all earlier steps, which lie in device memory as [step][row], in
// chunks of 32 steps that pass through shared memory; then its own columns are rounded one after another. Sums run over
// the steps in order with separately rounded products, as on the CPU, so the codes are equal.
#include "cuda/device/codes.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/device/launch.cuh"

namespace qlora::cuda {
namespace feedback {

constexpr int kThreads = 256;
constexpr int kTile = 32;                                // rows of a block, columns of a tile, steps of a chunk
constexpr int kColumns = kTile / (kThreads / 32);        // of a thread
constexpr int kFactorStride = kTile + 4;                 // floats between steps: 16-byte loads, few bank conflicts
constexpr int kErrorBytes = kTile * kTile * 4;           // [step][row]
constexpr int kFactorBytes = kTile * kFactorStride * 4;  // [step][column]
constexpr int kSharedBytes = kErrorBytes + kFactorBytes;
static_assert(kFeedbackRows == kTile && kColumns == 4);

QLORA_DEVICE SharedAddress error_at(int step, int row) {
  return ptx::shared_base() + static_cast<SharedAddress>(step * kTile + row) * 4;
}
QLORA_DEVICE SharedAddress factor_at(int step, int column) {
  return ptx::shared_base() + kErrorBytes + static_cast<SharedAddress>(step * kFactorStride + column) * 4;
}

// Loads the factors of a chunk of steps for a tile of columns, transposed; zeros on and above the diagonal.
QLORA_DEVICE void load_factors(const FeedbackParams& p, int64_t chunk, int64_t tile) {
  const int64_t k = p.scales.k, step = chunk + ptx::lane();
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = ptx::warp() * kColumns + i;
    float factor = 0.0f;
    if (tile + column < k && step < tile + column) {
      factor = ptx::load(p.feedback + (tile + column) * k + step);
      if (!is_finite(factor)) report_position(p.bad + 1, (tile + column) * k + step);
    }
    ptx::store_shared(factor_at(ptx::lane(), column), factor);
  }
}

QLORA_DEVICE void load_errors(const float* errors, int64_t stride, int64_t chunk) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int step = ptx::warp() * kColumns + i;
    ptx::store_shared(error_at(step, ptx::lane()), ptx::load(errors + (chunk + step) * stride + ptx::lane()));
  }
}

QLORA_DEVICE void add_step(int step, float (&target)[kColumns]) {
  const float error = ptx::load_shared<float>(error_at(step, ptx::lane()));
  const auto factor = ptx::load_shared<Floats4>(factor_at(step, ptx::warp() * kColumns));
  target[0] = target[0] + error * factor.x;
  target[1] = target[1] + error * factor.y;
  target[2] = target[2] + error * factor.z;
  target[3] = target[3] + error * factor.w;
}

QLORA_DEVICE float normalised(float x, float scale) {
  const float reciprocal = 1.0f / scale;
  if (is_finite(reciprocal)) return x * reciprocal;
  return scale != 0.0f ? x / scale : 0.0f;  // zero or subnormal
}

// Rounds one column of the tile; its errors go to shared memory for later columns and to device memory for later tiles.
template <QuantType kType>
QLORA_DEVICE void round_column(const FeedbackParams& p, int64_t row, int64_t column, float weight, float target,
                               SharedAddress shared_error, float* error) {
  const int64_t k = p.scales.k, clamped = min_i64(row, p.scales.n - 1);
  const float scale = scale_at(p.scales, (clamped * k + column) >> p.scales.block_shift);
  const uint32_t code = code_by_thresholds<kType>(normalised(target, scale));
  const float left = weight - ptx::load(&kTables.levels[static_cast<int>(kType)][code]) * scale;
  ptx::store_shared(shared_error, left);
  ptx::store(error, left);
  if (row < p.scales.n) ptx::store(p.codes + row * k + column, static_cast<uint8_t>(code));
}

template <QuantType kType>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 1) kernel(QLORA_PARAMS FeedbackParams p) {
  const int64_t n = p.scales.n, k = p.scales.k;
  const int64_t row = static_cast<int64_t>(ptx::block_x()) * kTile + ptx::lane(), stride = ceil_div(n, kTile) * kTile;
  const float* weights = p.weight + min_i64(row, n - 1) * k;  // lanes beyond the last row repeat it
  float* errors = p.errors + static_cast<int64_t>(ptx::block_x()) * kTile;
#pragma unroll 1
  for (int64_t tile = 0; tile < k; tile += kTile) {
    const int64_t mine = tile + ptx::warp() * kColumns;
    float weight[kColumns], target[kColumns];
    int64_t column[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int64_t step = min_i64(mine + i, k - 1);
      column[i] = p.order == nullptr ? step : ptx::load(p.order + step);
      target[i] = weight[i] = ptx::load(weights + column[i]);
      if (!is_finite(weight[i]) && row < n) report_position(p.bad, row * k + column[i]);
    }
    if (p.feedback != nullptr) {
#pragma unroll 1
      for (int64_t chunk = 0; chunk < tile; chunk += kTile) {
        ptx::sync_threads();  // the chunk before has been read
        load_factors(p, chunk, tile);
        load_errors(errors, stride, chunk);
        ptx::sync_threads();
#pragma unroll 4
        for (int step = 0; step < kTile; ++step) add_step(step, target);
      }
      ptx::sync_threads();
      load_factors(p, tile, tile);
    }
    const auto width = static_cast<int>(min_i64(kTile, k - tile));
#pragma unroll 1
    for (int c = 0; c < width; ++c) {
      if (ptx::warp() == c / kColumns) {
        float w = weight[0], t = target[0];
        int64_t at = column[0];
#pragma unroll
        for (int i = 1; i < kColumns; ++i)
          if (c % kColumns == i) w = weight[i], t = target[i], at = column[i];
        round_column<kType>(p, row, at, w, t, error_at(c, ptx::lane()), errors + (tile + c) * stride + ptx::lane());
      }
      if (p.feedback == nullptr) continue;
      ptx::sync_threads();
      add_step(c, target);  // the factors of columns up to c are zero
    }
  }
}

// Packs codes, one byte per thread.
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) pack(QLORA_PARAMS FeedbackParams p) {
  const int64_t byte = static_cast<int64_t>(ptx::block_x()) * kThreads + ptx::thread(), numel = p.scales.n * p.scales.k;
  if (2 * byte >= numel) return;
  const int high = ptx::load(p.codes + 2 * byte);
  const int low = 2 * byte + 1 < numel ? ptx::load(p.codes + 2 * byte + 1) : 0;  // an unused nibble is zero
  ptx::store(p.packed + byte, static_cast<uint8_t>(high << 4 | low));
}

}  // namespace feedback

Status launch_quantize_with_feedback(const FeedbackParams& p, cudaStream_t stream) {
  using namespace feedback;
  const auto kernel_of_type =
      visit_quant_type(p.scales.quant_type, [](auto type) { return &kernel<decltype(type)::value>; });
  const Status status = start(kernel_of_type, {ceil_div(p.scales.n, kTile)}, kThreads, kSharedBytes, stream, p);
  if (status.error != nullptr) return status;
  return start(pack, {ceil_div(packed_bytes(p.scales.n * p.scales.k), kThreads)}, kThreads, 0, stream, p);
}

}  // namespace qlora::cuda
