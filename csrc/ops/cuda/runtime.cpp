// Sets the device, stream and profiler range of an op, through torch's stable ABI and NVTX.
#include "ops/cuda/runtime.h"

#include <nvtx3/nvToolsExt.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdio>
#include <cstdlib>

namespace qlora::ops_cuda {

namespace {

// nsys and ncu set this variable to the library they inject. Without a profiler, ranges would only cost time to format
// their names.
bool profiler_is_attached() {
  static const bool attached = std::getenv("NVTX_INJECTION64_PATH") != nullptr;
  return attached;
}

}  // namespace

struct GpuScope::Guard {
  explicit Guard(int32_t device) : device(device) {}
  ~Guard() {
    if (range_is_open) nvtxRangePop();
  }
  torch::stable::accelerator::DeviceGuard device;
  bool range_is_open = false;
};

GpuScope::GpuScope(const Tensor& like, const char* op, const Extents& e) {
  STD_TORCH_CHECK(!like.is_cpu(), "the CUDA kernel of qlora::", op, " was called, but its tensors are on the CPU");
  guard_ = std::make_unique<Guard>(like.get_device_index());
  void* stream = nullptr;
  const auto error = aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream);
  STD_TORCH_CHECK(error == 0, "torch has no current CUDA stream for device ", like.get_device_index());
  stream_ = static_cast<cudaStream_t>(stream);
  const cuda::Status status = cuda::query_gpu(like.get_device_index(), &gpu_);
  STD_TORCH_CHECK(status.error == nullptr, "device ", like.get_device_index(), " cannot be queried: ", status.error);
  if (profiler_is_attached()) {
    char name[128];
    std::snprintf(name, sizeof name, "qlora::%s[m=%lld,n=%lld,k=%lld,r=%lld]", op, static_cast<long long>(e.m),
                  static_cast<long long>(e.n), static_cast<long long>(e.k), static_cast<long long>(e.r));
    nvtxRangePushA(name);
    guard_->range_is_open = true;
  }
}

GpuScope::~GpuScope() = default;

void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha) {
  const auto error = aoti_torch_cuda_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha);
  STD_TORCH_CHECK(error == 0, "torch's addmm failed on CUDA");
}

}  // namespace qlora::ops_cuda
