// AdamW on a GPU: one pass over parameter, gradient and moments. With 8-bit moments, a warp updates one block of 256
// and finds its new absmax by shuffles.
#include <algorithm>

#include "cuda/device/elements.cuh"
#include "cuda/device/launch.cuh"

namespace qlora::cuda {
namespace adamw {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;
constexpr int kPerLane = kMomentBlock / 32;

struct Coders {
  DynamicMap map[2];  // signed: first moments; unsigned: second moments
  DynamicCells cells[2];
};
QLORA_TABLE Coders kCoders = {{kDynamicMap, kUnsignedDynamicMap}, {kDynamicCells, kUnsignedDynamicCells}};

QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) kernel(QLORA_PARAMS AdamWJobs jobs) {
  const AdamWParams& p = jobs.job[ptx::block_y()];
  const int64_t first = ptx::block_x() * int64_t{kThreads * kPerThread} + ptx::thread();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t at = first + i * kThreads;
    if (at >= p.numel) return;
    float param = load_element(p.param, p.param_dtype, at), m = ptx::load(p.exp_avg + at);
    float v = ptx::load(p.exp_avg_sq + at);
    adamw_update(p.step, load_element(p.grad, p.grad_dtype, at), param, m, v);
    store_element(p.param, p.param_dtype, at, param);
    ptx::store(p.exp_avg + at, m);
    ptx::store(p.exp_avg_sq + at, v);
  }
}

QLORA_DEVICE float warp_max(float value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = ptx::shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

template <int kMoment>
QLORA_DEVICE int nearest_code(float x) {
  const uint32_t bits = bits_of(x);
  const int code = ptx::load(&kCoders.cells[kMoment].code[bits >> 31][dynamic_cell(bits)]);
  return code + (code < kDynamicMapSize - 1 && x > ptx::load(&kCoders.map[kMoment].threshold[code]));
}

QLORA_KERNEL void QLORA_BOUNDS(kThreads, 2) kernel_8bit(QLORA_PARAMS AdamWJobs jobs) {
  const AdamWParams& p = jobs.job[ptx::block_y()];
  const int64_t block = ptx::block_x() * int64_t{kThreads / 32} + ptx::warp();
  const int64_t first = block * kMomentBlock + ptx::lane();
  if (block * kMomentBlock >= p.numel) return;
  const float old = ptx::load(p.absmax + block), old_sq = ptx::load(p.absmax_sq + block);
  float m[kPerLane] = {}, v[kPerLane] = {}, absmax = 0.0f, absmax_sq = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t at = first + i * 32;
    if (at >= p.numel) break;
    m[i] = ptx::load(&kCoders.map[0].value[ptx::load(p.codes + at)]) * old;
    v[i] = ptx::load(&kCoders.map[1].value[ptx::load(p.codes_sq + at)]) * old_sq;
    float param = load_element(p.param, p.param_dtype, at);
    adamw_update(p.step, load_element(p.grad, p.grad_dtype, at), param, m[i], v[i]);
    store_element(p.param, p.param_dtype, at, param);
    absmax = fabsf(m[i]) > absmax ? fabsf(m[i]) : absmax;
    absmax_sq = v[i] > absmax_sq ? v[i] : absmax_sq;
  }
  absmax = warp_max(absmax);
  absmax_sq = warp_max(absmax_sq);
  if (ptx::lane() == 0) {
    ptx::store(p.absmax + block, absmax);
    ptx::store(p.absmax_sq + block, absmax_sq);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t at = first + i * 32;
    if (at >= p.numel) return;
    const int code_sq = nearest_code<1>(normalised_moment(v[i], absmax_sq));
    ptx::store(p.codes + at, static_cast<uint8_t>(nearest_code<0>(normalised_moment(m[i], absmax))));
    // A nonzero second moment never gets code 0, because the next step would divide by eps.
    ptx::store(p.codes_sq + at, static_cast<uint8_t>(code_sq == 0 && v[i] > 0.0f ? 1 : code_sq));
  }
}

}  // namespace adamw

Status launch_adamw(const AdamWJobs& jobs, cudaStream_t stream) {
  using namespace adamw;
  int64_t longest = 0;
  for (int i = 0; i < jobs.count; ++i) {
    longest = std::max(longest, jobs.job[i].numel);
    if ((jobs.job[i].codes == nullptr) != (jobs.job[0].codes == nullptr)) return {"moments of 8 and of 32 bits"};
  }
  if (longest == 0) return {};
  const bool in_8_bit = jobs.job[0].codes != nullptr;
  const int per_block = in_8_bit ? kMomentBlock * (kThreads / 32) : kThreads * kPerThread;
  return start(in_8_bit ? kernel_8bit : kernel, {ceil_div(longest, per_block), jobs.count}, kThreads, 0, stream, jobs);
}

}  // namespace qlora::cuda
