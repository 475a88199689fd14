// Which kernel takes a shape: a pure function, so that it can be tested and explained without running anything.
#pragma once

#include "cpu/kernel_table.h"

namespace qlora::cpu {

enum class ForwardKernel { kDecodeWords, kDecodeSpans, kGemm };

constexpr ForwardKernel select_forward(int64_t m, int64_t k) {
  if (m > kDecodeTokens) return ForwardKernel::kGemm;
  return k % kMinBlockSize == 0 ? ForwardKernel::kDecodeWords : ForwardKernel::kDecodeSpans;
}

constexpr const char* kernel_name(ForwardKernel kernel) {
  return kernel == ForwardKernel::kDecodeWords   ? "decode_words"
         : kernel == ForwardKernel::kDecodeSpans ? "decode_spans"
                                                 : "gemm";
}

// Why not a faster one; empty if this is the fastest for the number of tokens.
constexpr const char* why_not_faster(ForwardKernel kernel) {
  return kernel == ForwardKernel::kDecodeSpans
             ? "in_features is not a multiple of 32, so rows do not start on a block boundary of words"
         : kernel == ForwardKernel::kGemm ? "multiplies in float32: this build has no bfloat16 or AMX matmul"
                                          : "";
}

}  // namespace qlora::cpu
