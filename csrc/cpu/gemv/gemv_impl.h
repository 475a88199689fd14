// Kernel for few tokens: reads each row of W once, unpacks it in registers and multiplies it with every token. Memory
// bandwidth limits it.
#pragma once

#include <type_traits>

#include "cpu/gemm/pack_impl.h"
#include "cpu/gemv/levels.h"
#include "cpu/gemv/row_scales.h"
#include "cpu/isa/table.h"
#include "cpu/quantize/dequantize_impl.h"

namespace qlora::cpu {
namespace {

// Prefetch distance. Without a prefetch the hardware prefetcher only sometimes keeps up: 0.25 to 1.0 ms instead of
// always 0.25 ms (4096 x 4096 from memory, two threads of a Zen 5). 1 KiB was enough there; a Sapphire Rapids core
// gains 12 % from 8 KiB.
inline constexpr int64_t kPrefetchBytes = 8192;
inline constexpr int kTokensPerPass = 4;

// Dot products of one row for k % 32 == 0, where every word of 8 weights lies in one block.
template <class V, class Levels, class Scales, int kTokens>
void row_dot_words(const GemvParams& p, const Levels& levels, Scales& scales, int64_t row, int64_t token0,
                   float* sums) {
  constexpr int64_t kChunk = 8 * V::kLanes;      // weights
  constexpr int kChains = kTokens == 1 ? 2 : 1;  // sums of a chunk that do not wait for each other
  const int64_t k = p.weight.k;
  const int64_t token_stride = ceil_div(k, kChunk) * kChunk;
  const uint8_t* packed = p.weight.packed + row * k / 2;
  const float* x = p.x_words + token0 * token_stride;
  typename V::F acc[kTokens];
  for (int t = 0; t < kTokens; ++t) acc[t] = V::zero();

  const auto multiply_chunk = [&](int64_t c, int words, typename V::F scale) __attribute__((always_inline)) {
    const auto bits = V::load_words(packed + c / 2, words);
    __builtin_prefetch(packed + c / 2 + kPrefetchBytes);
    typename V::F partial[kTokens][kChains];
    levels.for_each(bits, [&](int j, typename V::F level) __attribute__((always_inline)) {
      for (int t = 0; t < kTokens; ++t) {
        auto& sum = partial[t][j * kChains / 8];
        const auto xv = V::load(x + t * token_stride + c + j * V::kLanes);
        sum = j % (8 / kChains) == 0 ? V::mul(level, xv) : V::fma(level, xv, sum);
      }
    });
    for (int t = 0; t < kTokens; ++t) {
      if constexpr (kChains == 2) partial[t][0] = V::add(partial[t][0], partial[t][1]);
      acc[t] = V::fma(partial[t][0], scale, acc[t]);
    }
  };
  scales.for_each(row, multiply_chunk);
  for (int t = 0; t < kTokens; ++t) sums[t] = V::reduce_add(acc[t]);
  if constexpr (Levels::kMultiplied)
    for (int t = 0; t < kTokens; ++t) sums[t] /= level_multiplier(p.weight.quant_type, DType::kBFloat16);
}

// Dot products of one row for any k: dequantizes up to 512 weights of the row, then multiplies them.
template <class V, int kTokens>
void row_dot_elements(const GemvParams& p, typename V::Table table, int64_t row, int64_t token0, float* sums) {
  constexpr int64_t kRun = 512;
  alignas(64) float w[kRun];
  const int64_t k = p.weight.k;
  const float* x = p.x_plain + token0 * k;
  typename V::F acc[kTokens];
  float tail[kTokens] = {};
  for (int t = 0; t < kTokens; ++t) acc[t] = V::zero();
  for (int64_t k0 = 0; k0 < k; k0 += kRun) {
    const int64_t count = min_i64(kRun, k - k0);
    dequantize_run<V>(p.weight, table, row * k + k0, count, w);
    int64_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes)
      for (int t = 0; t < kTokens; ++t) acc[t] = V::fma(V::load(w + i), V::load(x + t * k + k0 + i), acc[t]);
    for (; i < count; ++i)
      for (int t = 0; t < kTokens; ++t) tail[t] += w[i] * x[t * k + k0 + i];
  }
  for (int t = 0; t < kTokens; ++t) sums[t] = V::reduce_add(acc[t]) + tail[t];
}

// The dot product of a[0 … count), of any float type, and b[0 … count).
template <class V, class T>
float dense_dot(const T* a, const float* b, int64_t count) {
  auto acc = V::zero();
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) acc = V::fma(V::load(a + i), V::load(b + i), acc);
  float tail = 0.0f;
  for (; i < count; ++i) tail += to_float(a[i]) * b[i];
  return V::reduce_add(acc) + tail;
}

template <class V>
float dense_dot(const void* a, DType dtype, int64_t offset, const float* b, int64_t count) {
  switch (dtype) {
    case DType::kBFloat16:
      return dense_dot<V>(static_cast<const bf16*>(a) + offset, b, count);
    case DType::kFloat16:
      return dense_dot<V>(static_cast<const fp16*>(a) + offset, b, count);
    default:
      return dense_dot<V>(static_cast<const float*>(a) + offset, b, count);
  }
}

QLORA_INLINE float load_scalar(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const bf16*>(p)[i]);
    case DType::kFloat16:
      return to_float(static_cast<const fp16*>(p)[i]);
    case DType::kInt8:
      return static_cast<const int8_t*>(p)[i];
    case DType::kUInt8:
      return static_cast<const uint8_t*>(p)[i];
    case DType::kInt16:
      return static_cast<const int16_t*>(p)[i];
    case DType::kInt32:
      return static_cast<float>(static_cast<const int32_t*>(p)[i]);
    case DType::kInt64:
      return static_cast<float>(static_cast<const int64_t*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

QLORA_INLINE void store_scalar(void* p, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::kBFloat16:
      return assign(static_cast<bf16*>(p)[i], x);
    case DType::kFloat16:
      return assign(static_cast<fp16*>(p)[i], x);
    default:
      return assign(static_cast<float*>(p)[i], x);
  }
}

