// Types of a lane's memory accesses, shared by the device functions and their host implementations.
#pragma once

#include <cstdint>

#include "format/half.h"

namespace qlora::cuda {

using SharedAddress = uint32_t;  // byte offset in the shared memory of a block

struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Floats2 {
  float x, y;
};
struct alignas(16) Floats4 {
  float x, y, z, w;
};

// A compile-time loop index: unroll<3>(f) calls f(Index<0>{}), f(Index<1>{}), f(Index<2>{}).
template <int kIndex>
struct Index {
  static constexpr int value = kIndex;
};

}  // namespace qlora::cuda
