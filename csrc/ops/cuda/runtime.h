// GPU context of an op: the device of a tensor, the current stream, a profiler range, and aligned views of tensors.
#pragma once

#include <memory>

#include "cuda/launch.h"
#include "ops/arguments.h"

namespace qlora::ops_cuda {

using namespace ops;

struct Extents {
  int64_t m = 0, n = 0, k = 0, r = 0;
};

// For its lifetime, makes the device of `like` current and opens a profiler range qlora::<op>[m=…,n=…,k=…,r=…].
class GpuScope {
 public:
  GpuScope(const Tensor& like, const char* op, const Extents& extents);
  ~GpuScope();
  GpuScope(const GpuScope&) = delete;
  GpuScope& operator=(const GpuScope&) = delete;

  cudaStream_t stream() const { return stream_; }  // torch's current stream
  const cuda::GpuInfo& gpu() const { return gpu_; }

 private:
  cudaStream_t stream_ = nullptr;
  cuda::GpuInfo gpu_;
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

// out = alpha * a b + beta * self, by the GEMM that torch calls on this device. If beta is 0, self is not read.
void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha);

inline void check(cuda::Status status, const char* kernel) {
  STD_TORCH_CHECK(status.error == nullptr,
                  status.is_earlier ? "something failed on this GPU before the kernel " : "the kernel ", kernel,
                  status.is_earlier ? " was started: " : " could not be started: ", status.error);
}

// Kernels load 16 bytes at a time, so a view that begins in the middle of a storage may have to be copied.
inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
inline Tensor aligned(const Tensor& t) { return is_aligned(t.const_data_ptr()) ? t : torch::stable::clone(t); }

// The weight as the kernels read it, valid while `w` lives. Copies w.packed if it is not aligned.
inline WeightView device_view_of(CheckedWeight& w) {
  w.packed = aligned(w.packed);
  WeightView view = view_of(w);
  if (w.n * w.k == 0) view.absmax = nullptr;  // of an empty weight it points to memory of the host
  return view;
}

}  // namespace qlora::ops_cuda
