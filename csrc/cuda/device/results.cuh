// Epilogue of the gemm kernels: adds the low-rank term and the bias and stores 16-bit results.
//
// A warp holds 16R rows of the operand (out features in the forward, in features in the backward) for kTokens tokens:
// fragment f of lane (g, t) has rows first_row + 2Rg + 2f + {0, 1} and tokens first_token + 8j + 2t + {0, 1}.
#pragma once

#include "cuda/device/experts.cuh"
#include "cuda/device/low_rank.cuh"

namespace qlora::cuda {

// Writes zeros to `count` features, from first_row on, of the rows at a tile's positions; the whole block must call it.
template <class T, int kTokens, int kThreads>
QLORA_DEVICE void store_zeros(const GemmOutput& p, int first_row, int count, int first_position) {
  for (int i = ptx::thread(); i < kTokens * count; i += kThreads) {
    const int64_t token = ptx::load(p.plan.order + first_position + i / count), row = first_row + i % count;
    if (token >= 0 && row < p.rows) ptx::store(&(static_cast<T*>(p.y) + token * p.rows + row)->bits, uint16_t{0});
  }
}

// Loads 16 ranks of the up factor as the A operand, directly from global memory: the matrix is small and stays in L2.
// `low` holds the rounding errors of `high`.
template <class T, int R>
QLORA_DEVICE void load_up(const FactorReader<T>& up, const GemmOutput& p, int first_row, int r, uint32_t (&high)[R][4],
                          uint32_t (&low)[R][4]) {
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
#pragma unroll
  for (int f = 0; f < R; ++f)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = int64_t{first_row} + 2 * R * g + 2 * f + i;
      float values[4];
      up.along_ranks(min_i64(row, p.rows - 1), r + 4 * t, p.r, values);
      split_pair<T>(values[0], values[1], high[f][i], low[f][i]);
      split_pair<T>(values[2], values[3], high[f][2 + i], low[f][2 + i]);
    }
}

// The activations of eight tokens for 16 ranks, as the B operand; zeros for a negative token.
struct ActivationPairs {
  uint32_t high[2], low[2];
};
template <class T>
QLORA_DEVICE ActivationPairs load_activation(const GemmOutput& p, int64_t token, int r) {
  const Floats4 values =
      token < 0 ? Floats4{0, 0, 0, 0} : load_activations(p.activations, token, r + 4 * (ptx::lane() % 4), p.r);
  ActivationPairs pairs;
  split_pair<T>(values.x, values.y, pairs.high[0], pairs.low[0]);
  split_pair<T>(values.z, values.w, pairs.high[1], pairs.low[1]);
  return pairs;
}

// sum = before + up · activations. If the factor has the tokens' type, activations are rounded to it, as torch does.
// Otherwise the high and low parts of both are multiplied, except low times low.
template <class T>
QLORA_DEVICE void low_rank_step(bool splits, const uint32_t (&high)[4], const uint32_t (&low)[4],
                                const ActivationPairs& b, const float (&before)[4], float (&sum)[4]) {
  ptx::mma<T>(sum, high, b.high[0], b.high[1], before);
  if (!splits) return;
  ptx::mma<T>(sum, high, b.low[0], b.low[1], sum);
  ptx::mma<T>(sum, low, b.high[0], b.high[1], sum);
}

// sum += up · activations, 16 ranks per step.
template <class T, int R, int kTokens, TokenMode kMode = TokenMode::kOne>
QLORA_DEVICE void low_rank_steps(const GemmOutput& p, int first_row, int first_token, float (&sum)[R][kTokens / 8][4],
                                 int expert = 0) {
  const FactorReader<T> up(p.up, expert);
  for (int r = 0; r < p.r; r += 16) {
    uint32_t high[R][4], low[R][4];
    load_up<T, R>(up, p, first_row, r, high, low);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const int64_t position = int64_t{first_token} + 8 * j + ptx::lane() / 4;
      const int64_t token =
          kMode == TokenMode::kExperts ? ptx::load(p.plan.order + position) : min_i64(position, p.m - 1);
      const ActivationPairs b = load_activation<T>(p, token, r);
#pragma unroll
      for (int f = 0; f < R; ++f) low_rank_step<T>(up.splits(), high[f], low[f], b, sum[f][j], sum[f][j]);
    }
  }
}

