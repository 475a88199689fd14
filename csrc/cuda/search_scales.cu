// Searches the scale of each block for the least weighted squared error. A warp takes a block, a lane one candidate:
// each lane adds up its error element by element, in the order of the CPU kernels, so the results are equal.
#include "cuda/device/codes.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/device/launch.cuh"
#include "format/scale_search.h"

namespace qlora::cuda {
namespace search_scales {

constexpr int kThreads = 256;
static_assert(kScaleCandidates == 32, "a lane for each candidate");

QLORA_TABLE ScaleFactors kFactors = kScaleFactors;

QLORA_DEVICE float absmax_of_block(const SearchScalesParams& p, int64_t first, int64_t count) {
  float absmax = 0.0f;
  for (int64_t i = ptx::lane(); i < count; i += 32) {
    const float x = ptx::load(p.weight + first + i);
    if (!is_finite(x)) report_position(p.bad, first + i);
    absmax = fmaxf(absmax, fabsf(x));
  }
  for (int mask = 1; mask < 32; mask *= 2) absmax = fmaxf(absmax, ptx::shuffle_xor(absmax, mask));
  return absmax;
}

template <QuantType kType>
QLORA_DEVICE float loss_of(const SearchScalesParams& p, int64_t first, int64_t count, float scale, float reciprocal) {
  const float* levels = kTables.levels[static_cast<int>(kType)];
  int64_t column = first - divide(first, p.k) * p.k;
  float loss = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float x = ptx::load(p.weight + first + i);
    const float error = x - ptx::load(levels + code_by_thresholds<kType>(x * reciprocal)) * scale;
    loss = loss + ptx::load(p.importance + column) * (error * error);
    if (++column == p.k) column = 0;
  }
  return loss;
}

template <QuantType kType>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) kernel(QLORA_PARAMS SearchScalesParams p) {
  const int64_t block = static_cast<int64_t>(ptx::block_x()) * (kThreads / 32) + ptx::warp();
  const int64_t first = block << p.block_shift, numel = p.n * p.k;
  if (first >= numel) return;
  const int64_t count = min_i64(int64_t{1} << p.block_shift, numel - first);
  const float absmax = absmax_of_block(p, first, count);
  float scale = ptx::load(&kFactors.value[ptx::lane()]) * absmax;
  const float reciprocal = 1.0f / scale;
  if (ptx::ballot(!is_finite(reciprocal)) != 0) {  // zero or subnormal
    if (ptx::lane() == 0) ptx::store(p.absmax + block, absmax);
    return;
  }
  float loss = loss_of<kType>(p, first, count, scale, reciprocal);
  if (!(loss == loss)) loss = float_of(0x7F800000u);
  int candidate = ptx::lane();
  for (int mask = 1; mask < 32; mask *= 2) {  // the least loss; the first of equal ones
    const float other_loss = ptx::shuffle_xor(loss, mask), other_scale = ptx::shuffle_xor(scale, mask);
    const int other = ptx::shuffle_xor(candidate, mask);
    if (other_loss < loss || (other_loss == loss && other < candidate)) {
      loss = other_loss;
      scale = other_scale;
      candidate = other;
    }
  }
  if (ptx::lane() == 0) ptx::store(p.absmax + block, scale);
}

}  // namespace search_scales

Status launch_search_scales(const SearchScalesParams& p, cudaStream_t stream) {
  using namespace search_scales;
  const int64_t blocks = ceil_div(p.n * p.k, int64_t{1} << p.block_shift);
  const auto kernel_of_type = visit_quant_type(p.quant_type, [](auto type) { return &kernel<decltype(type)::value>; });
  return start(kernel_of_type, {ceil_div(blocks, kThreads / 32)}, kThreads, 0, stream, p);
}

}  // namespace qlora::cuda
