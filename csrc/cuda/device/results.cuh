// What the gemm kernels add to their products and how they store them: the low-rank term, the bias, 16-bit results.
//
// A warp holds 16R rows of the operand (out features in the forward, in features in the backward) for kTokens tokens:
// fragment f of lane (g, t) has rows first_row + 2Rg + 2f + {0, 1} and tokens first_token + 8j + 2t + {0, 1}.
#pragma once

#include "cuda/device/elements.cuh"

namespace qlora::cuda {

// sum = lora_up lora_tᵀ: r / 16 steps, straight from global memory; both matrices are small and come from L2.
template <class T, int R, int kTokens>
QLORA_DEVICE void low_rank_steps(const GemmOutput& p, int first_row, int first_token, float (&sum)[R][kTokens / 8][4]) {
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  const T* up = static_cast<const T*>(p.lora_up) + 4 * t;
  const T* activation = static_cast<const T*>(p.lora_t) + 4 * t;
  for (int r = 0; r < p.r; r += 16) {
    uint32_t fragment[R][4];
#pragma unroll
    for (int f = 0; f < R; ++f) {
      const int64_t row = int64_t{first_row} + 2 * R * g + 2 * f;
      const auto a = ptx::load(reinterpret_cast<const Words2*>(up + min_i64(row, p.rows - 1) * p.r + r));
      const auto b = ptx::load(reinterpret_cast<const Words2*>(up + min_i64(row + 1, p.rows - 1) * p.r + r));
      fragment[f][0] = a.x;
      fragment[f][1] = b.x;
      fragment[f][2] = a.y;
      fragment[f][3] = b.y;
    }
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const int64_t token = min_i64(int64_t{first_token} + 8 * j + g, p.m - 1);
      const auto b = ptx::load(reinterpret_cast<const Words2*>(activation + token * p.r + r));
#pragma unroll
      for (int f = 0; f < R; ++f) ptx::mma<T>(sum[f][j], fragment[f], b.x, b.y, sum[f][j]);
    }
  }
}

// The low-rank term of one result with the adapter of its token, on the CUDA cores; nan for an adapter that is not
// there.
template <class T>
QLORA_DEVICE float low_rank_of_adapter(const GemmOutput& p, int64_t row, int64_t token, int64_t adapter) {
  if (adapter == -1) return 0.0f;
  if (adapter < -1 || adapter >= p.adapters) return __builtin_nanf("");
  const T* up = static_cast<const T*>(p.lora_up) + (adapter * p.rows + row) * p.r;
  const T* activation = static_cast<const T*>(p.lora_t) + token * p.r;
  float sum = 0.0f;
  for (int r = 0; r < p.r; r += 8) {
    const auto a = ptx::load(reinterpret_cast<const Words4*>(up + r));
    const auto b = ptx::load(reinterpret_cast<const Words4*>(activation + r));
    const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum = fmaf(ptx::unpack<T>(as[i], 0), ptx::unpack<T>(bs[i], 0), sum);
      sum = fmaf(ptx::unpack<T>(as[i], 1), ptx::unpack<T>(bs[i], 1), sum);
    }
  }
  return sum;
}

// Stores a lane's results: 2R rows side by side for each of its tokens, so that a warp fills sectors.
template <class T, int R, int kTokens, bool kMulti>
QLORA_DEVICE void store_results(const GemmOutput& p, int first_row, int first_token,
                                const float (&sum)[R][kTokens / 8][4]) {
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  const int64_t row = int64_t{first_row} + 2 * R * g;
  float bias[2 * R];
#pragma unroll
  for (int i = 0; i < 2 * R; ++i)
    bias[i] = p.bias != nullptr && row + i < p.rows ? load_element(p.bias, p.bias_dtype, row + i) : 0.0f;
  const bool side_by_side = p.rows % (2 * R) == 0 && row < p.rows;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = int64_t{first_token} + 8 * j + 2 * t + i;
      if (token >= p.m) continue;
      float value[2 * R];
#pragma unroll
      for (int f = 0; f < R; ++f) {
        value[2 * f] = sum[f][j][i] + bias[2 * f];
        value[2 * f + 1] = sum[f][j][2 + i] + bias[2 * f + 1];
      }
      if constexpr (kMulti) {
        const int64_t adapter = ptx::load(p.adapter_of_token + token);
        for (int e = 0; e < 2 * R; ++e)
          if (row + e < p.rows) value[e] += low_rank_of_adapter<T>(p, row + e, token, adapter);
      }
      T* y = static_cast<T*>(p.y) + token * p.rows + row;
      if (side_by_side) {
        if constexpr (R == 1)
          ptx::store(reinterpret_cast<uint32_t*>(y), ptx::pack<T>(value[0], value[1]));
        else
          ptx::store(reinterpret_cast<Words2*>(y),
                     Words2{ptx::pack<T>(value[0], value[1]), ptx::pack<T>(value[2], value[3])});
      } else {
#pragma unroll
        for (int e = 0; e < 2 * R; ++e)
          if (row + e < p.rows) ptx::store(&y[e].bits, from_float<T>(value[e]).bits);
      }
    }
}

}  // namespace qlora::cuda
