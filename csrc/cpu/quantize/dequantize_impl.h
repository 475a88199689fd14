// Dequantizes any run of a packed weight, in flat order, for one vector type. The matmul kernels also fill their
// panels with it.
#pragma once

#include "cpu/isa/table.h"
#include "format/half.h"

namespace qlora::cpu {
namespace {

// Writes elements [first, first + count) to `out`. A run may begin on a low nibble and cross blocks. Always inlined: a
// panel has many short runs, and the table stays in registers between them.
template <class V, class T>
QLORA_INLINE void dequantize_run(const WeightView& w, const typename V::Table& table, int64_t first, int64_t count,
                                 T* out) {
  const int64_t block_mask = (int64_t{1} << w.block_shift) - 1;
  const int64_t end = first + count;
  while (first < end) {
    const int64_t block_end = min_i64((first | block_mask) + 1, end);
    const float scale = scale_of_block(w, first >> w.block_shift);
    const auto scale_v = V::set1(scale);
    if constexpr (V::kHasTables16 && sizeof(T) == 2) {
      if (first % 2 == 0 && block_end - first >= 32) {
        const auto scaled = V::template scaled_table<T>(table, scale_v);
        for (; first + 32 <= block_end; first += 32, out += 32)
          V::unpack_by_table(scaled, w.packed + (first >> 1), out);
      }
    }
    if (first & 1) {
      *out++ = from_float<T>(level_of_element(w, first) * scale);
      ++first;
    }
    if constexpr (V::kHasRuns32) {
      for (; first + 32 <= block_end; first += 32, out += 32)
        V::unpack_run32(table, w.packed + (first >> 1),
                        [&](int i, typename V::F levels)
                            __attribute__((always_inline)) { V::store(out + i * V::kLanes, V::mul(levels, scale_v)); });
    }
    for (; first + V::kLanes <= block_end; first += V::kLanes, out += V::kLanes)
      V::store(out, V::mul(V::unpack_run(table, w.packed + (first >> 1)), scale_v));
    for (; first < block_end; ++first) *out++ = from_float<T>(level_of_element(w, first) * scale);
  }
}

template <class V, class T>
void dequantize_typed(const DequantizeParams& p, int64_t begin, int64_t end) {
  dequantize_run<V>(p.weight, V::table(codebook(p.weight.quant_type)), begin, end - begin,
                    static_cast<T*>(p.out) + (begin - p.first));
}

template <class V>
void dequantize(const DequantizeParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return dequantize_typed<V, bf16>(p, begin, end);
    case DType::kFloat16:
      return dequantize_typed<V, fp16>(p, begin, end);
    default:
      return dequantize_typed<V, float>(p, begin, end);
  }
}

}  // namespace
}  // namespace qlora::cpu
