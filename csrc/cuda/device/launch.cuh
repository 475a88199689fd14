// Launches a kernel on a stream and reports errors.
#pragma once

#include <mutex>
#include <set>
#include <utility>

#include "cuda/device/ptx.cuh"
#include "cuda/launch.h"

namespace qlora::cuda {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

inline constexpr int64_t kMaxGridX = 0x7FFFFFFF;
inline constexpr int64_t kMaxGridYZ = 65535;

// Raises the kernel's limit to all shared memory of the current GPU, whatever this launch needs: the limit belongs to
// the kernel, so host threads that set different sizes would overwrite each other's. Done once per kernel and GPU.
inline cudaError_t allow_all_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> configured;
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (configured.count({kernel, device}) > 0) return cudaSuccess;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) configured.emplace(kernel, device);
  return error;
}

template <class Params>
Status start(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, cudaStream_t stream,
             const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) return {"the grid is too large for a launch"};
  constexpr int kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t refused = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
    if (refused != cudaSuccess) {
      (void)cudaGetLastError();  // clears the error; otherwise the next launch would report it
      return {cudaGetErrorString(refused)};
    }
  }
  const cudaError_t earlier = cudaPeekAtLastError();  // an error of an earlier launch or of other code
  kernel<<<dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)), threads,
           shared_bytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {cudaGetErrorString(error), earlier != cudaSuccess};
}

}  // namespace qlora::cuda
