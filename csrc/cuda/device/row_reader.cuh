// Loads packed rows of W from global memory into registers.
#pragma once

#include "cuda/device/fragments.cuh"
#include "format/common.h"

namespace qlora::cuda {

// Loads a lane's packed bytes of its 2R rows, from every kStep-th chunk.
template <int R, int kStep>
class RowReader {
 public:
  QLORA_METHOD RowReader(const WeightView& w, int64_t first_row, int first_chunk) {
    const int64_t row = min_i64(first_row + ptx::lane() / 4 * 2 * R, w.n - 1);
    at_ = w.packed + row * (w.k / 2) + first_chunk * (kChunk / 2) + ptx::lane() % 4 * 8;
    row_bytes_ = static_cast<int>(w.k / 2);
    last_ = static_cast<int>(min_i64(2 * R - 1, w.n - 1 - row));  // rows beyond the end repeat the last row
  }
  QLORA_METHOD void next(Words2 (&raw)[2 * R]) {
    const uint8_t* row = at_;
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
      raw[i] = ptx::load_once(reinterpret_cast<const Words2*>(row));
      row += i < last_ ? row_bytes_ : 0;
    }
    at_ += kStep * (kChunk / 2);
  }

 private:
  const uint8_t* at_;
  int row_bytes_, last_;
};

}  // namespace qlora::cuda
