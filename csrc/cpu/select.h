// Which kernel takes a shape: a pure function, so that it can be tested and explained without running anything.
#pragma once

#include "cpu/kernel_table.h"

namespace qlora::cpu {

enum class ForwardKernel { kDecodeWords, kDecodeSpans, kTiles, kGemm };

// Up to here a bfloat16 weight is read as fast by `decode` as by tiles, which decode it once for any number of tokens
// (4096 x 4096 on two Sapphire Rapids cores: 0.45, 0.58, 1.1 ms for 1, 2, 4 tokens against 0.66 for any of them: tiles
// lower the clock by a fifth).
inline constexpr int64_t kDecodeTokensBesideTiles = 2;

// `has_tiles`: the instruction set multiplies tokens of this dtype by tiles (KernelTable::matmul16).
constexpr ForwardKernel select_forward(int64_t m, int64_t k, bool has_tiles) {
  if (has_tiles && m > kDecodeTokensBesideTiles) return ForwardKernel::kTiles;
  if (m > kDecodeTokens) return ForwardKernel::kGemm;
  return k % kMinBlockSize == 0 ? ForwardKernel::kDecodeWords : ForwardKernel::kDecodeSpans;
}

constexpr const char* kernel_name(ForwardKernel kernel) {
  return kernel == ForwardKernel::kDecodeWords   ? "decode_words"
         : kernel == ForwardKernel::kDecodeSpans ? "decode_spans"
         : kernel == ForwardKernel::kTiles       ? "tiles"
                                                 : "gemm";
}

// Why not a faster one; empty if this is the fastest for the number of tokens.
constexpr const char* why_not_faster(ForwardKernel kernel, DType dtype) {
  if (kernel == ForwardKernel::kDecodeSpans)
    return "in_features is not a multiple of 32, so rows do not start on a block boundary of words";
  if (kernel != ForwardKernel::kGemm) return "";
  return dtype == DType::kFloat32   ? "float32 tokens are multiplied in float32, bfloat16 ones on tiles (AMX)"
         : dtype == DType::kFloat16 ? "multiplies in float32: tiles (AMX) take bfloat16, not float16"
                                    : "multiplies in float32: no AMX on this machine, or QLORA_CPU_ISA leaves it out";
}

}  // namespace qlora::cpu