// The same with one adapter per token: each group of eight tokens is multiplied with every adapter that occurs in it,
// and a token keeps only the sums of its own adapter. So a token gets the same sums as without the other tokens, and
// their inf or nan does not affect it.
template <class T, int R, int kTokens>
QLORA_DEVICE void low_rank_steps_of_adapters(const GemmOutput& p, int first_row, int first_token,
                                             float (&sum)[R][kTokens / 8][4]) {
  const int t = ptx::lane() % 4;
  for (int r = 0; r < p.r; r += 16) {
    uint32_t high[R][4] = {}, low[R][4] = {};
    int held = -1;  // the adapter in high and low, kept because adjacent tokens mostly share an adapter
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const int first = first_token + 8 * j;
      const int64_t adapter =
          first + ptx::lane() % 8 < p.m ? ptx::load(p.adapter_of_token + first + ptx::lane() % 8) : -1;
      const int mine = adapter >= 0 && adapter < p.adapters ? static_cast<int>(adapter) : -1;
      // The lane loads activations of token lane / 4 of the group, but `mine` belongs to token lane % 8.
      const bool has_any = ptx::shuffle(mine, ptx::lane() / 4) >= 0;
      const ActivationPairs b = load_activation<T>(p, has_any ? first + ptx::lane() / 4 : -1, r);
      uint32_t left = ptx::ballot(mine >= 0) & 0xFFu;
      while (left != 0) {
        const int current = ptx::shuffle(mine, ptx::lowest_bit(left));
        const uint32_t has_it = ptx::ballot(mine == current);
        left &= ~has_it;
        const FactorReader<T> up(p.up, current);
        if (current != held) {
          load_up<T, R>(up, p, first_row, r, high, low);
          held = current;
        }
        const bool even = (has_it >> (2 * t) & 1u) != 0, odd = (has_it >> (2 * t + 1) & 1u) != 0;
#pragma unroll
        for (int f = 0; f < R; ++f) {
          float with[4];
          low_rank_step<T>(up.splits(), high[f], low[f], b, sum[f][j], with);
          sum[f][j][0] = even ? with[0] : sum[f][j][0];
          sum[f][j][1] = odd ? with[1] : sum[f][j][1];
          sum[f][j][2] = even ? with[2] : sum[f][j][2];
          sum[f][j][3] = odd ? with[3] : sum[f][j][3];
        }
      }
    }
  }
}

// Stores a lane's results: 2R adjacent rows for each of its tokens, so that a warp writes whole sectors.
template <class T, int R, int kTokens, TokenMode kMode>
QLORA_DEVICE void store_results(const GemmOutput& p, int first_row, int first_token,
                                const float (&sum)[R][kTokens / 8][4], int expert = 0) {
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  const int64_t row = int64_t{first_row} + 2 * R * g;
  const int64_t of_expert = kMode == TokenMode::kExperts ? expert * p.rows : 0;
  float bias[2 * R];
#pragma unroll
  for (int i = 0; i < 2 * R; ++i)
    bias[i] = p.bias != nullptr && row + i < p.rows ? load_element(p.bias, p.bias_dtype, of_expert + row + i) : 0.0f;
  const bool side_by_side = p.rows % (2 * R) == 0 && row < p.rows;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int64_t token = int64_t{first_token} + 8 * j + 2 * t + i;
      if constexpr (kMode == TokenMode::kExperts) {
        token = ptx::load(p.plan.order + token);
        if (token < 0) continue;
      } else {
        if (token >= p.m) continue;
      }
      float value[2 * R];
#pragma unroll
      for (int f = 0; f < R; ++f) {
        value[2 * f] = sum[f][j][i] + bias[2 * f];
        value[2 * f + 1] = sum[f][j][2 + i] + bias[2 * f + 1];
      }
      if constexpr (kMode == TokenMode::kAdapters) {
        const int64_t adapter = ptx::load(p.adapter_of_token + token);
        if (adapter < -1 || adapter >= p.adapters)  // invalid adapter
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
