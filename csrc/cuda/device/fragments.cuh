// The weight as the A operand of the tensor cores, decoded from global memory as it lies.
//
// The order of k inside 64 weights of a row is free as long as x uses the same: lane (g, t) = (lane / 4, lane % 4)
// takes k = 16t … 16t + 15 of its rows, 8 bytes, and step s of four multiplies k = 16t + 4s + {0, 1, 2, 3}. So neither
// W nor x is rearranged, and x is read 16 bytes at a time. The order of rows is free as well: fragment f holds rows 2Rg
// + 2f and 2Rg + 2f + 1 where the manual says g and g + 8, so that a lane's results are neighbours in memory.
#pragma once

#include "cuda/device/pair_table.cuh"
#include "cuda/device/scales.cuh"

namespace qlora::cuda {

inline constexpr int kChunk = 64;  // weights of a row that are decoded together; they share a scale

// Step s of a chunk: the fragment of rows a and b.
template <class T, int kStep>
QLORA_DEVICE void decode_step(const LevelPairs<T>& pairs, Words2 a, Words2 b, uint32_t (&fragment)[4]) {
  const uint32_t word_a = kStep < 2 ? a.x : a.y, word_b = kStep < 2 ? b.x : b.y;
  constexpr int kByte = kStep % 2 * 2;
  fragment[0] = pairs.template at<kByte>(word_a);
  fragment[1] = pairs.template at<kByte>(word_b);
  fragment[2] = pairs.template at<kByte + 1>(word_a);
  fragment[3] = pairs.template at<kByte + 1>(word_b);
}

// The scales of kRows rows and `count` chunks in shared memory, [kRows][count | 1]: an odd pitch, so that eight rows
// lie in eight banks. Each warp decodes whole rows, neighbouring lanes neighbouring scales.
class ScalePanel {
 public:
  QLORA_METHOD ScalePanel(SharedAddress base, int count) : base_(base), pitch_(count | 1) {}
  static QLORA_BOTH constexpr int bytes(int rows, int count) {
    return rows * (count | 1) * static_cast<int>(sizeof(float));
  }

  // All threads; a barrier has to follow. `factor` undoes level_multiplier. A warp loads kBatch scales a lane before it
  // decodes the first one: their latencies pass together, as far as there are registers.
  template <int kWarps, int kBatch = 4>
  QLORA_METHOD void fill(const Weight& w, const WarpScales& scales, int64_t first_row, int rows, int first_chunk,
                         int count, float factor) const {
    if (scales.nested())
      fill_rows<kWarps, kBatch>(
          w, first_row, rows, first_chunk, count, factor,
          [&](int64_t block) { return WarpScales::load_nested(w, block); },
          [&](RawScale raw) { return scales.value_nested(raw); });
    else
      fill_rows<kWarps, kBatch>(
          w, first_row, rows, first_chunk, count, factor,
          [&](int64_t block) { return RawScale{ptx::load(w.absmax + block), 0}; },
          [](RawScale raw) { return raw.absmax; });
  }
  // The scales of rows row and row + 1 lie 4 * pitch() bytes apart.
  QLORA_METHOD SharedAddress address(int row, int chunk) const { return base_ + (row * pitch_ + chunk) * 4; }
  QLORA_METHOD int pitch() const { return pitch_; }

 private:
  // Stretches of 32 chunks; within one the rows differ by a constant, so that a scale costs one addition of 64 bits.
  template <int kWarps, int kBatch, class Load, class Value>
  QLORA_METHOD void fill_rows(const Weight& w, int64_t first_row, int rows, int first_chunk, int count, float factor,
                              const Load& load, const Value& value) const {
    const int shift = w.block_shift - 6;
    const int64_t row_chunks = w.k / kChunk, last_row = (w.n - 1) * row_chunks;
    for (int c = ptx::lane(); c < count + ptx::lane(); c += 32) {
      const bool mine = c < count;
      const int64_t offset = first_chunk + (mine ? c : count - 1);
      int64_t row = (first_row + ptx::warp()) * row_chunks;
      SharedAddress to = base_ + (ptx::warp() * pitch_ + c) * 4;
#pragma unroll 1
      for (int r = ptx::warp(); r < rows; r += kBatch * kWarps) {
        RawScale raw[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          raw[i] = load((min_i64(row, last_row) + offset) >> shift);
          row += kWarps * row_chunks;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const float scale = value(raw[i]);
          if (mine && r + i * kWarps < rows) ptx::store_shared(to, scale * factor);
          to += kWarps * pitch_ * 4;
        }
      }
    }
  }

  SharedAddress base_;
  int pitch_;
};

}  // namespace qlora::cuda
