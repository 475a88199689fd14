// The scales of the rows of a weight as float32: whole rows in a buffer, or one chunk of weights after another.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/isa/table.h"

namespace qlora::cpu {
namespace {

inline constexpr int64_t kSegment = 32;  // the smallest block size, so a 32-bit word of 8 weights has one scale

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

// The scales of chunks of 8 * kLanes weights, in the lanes of a vector, where rows begin with a block and a chunk has
// one scale, or one in each half.
template <class V>
class ChunkScales {
 public:
  static constexpr int64_t kChunk = 8 * V::kLanes;
  static constexpr int64_t kScratch = kDynamicMapSize;  // floats

  static bool fit(const WeightView& w) {
    return w.block_shift >= log2_exact(kChunk / 2) && (w.k & ((int64_t{1} << w.block_shift) - 1)) == 0;
  }
  ChunkScales(const WeightView& w, float* scratch) : w_(w), of_code_(scratch) {}

  // Calls fn(column, words, scale) for all chunks of a row; `words` is kLanes, or less for the last chunk.
  template <class Fn>
  __attribute__((always_inline)) void for_each(int64_t row, const Fn& fn) {
    if (w_.block_shift >= log2_exact(kChunk)) {
      walk(std::false_type{}, row * w_.k, fn);
    } else {
      walk(std::true_type{}, row * w_.k, fn);
    }
  }

 private:
  // `two`: whether a chunk has two scales. Double-quantized scales are read from a table of all 256 codes, which is
  // computed once for the 256 blocks of a nested one. So they cost neither a gather nor a product and a sum each.
  template <class Two, class Fn>
  __attribute__((always_inline)) void walk(Two two, int64_t first, const Fn& fn) {
    const int shift = w_.block_shift;
    const float* absmax = w_.absmax;
    if (absmax != nullptr) {
      walk_run(two, first, 0, w_.k, [absmax](int64_t b) { return absmax[b]; }, fn);
      return;
    }
    for (int64_t c = 0; c < w_.k;) {
      const int64_t nested = (first + c) >> shift >> kNestedBlockShift;
      const int64_t end = min_i64(w_.k, ((nested + 1) << kNestedBlockShift << shift) - first);
      make_table(nested);
      c = walk_run(
          two, first, c, end, [codes = w_.absmax_codes, table = of_code_](int64_t b) { return table[codes[b]]; }, fn);
    }
  }

  // Walks over the chunks from column c that end before column `end`, and one that crosses it. Returns the next column.
  template <class Two, class ScaleOf, class Fn>
  __attribute__((always_inline)) int64_t walk_run(Two two, int64_t first, int64_t c, int64_t end,
                                                  const ScaleOf& scale_of, const Fn& fn) const {
    for (; c + kChunk <= end; c += kChunk) {
      const int64_t block = (first + c) >> w_.block_shift;
      if constexpr (two) {
        fn(c, V::kLanes, V::halves(scale_of(block), scale_of(block + 1)));
      } else {
        fn(c, V::kLanes, V::set1(scale_of(block)));
      }
    }
    if (c >= end) return c;
    const int64_t block = (first + c) >> w_.block_shift;
    const bool has_second = two && c + kChunk / 2 < w_.k;
    const float scale = scale_of_block(w_, block);
    fn(c, static_cast<int>(min_i64(kChunk, w_.k - c) / 8),
       V::halves(scale, has_second ? scale_of_block(w_, block + 1) : scale));
    return c + kChunk;
  }

  void make_table(int64_t nested_block) {
    if (nested_block == nested_block_) return;
    nested_block_ = nested_block;
    const auto nested = V::set1(w_.nested_absmax[nested_block]), offset = V::set1(*w_.nested_offset);
    for (int i = 0; i < kDynamicMapSize; i += V::kLanes)
      V::store(of_code_ + i, V::add(V::mul(V::load(kDynamicMap.value + i), nested), offset));
  }

  const WeightView& w_;
  float* of_code_;  // [256] scales of nested_block_
  int64_t nested_block_ = -1;
};

// The scales of rows of any weight, dequantized one row ahead. A vector load right after the stores would wait until
// they leave the store buffer, because several stores cannot be forwarded to one load (2.5 times the time at 4096 x
// 4096).
template <class V>
class RowScales {
 public:
  static int64_t scratch(int64_t k) { return 2 * row_scales_floats<V>(k); }

  RowScales(const WeightView& w, int64_t begin, int64_t end, float* scratch)
      : w_(w), begin_(begin), end_(end), buffers_(scratch) {
    dequantize_row_scales<V>(w_, begin, buffer(begin));
  }
  // Calls fn(column, words, scale) for all chunks of a row. Rows come in order.
  template <class Fn>
  __attribute__((always_inline)) void for_each(int64_t row, const Fn& fn) {
    constexpr int64_t kChunk = 8 * V::kLanes;
    if (row >= next_) {
      next_ = row + 1;
      if (next_ < end_) dequantize_row_scales<V>(w_, next_, buffer(next_));
    }
    const float* scales = buffer(row);
    const int shift = w_.block_shift - log2_exact(kSegment);  // segment -> block
    const int64_t first_segment = row * w_.k / kSegment, first_block = first_segment >> shift;
    const int64_t mask = (int64_t{1} << shift) - 1;
    const bool repeats = (kChunk / kSegment & mask) == 0;  // every chunk begins at the same offset in a block
    auto index = V::scale_index(static_cast<int>(first_segment & mask), shift);
    for (int64_t c = 0; c < w_.k; c += kChunk) {
      const int64_t segment = first_segment + c / kSegment;
      if (!repeats) index = V::scale_index(static_cast<int>(segment & mask), shift);
      fn(c, static_cast<int>(min_i64(kChunk, w_.k - c) / 8),
         V::expand_scales(scales + ((segment >> shift) - first_block), index));
    }
  }

 private:
  float* buffer(int64_t row) const { return buffers_ + (row - begin_) % 2 * row_scales_floats<V>(w_.k); }

  const WeightView& w_;
  int64_t begin_, end_, next_ = -1;
  float* buffers_;
};

}  // namespace
}  // namespace qlora::cpu
