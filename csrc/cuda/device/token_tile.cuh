// Copies tiles of tokens (rows of x or dy) through shared memory, 64 elements of the reduction at a time; they are the
// operand of the tensor cores that needs no unpacking.
#pragma once

#include "cuda/device/groups.cuh"
#include "cuda/device/unroll.cuh"
#include "format/common.h"

namespace qlora::cuda {

// Starts the pipeline that tiles share. fetch() starts the copies of one chunk for all tiles, or does nothing after the
// last chunk. Every chunk is one cp.async group.
template <int kStages, class Fetch>
QLORA_DEVICE void start_pipeline(const Fetch& fetch) {
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    fetch();
    ptx::cp_async_commit();
  }
}
// Waits until the next chunk has arrived for all threads of the group and starts copying one more. It contains a
// barrier, so all threads have finished with the previous chunk.
template <int kStages, class Group = WholeBlock, class Fetch>
QLORA_DEVICE void advance_pipeline(const Fetch& fetch) {
  ptx::cp_async_wait<kStages - 2>();
  Group::sync();
  fetch();
  ptx::cp_async_commit();
}

// The offset of a 16-byte piece in a tile of rows of 64 16-bit elements, eight pieces per row. The order of pieces
// varies from row to row to avoid bank conflicts for both readers of a tile: the lanes of a fragment (two rows, every
// second piece) and ldmatrix (eight rows, one piece).
QLORA_DEVICE SharedAddress swizzled(int row, int piece) {
  return static_cast<SharedAddress>(row * 128 + (piece ^ (row & 7)) * 16);
}

// The rows of a tile of kRows tokens that a thread copies: adjacent tokens or, with a plan, the tokens at the tile's
// positions; -1 if there is none.
template <int kRows, int kThreads>
struct TokenRows {
  static constexpr int kRowsAtOnce = kThreads / 8;
  int row[kRows / kRowsAtOnce];

  QLORA_METHOD void set(const int* order, int64_t m, int64_t first) {
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
      const int64_t at = first + i * kRowsAtOnce + ptx::thread() / 8;
      row[i] = order != nullptr ? ptx::load(order + at) : at < m ? static_cast<int>(at) : -1;
    }
  }

  // Starts copying 64 elements of each row, from first_elem on, of a matrix [., elems]; zeros outside the matrix.
  template <class T>
  QLORA_METHOD void fetch(SharedAddress to, const T* matrix, int64_t elems, int64_t first_elem) const {
    const int piece = ptx::thread() % 8;
    const int64_t elem = first_elem + piece * 8;
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
      const SharedAddress here = to + swizzled(ptx::thread() / 8, piece) + i * kRowsAtOnce * 128;
      if (row[i] >= 0 && elem < elems)
        ptx::cp_async_16(here, matrix + row[i] * elems + elem);
      else
        ptx::store_shared(here, Words4{0, 0, 0, 0});
    }
  }
};

// Addresses of the two halves of a lane's 16 elements, 16t … 16t + 15, of row g of a tile. The halves are adjacent, in
// either order.
struct Place {
  SharedAddress low, high;
};
QLORA_DEVICE Place place_in(SharedAddress tile) {
  const SharedAddress low = tile + swizzled(ptx::lane() / 4, ptx::lane() % 4 * 2);
  return {low, low ^ 16u};
}

// Loads the lane's elements of row 8 kGroup + g.
template <int kGroup>
QLORA_DEVICE void load_fragment(Place place, uint32_t (&words)[8]) {
  const auto low = ptx::load_shared<Words4, kGroup * 1024>(place.low);
  const auto high = ptx::load_shared<Words4, kGroup * 1024>(place.high);
  words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
  words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
}

// Stages of [kTokens][64] 16-bit elements, shared by a group of kThreads threads. Each of kGroups groups takes every
// kGroups-th chunk.
template <int kTokens, int kStages, int kThreads, int kGroups = 1>
class TokenTile {
 public:
  static constexpr int kStageBytes = kTokens * 128;
  static constexpr int kBytes = kStageBytes * kStages;

  // Reads the first row_elems elements of the rows of x [m, row_stride]; both must be multiples of 8. Rows and elements
  // beyond the end are zero. All threads of the group must call it.
  QLORA_METHOD TokenTile(SharedAddress base, const void* x, int64_t m, int64_t row_stride, int64_t row_elems,
                         int64_t first_token)
      : base_(base),
        left_(static_cast<int>(row_elems) - ptx::thread() % 8 * 8),
        chunks_left_(static_cast<int>(ceil_div(row_elems, 64))) {
    const int group = kGroups == 1 ? 0 : ptx::thread() / kThreads;
    const int row = ptx::thread() % kThreads / 8, piece = ptx::thread() % 8;
    left_ -= group * 64;
    chunks_left_ -= group;
    to_ = swizzled(row, piece);
    from_ = static_cast<const char*>(x) + (first_token + row) * row_stride * 2 + group * 128 + piece * 16;
    stride_ = kRowsAtOnce * row_stride * 2;
    copies_ = static_cast<int>(min_i64(kCopies, ceil_div(m - first_token - row, kRowsAtOnce)));
    full_ = first_token + kTokens <= m;
    for (int i = copies_ < 0 ? 0 : copies_; i < kCopies; ++i)
      for (int stage = 0; stage < kStages; ++stage)
        ptx::store_shared(base + stage * kStageBytes + to_ + i * (kRowsAtOnce * 128), Words4{0, 0, 0, 0});
    stage_ = base;
  }

