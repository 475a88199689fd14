// Starts a kernel on a stream and reports what became of it.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/launch.h"

namespace qlora::cuda {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

inline constexpr int64_t kMaxGridX = 0x7FFFFFFF;
inline constexpr int64_t kMaxGridYZ = 65535;

template <class Params>
Status start(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, cudaStream_t stream,
             const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) return {"the grid is too large for a launch"};
  constexpr int kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    // All that the GPU has: the attribute belongs to the kernel, and threads that ask for different sizes would take it
    // from each other.
    int device = 0, most = 0;
    cudaError_t refused = cudaGetDevice(&device);
    if (refused == cudaSuccess)
      refused = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (refused == cudaSuccess)
      refused = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     most);
    if (refused != cudaSuccess) {
      (void)cudaGetLastError();  // else the next launch would report it
      return {cudaGetErrorString(refused)};
    }
  }
  kernel<<<dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)), threads,
           shared_bytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return {error == cudaSuccess ? nullptr : cudaGetErrorString(error)};
}

}  // namespace qlora::cuda
