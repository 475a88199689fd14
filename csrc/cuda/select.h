// Which kernel takes a shape on a GPU: pure functions, tested and explained without one.
#pragma once

#include <cstdint>

namespace qlora::cuda {

struct GpuInfo {
  int arch = 0;  // 75, 80, 86, 89, 90, 100, 120
  int sm_count = 0;
  int shared_bytes_per_block = 0;  // the most that a launch may ask for
};

}  // namespace qlora::cuda
