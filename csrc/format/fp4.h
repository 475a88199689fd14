// The FP4 codebook of bitsandbytes: bit 3 is the sign, and codes 0-7 are not ordered by value. It is not OCP e2m1.
#pragma once

#include <cstdint>

namespace qlora {

// Code -> level. 0.0625/12 is the only subnormal; the others are {2, 3, 4, 6, 8, 12}/12.
inline constexpr float kFp4[16] = {
    0.0f,  0.0052083333333f,  0.66666666667f,  1.0f,  0.33333333333f,  0.5f,  0.16666666667f,  0.25f,
    -0.0f, -0.0052083333333f, -0.66666666667f, -1.0f, -0.33333333333f, -0.5f, -0.16666666667f, -0.25f,
};

// The number of thresholds below |x| is its rank, and the rank gives the code. The literals are those of bitsandbytes'
// CUDA kernel. They are not the exact midpoints: 0.4166667f and 0.583333f decide a few inputs differently from
// (a + b) / 2.
inline constexpr float kFp4Thresholds[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                            0.4166667f,  0.583333f,  0.8333333f};
inline constexpr uint8_t kFp4CodeOfRank[8] = {0, 1, 6, 7, 4, 5, 2, 3};

// The same tables for device code, which cannot read host memory. codes_of_ranks holds the code of rank i in nibble i.
struct Fp4Tables {
  float threshold[7];
  uint32_t codes_of_ranks;
};
constexpr Fp4Tables make_fp4_tables() {
  Fp4Tables t{};
  for (int i = 0; i < 7; ++i) t.threshold[i] = kFp4Thresholds[i];
  for (int i = 0; i < 8; ++i) t.codes_of_ranks |= static_cast<uint32_t>(kFp4CodeOfRank[i]) << (4 * i);
  return t;
}
inline constexpr Fp4Tables kFp4Tables = make_fp4_tables();

}  // namespace qlora
