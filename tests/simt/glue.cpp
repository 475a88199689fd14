// Runs the CUDA ops on the simt executor. They are registered under a separate dispatch key, so that tests can call
// them with CPU tensors. This file also has a GpuScope that needs no GPU, and entry points for ctypes.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstring>

#include "ops/cuda/ops.h"
#include "ops/cuda/runtime.h"
#include "simt.h"

STABLE_TORCH_LIBRARY_IMPL(qlora, PrivateUse3, m) { qlora::ops_cuda::implement_cuda_ops(m); }

namespace qlora::ops_cuda {

namespace {
cuda::GpuInfo pretended{80, 4, 166912};
std::string last_range;
}  // namespace

struct GpuScope::Guard {};

GpuScope::GpuScope(const Tensor&, const char* op, const Extents& e) : gpu_(pretended) {
  last_range = std::string("qlora::") + op + "[m=" + std::to_string(e.m) + ",n=" + std::to_string(e.n) +
               ",k=" + std::to_string(e.k) + ",r=" + std::to_string(e.r) + "]";
}
GpuScope::~GpuScope() = default;

void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha) {
  const auto error = aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha);
  STD_TORCH_CHECK(error == 0, "torch's addmm failed");
}

}  // namespace qlora::ops_cuda

namespace qlora::ops {

// Uses the dispatcher, where tests/ptx observes the allocations of an operator.
Tensor empty_like_device(const Tensor& like, const int64_t* sizes, size_t dims, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes, dims}, dtype);
}

}  // namespace qlora::ops

#define QLORA_EXPORT extern "C" __attribute__((visibility("default")))

QLORA_EXPORT void qlora_simt_seed(uint64_t seed) { qlora::simt::set_seed(seed); }
QLORA_EXPORT void qlora_simt_gpu(int arch, int sm_count, int shared_bytes, int panel_bytes) {
  qlora::ops_cuda::pretended = {arch, sm_count, shared_bytes, panel_bytes, arch == 90};
  qlora::simt::set_shared_limit(shared_bytes);
}
QLORA_EXPORT void qlora_simt_count(int on) { qlora::simt::set_counting(on != 0); }
QLORA_EXPORT void qlora_simt_reset() { std::memset(&qlora::simt::counters(), 0, sizeof(qlora::simt::Counters)); }
QLORA_EXPORT const qlora::simt::Counters* qlora_simt_counters() { return &qlora::simt::counters(); }
QLORA_EXPORT void qlora_simt_launcher(qlora::simt::Launcher launcher) { qlora::simt::set_launcher(launcher); }
QLORA_EXPORT const char* qlora_simt_last_range() { return qlora::ops_cuda::last_range.c_str(); }
