// Unpacks W into the A operand of the tensor cores without rearranging it, and keeps scales in shared memory.
//
// The order of k within 64 weights of a row is free if W and x use the same. Lane (g, t) = (lane / 4, lane % 4) takes
// k = 16t … 16t + 15 of its rows, 8 bytes, and step s of four multiplies k = 16t + 4s + {0, 1, 2, 3}. So neither W nor
// x is rearranged, and x is read 16 bytes at a time. The order of rows is free too: fragment f holds rows 2Rg + 2f and
// 2Rg + 2f + 1 instead of g and g + 8, so that the results of a lane are adjacent in memory.
#pragma once

#include "cuda/device/pair_table.cuh"
#include "cuda/device/scales.cuh"

namespace qlora::cuda {

inline constexpr int kChunk = 64;  // weights of a row that are unpacked together; they share a scale

// Unpacks the fragment of rows a and b for step kStep of a chunk.
template <class T, int kStep>
QLORA_DEVICE void unpack_step(const LevelPairs<T>& pairs, Words2 a, Words2 b, uint32_t (&fragment)[4]) {
  const uint32_t word_a = kStep < 2 ? a.x : a.y, word_b = kStep < 2 ? b.x : b.y;
  constexpr int kByte = kStep % 2 * 2;
  fragment[0] = pairs.template at<kByte>(word_a);
  fragment[1] = pairs.template at<kByte>(word_b);
  fragment[2] = pairs.template at<kByte + 1>(word_a);
  fragment[3] = pairs.template at<kByte + 1>(word_b);
}

constexpr int panel_bytes(int rows, int chunks) { return rows * (chunks | 1) * static_cast<int>(sizeof(float)); }

// The scales of kRows rows and `count` chunks in shared memory, [kRows][count | 1]. The pitch is odd so that eight rows
// lie in eight banks. Each of kWarps warps computes the scales of every kWarps-th row; its lanes take 32 adjacent
// chunks, first of all its rows, then the next 32. A lane loads kBatch scales before it uses them, so that their
// latencies overlap.
template <int kWarps, int kRows, int kBatch>
class ScalePanel {
 public:
  static_assert(kRows % kWarps == 0 && (kRows / kWarps % kBatch == 0 || kBatch % (kRows / kWarps) == 0),
                "a batch is whole rows, or whole chunks");
  QLORA_METHOD ScalePanel(SharedAddress base, int count) : base_(base), pitch_(count | 1) {}

  // Computes all scales of the panel; `factor` undoes level_multiplier. All threads must call it, then pass a barrier.
  QLORA_METHOD void fill(const WeightView& w, const WarpScales& scales, int64_t first_row, int first_chunk, int count,
                         float factor) const {
    if (scales.nested())
      fill_with(
          w, first_row, first_chunk, count, factor, [&](int64_t block) { return WarpScales::load_nested(w, block); },
          [&](RawScale one) { return scales.value_nested(one); });
    else
      fill_with(
          w, first_row, first_chunk, count, factor,
          [&](int64_t block) { return RawScale{ptx::load(w.absmax + block), 0}; },
          [](RawScale one) { return one.absmax; });
  }
  // The address of one scale; those of rows row and row + 1 are 4 * pitch() bytes apart.
  QLORA_METHOD SharedAddress address(int row, int chunk) const { return base_ + (row * pitch_ + chunk) * 4; }
  QLORA_METHOD int pitch() const { return pitch_; }

 private:
  static constexpr int kRowTurns = kRows / kWarps;
  static QLORA_METHOD int warp() { return ptx::warp() % kWarps; }

  // The row and the chunk of scale i of the batch that begins with scale `turn` of the lane.
  static QLORA_METHOD int row_of(int turn, int i) { return (turn + i) % kRowTurns * kWarps + warp(); }
  static QLORA_METHOD int chunk_of(int turn, int i) { return (turn + i) / kRowTurns * 32 + ptx::lane(); }

  template <class Load, class Value>
  QLORA_METHOD void fill_with(const WeightView& w, int64_t first_row, int first_chunk, int count, float factor,
                              const Load& load, const Value& value) const {
    const int shift = w.block_shift - 6, turns = (count + 31) / 32 * kRowTurns;
    const int64_t row_chunks = w.k / kChunk, last_row = (w.n - 1) * row_chunks;
#pragma unroll 1
    for (int turn = 0; turn < turns; turn += kBatch) {
      RawScale raw[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t row = min_i64((first_row + row_of(turn, i)) * row_chunks, last_row);
        const int chunk = chunk_of(turn, i);
        raw[i] = load((row + first_chunk + (chunk < count ? chunk : count - 1)) >> shift);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float scale = value(raw[i]);
        if (chunk_of(turn, i) < count) ptx::store_shared(address(row_of(turn, i), chunk_of(turn, i)), scale * factor);
      }
    }
  }

  SharedAddress base_;
  int pitch_;
};

}  // namespace qlora::cuda
