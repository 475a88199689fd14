// Host implementation of csrc/cuda/device/launch.cuh: runs blocks one after another, with threads as fibers.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/launch.h"
#include "simt.h"

namespace qlora::cuda {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

template <class Params>
Status start(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, cudaStream_t, const Params& params) {
  const int64_t extents[3] = {grid.x, grid.y, grid.z};
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  if (grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) return {"the grid is too large for a launch"};
  return {simt::launch(reinterpret_cast<const void*>(kernel), extents, threads, shared_bytes, &params, sizeof params,
                       [&] { kernel(params); })};
}

}  // namespace qlora::cuda