  // Starts copying the next chunk, if there is one.
  QLORA_METHOD void fetch() {
    if (chunks_left_ > 0) copy();
    chunks_left_ -= kGroups;
    stage_ = stage_ + kStageBytes == base_ + kBytes ? base_ : stage_ + kStageBytes;
  }

  // The chunk to read now. The next fetch() overwrites its stage.
  QLORA_METHOD SharedAddress current() const { return stage_; }

 private:
  static constexpr int kRowsAtOnce = kThreads / 8;
  static constexpr int kCopies = kTokens / kRowsAtOnce;

  QLORA_METHOD void copy() {
    const char* from = from_;
    const SharedAddress to = stage_ + to_;
    if (left_ <= 0) {  // the piece lies beyond the end of the row
      for (int i = 0; i < kCopies; ++i) ptx::store_shared(to + i * (kRowsAtOnce * 128), Words4{0, 0, 0, 0});
    } else if (full_) {
      unroll<kCopies>([&](auto i) {
        ptx::cp_async_16<decltype(i)::value * kRowsAtOnce * 128>(to, from);
        from += stride_;
      });
    } else {
      for (int i = 0; i < copies_; ++i) ptx::cp_async_16(to + i * (kRowsAtOnce * 128), from + i * stride_);
    }
    from_ += kGroups * 128;
    left_ -= kGroups * 64;
  }

  SharedAddress base_, to_;
  SharedAddress stage_;  // filled by the next fetch(); after a fetch(), the stage to read
  int left_;             // elements of the row from the thread's piece on
  int chunks_left_, copies_;
  bool full_;
  int64_t stride_;
  const char* from_;
};

// The same for the rows that `rows` [kTokens] names, in any order; -1: zeros.
template <int kTokens, int kStages, int kThreads, int kGroups = 1>
class GatheredTile {
 public:
  static constexpr int kStageBytes = kTokens * 128;
  static constexpr int kBytes = kStageBytes * kStages;

  QLORA_METHOD GatheredTile(SharedAddress base, const void* x, const int* rows, int64_t row_elems)
      : base_(base),
        stage_(base),
        left_(static_cast<int>(row_elems) - ptx::thread() % 8 * 8),
        chunks_left_(static_cast<int>(ceil_div(row_elems, 64))),
        row_bytes_(static_cast<int>(row_elems * 2)) {
    const int group = kGroups == 1 ? 0 : ptx::thread() / kThreads;
    const int first = ptx::thread() % kThreads / 8, piece = ptx::thread() % 8;
    left_ -= group * 64;
    chunks_left_ -= group;
    to_ = swizzled(first, piece);
    from_ = static_cast<const char*>(x) + group * 128 + piece * 16;
    // The eight lanes that copy the pieces of the same rows hold one row each.
    row_ = piece < kCopies ? ptx::load(rows + first + piece * kRowsAtOnce) : -1;
    unroll<kCopies>([&](auto i) {
      constexpr int c = decltype(i)::value;
      if (row_of(c) >= 0) return;
      for (int stage = 0; stage < kStages; ++stage)
        ptx::store_shared(base + stage * kStageBytes + to_ + c * (kRowsAtOnce * 128), Words4{0, 0, 0, 0});
    });
  }

  QLORA_METHOD void fetch() {
    if (chunks_left_ > 0) copy();
    chunks_left_ -= kGroups;
    stage_ = stage_ + kStageBytes == base_ + kBytes ? base_ : stage_ + kStageBytes;
  }

  QLORA_METHOD SharedAddress current() const { return stage_; }

 private:
  static constexpr int kRowsAtOnce = kThreads / 8;
  static constexpr int kCopies = kTokens / kRowsAtOnce;
  static_assert(kCopies <= 8, "a lane holds one row");

  QLORA_METHOD int row_of(int copy) const { return ptx::shuffle(row_, ptx::lane() / 8 * 8 + copy); }

  QLORA_METHOD void copy() {
    const SharedAddress to = stage_ + to_;
    unroll<kCopies>([&](auto i) {
      constexpr int c = decltype(i)::value;
      const int row = row_of(c);
      if (left_ <= 0)  // the piece lies beyond the end of the row
        ptx::store_shared(to + c * (kRowsAtOnce * 128), Words4{0, 0, 0, 0});
      else if (row >= 0)
        ptx::cp_async_16<c * kRowsAtOnce * 128>(to, from_ + int64_t{row} * row_bytes_);
    });
    from_ += kGroups * 128;
    left_ -= kGroups * 64;
  }

  SharedAddress base_, to_, stage_;
  int left_, chunks_left_, row_bytes_;
  int row_;  // of the lane's copy
  const char* from_;
};

}  // namespace qlora::cuda
