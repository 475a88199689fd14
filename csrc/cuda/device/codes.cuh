// Codes of normalised weights, and reports of weights that have none.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/launch.h"
#include "format/codebook.h"

namespace qlora::cuda {

// The code of x by comparisons alone, for kernels that need few codes per load. quantize.cu has a faster way for NF4.
template <QuantType kType>
QLORA_DEVICE uint32_t code_by_thresholds(float x) {
  if constexpr (kType == QuantType::kFp4) {
    constexpr Fp4Tables t = kFp4Tables;
    const float magnitude = fabsf(x);
    const bool a = magnitude > t.threshold[3];
    const bool b = magnitude > (a ? t.threshold[5] : t.threshold[1]);
    const bool c = magnitude > (a ? (b ? t.threshold[6] : t.threshold[4]) : (b ? t.threshold[2] : t.threshold[0]));
    const int rank = (a ? 4 : 0) + (b ? 2 : 0) + (c ? 1 : 0);
    return ((t.codes_of_ranks >> (4 * rank)) & 0xFu) | (x < 0.0f ? 8u : 0u);
  } else if constexpr (Format<kType>::kAscends) {
    constexpr Thresholds t = midpoints(Format<kType>::kTable);  // a copy that device code can name
    uint32_t code = 0;
#pragma unroll
    for (int i = 0; i < kLevels - 1; ++i) code += x > t.value[i] ? 1u : 0u;
    return code;
  } else {
    static_assert(kType == QuantType::kInt4,
                  "write the rule for the codes of this type here: docs/extending/format.md");
    const float steps = rintf(x * kInt4Steps);
    const float clamped = fminf(fmaxf(steps, -static_cast<float>(kInt4Zero)), 15.0f - kInt4Zero);
    return static_cast<uint32_t>(static_cast<int>(clamped) + kInt4Zero);
  }
}

QLORA_DEVICE bool is_finite(float x) { return (bits_of(x) & 0x7F800000u) != 0x7F800000u; }

// Reports a nan or inf; the smallest position wins. `bad` begins as 0.
QLORA_DEVICE void report_position(unsigned long long* bad, int64_t position) {
  ptx::atomic_max(bad, 0x8000000000000000ull - static_cast<unsigned long long>(position));
}

}  // namespace qlora::cuda
