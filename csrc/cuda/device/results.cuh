// What the gemm kernels add to their products and how they store them: the low-rank term, the bias, 16-bit results.
//
// A warp holds 16R rows of the operand (out features in the forward, in features in the backward) for kTokens tokens:
// fragment f of lane (g, t) has rows first_row + 2Rg + 2f + {0, 1} and tokens first_token + 8j + 2t + {0, 1}.
#pragma once

#include "cuda/device/elements.cuh"

namespace qlora::cuda {

// A step of 16 ranks of lora_up as the A operand, straight from global memory: the matrix is small and comes from L2.
template <class T, int R>
QLORA_DEVICE void load_up(const GemmOutput& p, const T* up, int first_row, uint32_t (&fragment)[R][4]) {
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
#pragma unroll
  for (int f = 0; f < R; ++f) {
    const int64_t row = int64_t{first_row} + 2 * R * g + 2 * f;
    const auto a = ptx::load(reinterpret_cast<const Words2*>(up + min_i64(row, p.rows - 1) * p.r + 4 * t));
    const auto b = ptx::load(reinterpret_cast<const Words2*>(up + min_i64(row + 1, p.rows - 1) * p.r + 4 * t));
    fragment[f][0] = a.x;
    fragment[f][1] = b.x;
    fragment[f][2] = a.y;
    fragment[f][3] = b.y;
  }
}

// Activations of eight tokens, the same step of ranks.
template <class T>
QLORA_DEVICE Words2 load_activation(const GemmOutput& p, int first_token, int r) {
  const int64_t token = min_i64(int64_t{first_token} + ptx::lane() / 4, p.m - 1);
  return ptx::load(
      reinterpret_cast<const Words2*>(static_cast<const T*>(p.lora_t) + token * p.r + r + 4 * (ptx::lane() % 4)));
}

// sum += lora_up lora_tᵀ: r / 16 steps.
template <class T, int R, int kTokens>
QLORA_DEVICE void low_rank_steps(const GemmOutput& p, int first_row, int first_token, float (&sum)[R][kTokens / 8][4]) {
  for (int r = 0; r < p.r; r += 16) {
    uint32_t fragment[R][4];
    load_up<T, R>(p, static_cast<const T*>(p.lora_up) + r, first_row, fragment);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const Words2 b = load_activation<T>(p, first_token + 8 * j, r);
#pragma unroll
      for (int f = 0; f < R; ++f) ptx::mma<T>(sum[f][j], fragment[f], b.x, b.y, sum[f][j]);
    }
  }
}

// The same where each token has an adapter of its own: eight tokens meet each adapter that is among them, and a token
// keeps the sums of its own one. So the sums of a token are those that it would have alone, and another token's inf or
// nan does not touch them.
template <class T, int R, int kTokens>
QLORA_DEVICE void low_rank_steps_of_adapters(const GemmOutput& p, int first_row, int first_token,
                                             float (&sum)[R][kTokens / 8][4]) {
  const int t = ptx::lane() % 4;
  for (int r = 0; r < p.r; r += 16) {
    uint32_t fragment[R][4] = {};
    int held = -1;  // whose fragment that is: neighbours mostly share an adapter
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const int64_t token = int64_t{first_token} + 8 * j + ptx::lane() % 8;
      const int64_t adapter = token < p.m ? ptx::load(p.adapter_of_token + token) : -1;
      const int mine = adapter >= 0 && adapter < p.adapters ? static_cast<int>(adapter) : -1;
      const Words2 b = load_activation<T>(p, first_token + 8 * j, r);
      uint32_t left = ptx::ballot(mine >= 0) & 0xFFu;
      while (left != 0) {
        const int current = ptx::shuffle(mine, ptx::lowest_bit(left));
        const uint32_t has_it = ptx::ballot(mine == current);
        left &= ~has_it;
        if (current != held) {
          load_up<T, R>(p, static_cast<const T*>(p.lora_up) + current * p.rows * p.r + r, first_row, fragment);
          held = current;
        }
        const bool first = (has_it >> (2 * t) & 1u) != 0, second = (has_it >> (2 * t + 1) & 1u) != 0;
#pragma unroll
        for (int f = 0; f < R; ++f) {
          float with[4];
          ptx::mma<T>(with, fragment[f], b.x, b.y, sum[f][j]);
          sum[f][j][0] = first ? with[0] : sum[f][j][0];
          sum[f][j][1] = second ? with[1] : sum[f][j][1];
          sum[f][j][2] = first ? with[2] : sum[f][j][2];
          sum[f][j][3] = second ? with[3] : sum[f][j][3];
        }
      }
    }
  }
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
        if (adapter < -1 || adapter >= p.adapters)  // no such adapter
#pragma unroll
          for (int e = 0; e < 2 * R; ++e) value[e] = __builtin_nanf("");
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
