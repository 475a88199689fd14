// What an op needs of the GPU besides its kernels: the device of a tensor, the current stream, a range for the
// profiler.
#pragma once

#include <memory>

#include "cuda/launch.h"
#include "ops/arguments.h"

namespace qlora::ops {

struct Extents {
  int64_t m = 0, n = 0, k = 0, r = 0;
};

// While it lives, the device of `like` is the current one, and a range qlora::<op>[m=…,n=…,k=…,r=…] is open for nsys.
class GpuScope {
 public:
  GpuScope(const Tensor& like, const char* op, const Extents& extents);
  ~GpuScope();
  GpuScope(const GpuScope&) = delete;
  GpuScope& operator=(const GpuScope&) = delete;

  cudaStream_t stream() const { return stream_; }  // the one that torch uses now
  const cuda::GpuInfo& gpu() const { return gpu_; }

 private:
  cudaStream_t stream_ = nullptr;
  cuda::GpuInfo gpu_;
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

// out = alpha * a b + beta * self, by the GEMM that torch calls on this device. beta 0: self is not read.
void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha);

inline void check(cuda::Status status, const char* kernel) {
  STD_TORCH_CHECK(status.error == nullptr,
                  status.is_earlier ? "something failed on this GPU before the kernel " : "the kernel ", kernel,
                  status.is_earlier ? " was started: " : " could not be started: ", status.error);
}

// Kernels load 16 bytes at a time; a view into the middle of a storage may need a copy for that.
inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
inline Tensor aligned(const Tensor& t) { return is_aligned(t.const_data_ptr()) ? t : torch::stable::clone(t); }

// The weight as the kernels read it; valid while `w` lives, whose packed bytes are copied if they are not aligned.
inline cuda::Weight device_view_of(CheckedWeight& w) {
  w.packed = aligned(w.packed);
  cuda::Weight view;
  view.packed = w.packed.const_data_ptr<uint8_t>();
  if (w.nested_absmax) {
    view.absmax_codes = w.absmax.const_data_ptr<uint8_t>();
    view.nested_absmax = w.nested_absmax->const_data_ptr<float>();
    view.nested_offset = w.nested_offset->const_data_ptr<float>();
  } else if (w.n * w.k > 0) {
    view.absmax = w.absmax.const_data_ptr<float>();
  }
  view.n = w.n;
  view.k = w.k;
  view.block_shift = w.block_shift;
  view.quant_type = static_cast<int>(w.type);
  return view;
}

}  // namespace qlora::ops
