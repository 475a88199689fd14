// Double quantization of the scales: computes their mean, then quantizes absmax - mean in blocks of 256 to the signed
// 8-bit dynamic map.
#include "cuda/device/elements.cuh"
#include "cuda/device/launch.cuh"

namespace qlora::cuda {
namespace double_quantize {

constexpr int kThreads = 256;
static_assert(kThreads == kNestedBlock && kThreads == kMeanParts, "a thread is a scale, and a part of the mean");
constexpr int kWarps = kThreads / 32;
constexpr int kSharedBytes = kWarps * static_cast<int>(sizeof(double));

// Sum over the threads of a block, in a fixed order: a tree within each warp, then over the warps. All threads get it.
QLORA_DEVICE double block_sum(double value) {
  const SharedAddress base = ptx::shared_base();
  for (int mask = 16; mask > 0; mask /= 2) value += ptx::shuffle_xor(value, mask);
  if (ptx::lane() == 0) ptx::store_shared(base + ptx::warp() * 8, value);
  ptx::sync_threads();
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += ptx::load_shared<double>(base + i * 8);
  ptx::sync_threads();
  return sum;
}

// Number of parts of the mean, one thread block of 256 threads each, at most as many as there is work for.
QLORA_INLINE int64_t part_count(int64_t blocks) { return min_i64(kMeanParts, ceil_div(blocks, kThreads)); }

QLORA_DEVICE float block_max(float value) {
  const SharedAddress base = ptx::shared_base();
  for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, ptx::shuffle_xor(value, mask));
  if (ptx::lane() == 0) ptx::store_shared(base + ptx::warp() * 4, value);
  ptx::sync_threads();
  for (int i = 0; i < kWarps; ++i) value = fmaxf(value, ptx::load_shared<float>(base + i * 4));
  ptx::sync_threads();
  return value;
}

// Part i of the mean sums every part_count-th group of 256 scales, beginning with group i.
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) sum_parts(QLORA_PARAMS DoubleQuantizeParams p) {
  double sum = 0.0;
  for (int64_t i = ptx::block_x() * int64_t{kThreads} + ptx::thread(); i < p.blocks;
       i += part_count(p.blocks) * kThreads)
    sum += ptx::load(p.absmax + i);
  sum = block_sum(sum);
  if (ptx::thread() == 0) ptx::store(p.parts + ptx::block_x(), sum);
}

QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) kernel(QLORA_PARAMS DoubleQuantizeParams p) {
  const double sum = block_sum(ptx::thread() < part_count(p.blocks) ? ptx::load(p.parts + ptx::thread()) : 0.0);
  const float offset = static_cast<float>(sum / static_cast<double>(p.blocks));
  if (ptx::block_x() == 0 && ptx::thread() == 0) ptx::store(p.nested_offset, offset);

  const int64_t block = ptx::block_x() * int64_t{kNestedBlock} + ptx::thread();
  const bool valid = block < p.blocks;
  const float centred = valid ? ptx::load(p.absmax + block) - offset : 0.0f;
  const float largest = block_max(fabsf(centred));
  if (ptx::thread() == 0) ptx::store(p.nested_absmax + ptx::block_x(), largest);
  const float reciprocal = 1.0f / largest;
  const bool usable = (bits_of(reciprocal) & 0x7F800000u) != 0x7F800000u;
  const float x = usable ? centred * reciprocal : largest > 0.0f ? centred / largest : 0.0f;

  int code = 0;  // number of thresholds below x
  for (int step = kDynamicMapSize / 2; step > 0; step /= 2)
    if (code + step < kDynamicMapSize && x > ptx::load(&kTables.dynamic.threshold[code + step - 1])) code += step;
  if (valid) ptx::store(p.codes + block, static_cast<uint8_t>(code));
}

}  // namespace double_quantize

Status launch_double_quantize(const DoubleQuantizeParams& p, cudaStream_t stream) {
  using namespace double_quantize;
  const Status status = start(sum_parts, {part_count(p.blocks)}, kThreads, kSharedBytes, stream, p);
  if (status.error != nullptr) return status;
  return start(kernel, {ceil_div(p.blocks, kNestedBlock)}, kThreads, kSharedBytes, stream, p);
}

}  // namespace qlora::cuda
