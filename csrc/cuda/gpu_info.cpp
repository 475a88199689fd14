// Queries the GPU properties that select.h uses, once per device.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <mutex>

#include "cuda/launch.h"

namespace qlora::cuda {

Status query_gpu(int device, GpuInfo* info) {
  constexpr int kMostDevices = 64;
  static std::array<GpuInfo, kMostDevices> known;
  static std::mutex mutex;
  if (device < 0 || device >= kMostDevices) return {"no such device"};
  const std::lock_guard<std::mutex> lock(mutex);
  GpuInfo& gpu = known[static_cast<size_t>(device)];
  if (gpu.arch == 0) {
    int major = 0, minor = 0;
    const struct {
      int* value;
      cudaDeviceAttr attribute;
    } questions[] = {{&major, cudaDevAttrComputeCapabilityMajor},
                     {&minor, cudaDevAttrComputeCapabilityMinor},
                     {&gpu.sm_count, cudaDevAttrMultiProcessorCount},
                     {&gpu.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
    for (const auto& question : questions) {
      const cudaError_t error = cudaDeviceGetAttribute(question.value, question.attribute, device);
      if (error != cudaSuccess) {
        (void)cudaGetLastError();  // clears the error; otherwise the next launch would report it
        return {cudaGetErrorString(error)};
      }
    }
    // A newer GPU runs the newest code in the library and is treated like the newest known architecture.
    gpu.arch = std::min(10 * major + minor, QLORA_NEWEST_ARCH);
#ifdef QLORA_HAS_WGMMA
    gpu.has_wgmma = 10 * major + minor == 90;
#endif
  }
  *info = gpu;
  return {};
}

}  // namespace qlora::cuda
