// Kernel for few tokens: reads each row of W once, unpacks it in registers and multiplies it with every token. Memory
// bandwidth limits it.
#pragma once

#include <cstring>

#include "cpu/isa/table.h"
#include "cpu/quantize/dequantize_impl.h"

namespace qlora::cpu {
namespace {

inline constexpr int64_t kSegment = 32;  // the smallest block size, so a 32-bit word of 8 weights has one scale
// Prefetch distance. Without a prefetch the hardware prefetcher only sometimes keeps up: 0.25 to 1.0 ms instead of
// always 0.25 ms (4096 x 4096 from memory, two threads of a Zen 5). 1 KiB was enough there; a Sapphire Rapids core
// gains 12 % from 8 KiB.
inline constexpr int64_t kPrefetchBytes = 8192;
inline constexpr int kTokensPerPass = 4;

// Floats needed for the scales of one row of k weights, followed by one vector of zeros.
template <class V>
constexpr int64_t row_scales_floats(int64_t k) {
  return k / kSegment + 2 + V::kLanes;
}

// Writes the scales of all blocks that row `row` overlaps to `out`.
template <class V>
void dequantize_row_scales(const WeightView& w, int64_t row, float* out) {
  const int64_t begin = (row * w.k) >> w.block_shift;
  const int64_t end = ((row * w.k + w.k - 1) >> w.block_shift) + 1;
  V::store(out + (end - begin), V::zero());  // words beyond the row contribute 0 * 0
  if (w.absmax != nullptr) {
    std::memcpy(out, w.absmax + begin, static_cast<size_t>(end - begin) * sizeof(float));
    return;
  }
  const auto offset = V::set1(*w.nested_offset);
  for (int64_t b = begin; b < end;) {
    const int64_t nested_end = min_i64((b | (kNestedBlock - 1)) + 1, end);
    const auto nested = V::set1(w.nested_absmax[b >> kNestedBlockShift]);
    for (; b + V::kLanes <= nested_end; b += V::kLanes)
      V::store(out + (b - begin), V::dequantize_scales(w.absmax_codes + b, kDynamicMap.value, nested, offset));
    for (; b < nested_end; ++b) out[b - begin] = scale_of_block(w, b);
  }
}

template <class V, int kTokens, int kNibble>
QLORA_INLINE void accumulate_nibbles(typename V::Table table, typename V::I words, const float* x, int64_t token_stride,
                                     typename V::F* partial) {
  if constexpr (kNibble < 8) {
    const auto level = V::template lookup<kNibble>(table, words);
    for (int t = 0; t < kTokens; ++t) {
      const auto xv = V::load(x + t * token_stride + kNibble * V::kLanes);
      partial[t] = kNibble == 0 ? V::mul(level, xv) : V::fma(level, xv, partial[t]);
    }
    accumulate_nibbles<V, kTokens, kNibble + 1>(table, words, x, token_stride, partial);
  }
}

// Dot products of one row for k % 32 == 0, where every word of 8 weights lies in one block. Inside a chunk, W and x
// (pack_words) both follow the order of the nibbles in a word, so no shuffles are needed: one load, 7 shifts and 8
// lookups for 8 * kLanes weights.
template <class V, int kTokens>
void row_dot_words(const GemvParams& p, typename V::Table table, int64_t row, const float* scales, int64_t token0,
                   float* sums) {
  constexpr int64_t kChunk = 8 * V::kLanes;  // weights
  const int64_t k = p.weight.k;
  const int64_t token_stride = ceil_div(k, kChunk) * kChunk;
  const uint8_t* packed = p.weight.packed + row * k / 2;
  const float* x = p.x_words + token0 * token_stride;
  typename V::F acc[kTokens];
  for (int t = 0; t < kTokens; ++t) acc[t] = V::zero();

  const int shift = p.weight.block_shift - log2_exact(kSegment);  // segment -> block
  const int64_t first_segment = row * k / kSegment, first_block = first_segment >> shift;
  const int64_t mask = (int64_t{1} << shift) - 1;
  const bool repeats = (kChunk / kSegment & mask) == 0;  // every chunk begins at the same offset in a block
  auto index = V::scale_index(static_cast<int>(first_segment & mask), shift);
  for (int64_t c = 0; c < k; c += kChunk) {
    const int words = static_cast<int>(min_i64(kChunk, k - c) / 8);
    const auto bits = V::load_words(packed + c / 2, words);
    __builtin_prefetch(packed + c / 2 + kPrefetchBytes);
    typename V::F partial[kTokens];
    accumulate_nibbles<V, kTokens, 0>(table, bits, x + c, token_stride, partial);
    const int64_t segment = first_segment + c / kSegment;
    if (!repeats) index = V::scale_index(static_cast<int>(segment & mask), shift);
    const auto scale = V::expand_scales(scales + ((segment >> shift) - first_block), index);
    for (int t = 0; t < kTokens; ++t) acc[t] = V::fma(partial[t], scale, acc[t]);
  }
  for (int t = 0; t < kTokens; ++t) sums[t] = V::reduce_add(acc[t]);
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

template <class V, int kTokens>
void gemv_row(const GemvParams& p, typename V::Table table, int64_t row, const float* scales, int64_t token0) {
  float sums[kTokens];
  if (p.x_words != nullptr) {
    row_dot_words<V, kTokens>(p, table, row, scales, token0, sums);
  } else {
    row_dot_elements<V, kTokens>(p, table, row, token0, sums);
  }
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

template <class V>
int64_t gemv_scratch(const GemvParams& p) {
  return p.x_words != nullptr ? 2 * row_scales_floats<V>(p.weight.k) : 0;
}

template <class V>
void gemv(const GemvParams& p, int64_t begin, int64_t end, float* scales) {
  const auto table = V::table(codebook(p.weight.quant_type));
  // The scales of the next row are dequantized before this row is multiplied. A vector load right after the stores
  // would wait until they leave the store buffer, because several stores cannot be forwarded to one load (2.5 times
  // the time at 4096 x 4096).
  const bool words = p.x_words != nullptr;
  const int64_t floats = words ? row_scales_floats<V>(p.weight.k) : 0;
  if (words && begin < end) dequantize_row_scales<V>(p.weight, begin, scales);
  for (int64_t row = begin; row < end; ++row) {
    const float* now = scales + (row - begin) % 2 * floats;
    if (words && row + 1 < end) dequantize_row_scales<V>(p.weight, row + 1, scales + (row + 1 - begin) % 2 * floats);
    for (int64_t t = 0; t < p.m; t += kTokensPerPass) {
      switch (min_i64(kTokensPerPass, p.m - t)) {
        case 1:
          gemv_row<V, 1>(p, table, row, now, t);
          break;
        case 2:
          gemv_row<V, 2>(p, table, row, now, t);
          break;
        case 3:
          gemv_row<V, 3>(p, table, row, now, t);
          break;
        default:
          gemv_row<V, kTokensPerPass>(p, table, row, now, t);
      }
    }
  }
}

template <class V>
void pack_words(const PackWordsParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 8 * V::kLanes;
  const int64_t padded = ceil_div(p.k, kChunk) * kChunk;
  for (int64_t t = begin; t < end; ++t) {
    float* plain = p.x_plain + t * p.k;
    const int64_t first = (p.row_of != nullptr ? p.row_of[t] : t) * p.k;
    for (int64_t i = 0; i < p.k; ++i) plain[i] = load_scalar(p.x, p.dtype, first + i);
    if (p.x_words == nullptr) continue;
    float* words = p.x_words + t * padded;
    for (int64_t c = 0; c < padded; c += kChunk)
      for (int j = 0; j < 8; ++j)
        for (int lane = 0; lane < V::kLanes; ++lane) {
          const int64_t i = c + 8 * lane + element_of_nibble(j);
          words[c + j * V::kLanes + lane] = i < p.k ? plain[i] : 0.0f;
        }
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
