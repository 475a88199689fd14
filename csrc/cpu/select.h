// Choice of the forward kernel for a shape: a pure function, so it can be tested and explained without running kernels.
#pragma once

#include "cpu/isa/table.h"

namespace qlora::cpu {

enum class ForwardKernel { kGemvWords, kGemvElements, kTiles, kGemm };

// `tiles`: the tile kernels for tokens of this dtype, or null (KernelTable::tiles_for).
constexpr ForwardKernel select_forward(int64_t m, int64_t k, const TileKernels* tiles) {
  if (tiles != nullptr && m > tiles->gemv_tokens) return ForwardKernel::kTiles;
  if (m > kGemvTokens) return ForwardKernel::kGemm;
  return k % kMinBlockSize == 0 ? ForwardKernel::kGemvWords : ForwardKernel::kGemvElements;
}

constexpr const char* kernel_name(ForwardKernel kernel) {
  return kernel == ForwardKernel::kGemvWords      ? "gemv_words"
         : kernel == ForwardKernel::kGemvElements ? "gemv_elements"
         : kernel == ForwardKernel::kTiles        ? "tiles"
                                                  : "gemm";
}

inline constexpr int64_t kExpertRows = 1024;  // rows of experts whose tokens are packed at a time

// Why no faster kernel runs; empty if this one is the fastest for the number of tokens.
constexpr const char* why_not_faster(ForwardKernel kernel, DType dtype) {
  if (kernel == ForwardKernel::kGemvElements)
    return "in_features is not a multiple of 32, so rows do not start on a block boundary of words";
  if (kernel != ForwardKernel::kGemm) return "";
  return dtype == DType::kFloat32
             ? "float32 tokens are multiplied in float32, bfloat16 ones on tiles (AMX, AVX512-BF16, ARM BF16)"
         : dtype == DType::kFloat16
             ? "multiplies in float32: tiles (AMX, AVX512-BF16, ARM BF16) take bfloat16, not float16"
             : "multiplies in float32: no AMX, AVX512-BF16 or ARM BF16 on this machine, or QLORA_CPU_ISA leaves it out";
}

}  // namespace qlora::cpu
