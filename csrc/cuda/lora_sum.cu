// Adds the partial gradients of low-rank factors, one per part of the tokens, in order.
#include <algorithm>

#include "cuda/device/elements.cuh"
#include "cuda/device/launch.cuh"
#include "format/common.h"

namespace qlora::cuda {
namespace lora_sum {

constexpr int kThreads = 256;

QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) kernel(QLORA_PARAMS LoraSumJobs jobs) {
  const LoraSumJob& job = jobs.job[ptx::block_y()];
  const int64_t item = static_cast<int64_t>(ptx::block_x()) * kThreads + ptx::thread();
  if (item >= job.count) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int part = 0; part < job.parts; ++part) sum += ptx::load(job.from + part * job.count + item);
  store_element(job.out, job.dtype, item, sum);
}

}  // namespace lora_sum

Status launch_lora_sum(const LoraSumJobs& jobs, cudaStream_t stream) {
  int64_t most = 0;
  for (int i = 0; i < jobs.count; ++i) most = std::max(most, jobs.job[i].count);
  return start(lora_sum::kernel, {ceil_div(most, lora_sum::kThreads), jobs.count}, lora_sum::kThreads, 0, stream, jobs);
}

}  // namespace qlora::cuda
