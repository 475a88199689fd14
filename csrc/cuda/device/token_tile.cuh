// A tile of tokens on its way through shared memory, 64 elements of the reduction at a time: the B operand of the gemm
// kernels, for x in the forward and dy in the backward.
#pragma once

#include "cuda/device/ptx.cuh"
#include "format/common.h"

namespace qlora::cuda {

// Stages of [kTokens][64] 16-bit elements. A row of 128 bytes is eight pieces of 16; the odd rows have neighbouring
// pieces exchanged, so that the 8 lanes of a phase (2 rows, every second piece) read 32 different banks.
template <int kTokens, int kStages, int kThreads>
class TokenTile {
 public:
  static constexpr int kStageBytes = kTokens * 128;
  static constexpr int kBytes = kStageBytes * kStages;

  // All threads. x [m, row_elems]; tokens beyond the last one are the last one, whose results are not stored.
  QLORA_METHOD TokenTile(SharedAddress base, const void* x, int64_t m, int64_t row_elems, int64_t first_token,
                         int chunks)
      : base_(base), left_(chunks) {
    const int row = ptx::thread() / 8, piece = ptx::thread() % 8;
    to_ = row * 128 + (piece ^ (row & 1)) * 16;
    from_ = static_cast<const char*>(x) + min_i64(first_token + row, m - 1) * row_elems * 2 + piece * 16;
    stride_ = kRowsAtOnce * row_elems * 2;
    // From here on the thread's rows would lie beyond the last token; it copies its last one again.
    last_copy_ = static_cast<int>(min_i64(kCopies, ceil_div(m - first_token - row, kRowsAtOnce))) - 1;
    const int g = ptx::lane() / 4, t = ptx::lane() % 4;
    mine_ = g * 128 + (2 * t + (g & 1)) * 16;
    fill_ = read_ = base;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch();
  }

  // The next chunk, arrived for all threads, and one more on its way. Contains a barrier: whatever was read from the
  // chunk before is done with.
  QLORA_METHOD SharedAddress next() {
    ptx::cp_async_wait<kStages - 2>();
    ptx::sync_threads();
    fetch();
    const SharedAddress here = read_;
    read_ = advance(read_);
    return here;
  }

  // The words of token 8j + g at the lane's sixteen elements, 16t … 16t + 15.
  QLORA_METHOD void fragment(SharedAddress here, int j, uint32_t (&words)[8]) const {
    const auto low = ptx::load_shared<Words4>(here + mine_ + j * 1024);
    const auto high = ptx::load_shared<Words4>(((here + mine_) ^ 16u) + j * 1024);
    words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
    words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
  }

 private:
  static constexpr int kRowsAtOnce = kThreads / 8;
  static constexpr int kCopies = kTokens / kRowsAtOnce;

  QLORA_METHOD SharedAddress advance(SharedAddress stage) const {
    return stage + kStageBytes == base_ + kBytes ? base_ : stage + kStageBytes;
  }
  // Every call is one group, also where there is nothing left to copy.
  QLORA_METHOD void fetch() {
    if (left_ > 0) {
      const char* from = from_;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        ptx::cp_async_16(fill_ + to_ + i * (kRowsAtOnce * 128), from);
        from += i < last_copy_ ? stride_ : 0;
      }
      from_ += 128;
      fill_ = advance(fill_);
    }
    --left_;
    ptx::cp_async_commit();
  }

  SharedAddress base_, fill_, read_, to_, mine_;
  int left_, last_copy_;
  int64_t stride_;
  const char* from_;
};

}  // namespace qlora::cuda
