// Unrolled loops with compile-time indices, for instructions that need a constant.
#pragma once

#include <utility>

#include "cuda/device/ptx.cuh"

namespace qlora::cuda {

template <class Fn, int... kIndices>
QLORA_DEVICE void unroll_over(const Fn& fn, std::integer_sequence<int, kIndices...>) {
  (fn(Index<kIndices>{}), ...);
}
template <int kCount, class Fn>
QLORA_DEVICE void unroll(const Fn& fn) {
  unroll_over(fn, std::make_integer_sequence<int, kCount>{});
}

}  // namespace qlora::cuda