// Adds the bias and the low-rank term to the sums of a row, and stores them.
template <class V, int kTokens>
void store_row(const GemvParams& p, int64_t row, int64_t token0, const float* sums) {
  const float bias = p.bias != nullptr ? load_scalar(p.bias, p.bias_dtype, row) : 0.0f;
  for (int t = 0; t < kTokens; ++t) {
    float y = sums[t] + bias;
    if (p.x_down != nullptr) {
      const int64_t token = token0 + t, adapter = p.adapter_of_token != nullptr ? p.adapter_of_token[token] : 0;
      const int64_t lora_row = adapter * p.weight.n + row;
      if (adapter >= 0) y += dense_dot<V>(p.lora_b, p.lora_dtype, lora_row * p.r, p.x_down + token * p.r, p.r);
    }
    const int64_t out_row = p.out_row_of != nullptr ? p.out_row_of[token0 + t] : token0 + t;
    store_scalar(p.y, p.dtype, out_row * p.weight.n + row, y);
  }
}

// Multiplies a row with all tokens, some at a time: row_dot(tokens, token0, sums) computes their dot products.
template <class V, class RowDot>
QLORA_INLINE void gemv_row(const GemvParams& p, int64_t row, const RowDot& row_dot) {
  const auto pass = [&](auto tokens, int64_t token0) __attribute__((always_inline)) {
    float sums[tokens.value];
    row_dot(tokens, token0, sums);
    store_row<V, tokens.value>(p, row, token0, sums);
  };
  for (int64_t t = 0; t < p.m; t += kTokensPerPass) {
    switch (min_i64(kTokensPerPass, p.m - t)) {
      case 1:
        pass(std::integral_constant<int, 1>{}, t);
        break;
      case 2:
        pass(std::integral_constant<int, 2>{}, t);
        break;
      case 3:
        pass(std::integral_constant<int, 3>{}, t);
        break;
      default:
        pass(std::integral_constant<int, kTokensPerPass>{}, t);
    }
  }
}

template <class V>
int64_t gemv_scratch(const GemvParams& p) {
  if (p.x_words == nullptr) return 0;
  return ChunkScales<V>::fit(p.weight) ? ChunkScales<V>::kScratch : RowScales<V>::scratch(p.weight.k);
}

template <class V>
void gemv(const GemvParams& p, int64_t begin, int64_t end, float* scratch) {
  if (begin >= end) return;
  if (p.x_words == nullptr) {
    const auto table = V::table(codebook(p.weight.quant_type));
    for (int64_t row = begin; row < end; ++row)
      gemv_row<V>(p, row, [&](auto tokens, int64_t token0, float* sums) {
        row_dot_elements<V, tokens.value>(p, table, row, token0, sums);
      });
    return;
  }
  const auto multiply = [&](auto&& scales) {
    with_levels<V>(p.weight.quant_type, p.dtype, [&](const auto& levels) {
      using Levels = std::decay_t<decltype(levels)>;
      using Scales = std::decay_t<decltype(scales)>;
      for (int64_t row = begin; row < end; ++row)
        gemv_row<V>(p, row, [&](auto tokens, int64_t token0, float* sums) {
          row_dot_words<V, Levels, Scales, tokens.value>(p, levels, scales, row, token0, sums);
        });
    });
  };
  if (ChunkScales<V>::fit(p.weight)) return multiply(ChunkScales<V>(p.weight, scratch));
  multiply(RowScales<V>(p.weight, begin, end, scratch));
}

template <class V, class T>
void pack_words_of(const PackWordsParams& p, const uint16_t* order, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 8 * V::kLanes;
  const int64_t padded = ceil_div(p.k, kChunk) * kChunk;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(p.x) + (p.row_of != nullptr ? p.row_of[t] : t) * p.k;
    float* plain = p.x_plain + t * p.k;
    to_floats<V>(x, p.k, plain);
    if (p.x_words == nullptr) continue;
    float* words = p.x_words + t * padded;
    for (int64_t c = 0; c < padded; c += kChunk)
      for (int64_t j = 0; j < kChunk; ++j) words[c + j] = c + order[j] < p.k ? plain[c + order[j]] : 0.0f;
  }
}

template <class V>
void pack_words(const PackWordsParams& p, int64_t begin, int64_t end) {
  uint16_t order[8 * V::kLanes];
  with_levels<V>(QuantType::kNf4, p.dtype, [&](const auto& levels) {
    for (int j = 0; j < 8; ++j)
      for (int lane = 0; lane < V::kLanes; ++lane)
        order[j * V::kLanes + lane] = static_cast<uint16_t>(levels.element(j, lane));
  });
  switch (p.dtype) {
    case DType::kBFloat16:
      return pack_words_of<V, bf16>(p, order, begin, end);
    case DType::kFloat16:
      return pack_words_of<V, fp16>(p, order, begin, end);
    default:
      return pack_words_of<V, float>(p, order, begin, end);
  }
}

template <class V>
void dot(const DotParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t t = 0; t < p.m; ++t)
      p.out[t * p.rows + row] = p.scale * dense_dot<V>(p.dense, p.dtype, row * p.k, p.x_plain + t * p.k, p.k);
}

}  // namespace
}  // namespace qlora::cpu
