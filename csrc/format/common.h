// Small helpers shared by all headers of the format: plain C++17, no torch, no allocation.
#pragma once

#include <cstdint>

// These functions are compiled into translation units with different instruction sets. Internal linkage keeps the
// linker from merging an AVX-512 body with a scalar one, which would crash older machines. Forced inlining avoids
// call overhead.
#if defined(__CUDACC__)
#define QLORA_INLINE static __host__ __device__ __forceinline__
#else
#define QLORA_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#endif

namespace qlora {

QLORA_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
QLORA_INLINE constexpr int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
QLORA_INLINE constexpr int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace qlora
