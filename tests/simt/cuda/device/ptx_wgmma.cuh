// Host implementation of csrc/cuda/device/ptx_wgmma.cuh: each warp computes the products of its 16 rows immediately.
// Only tests/ptx checks the fences, and that registers are not accessed while wgmma runs.
#pragma once

#include "cuda/device/ptx.cuh"

namespace qlora::cuda::ptx {

QLORA_DEVICE bool can_run_wgmma() { return true; }
QLORA_DEVICE void fence_shared_for_wgmma() {}
QLORA_DEVICE void wgmma_fence() { sync_warp(); }
QLORA_DEVICE void wgmma_commit() { sync_warp(); }
template <int kPending>
QLORA_DEVICE void wgmma_wait() {
  sync_warp();
}
template <int kPending, int kGroups>
QLORA_DEVICE void wgmma_wait(float (&)[kGroups][4]) {
  sync_warp();
}

// The descriptor, without its constant fields.
QLORA_DEVICE uint64_t wgmma_operand(SharedAddress address) { return address; }

template <int kGroups>
struct WgmmaLane {
  uint32_t a[4];
  uint64_t b;
  float d[kGroups][4];
};

// Element (k, column) of B, in row `column` of 128 bytes. Piece i of 16 bytes is stored at i XOR (row modulo 8).
template <class T>
float wgmma_b(uint64_t start, int k, int column) {
  const auto plain = static_cast<uint32_t>(start) + static_cast<uint32_t>(column * 128 + 2 * k);
  uint16_t bits;
  std::memcpy(&bits, simt::shared_read(plain ^ (plain >> 7 & 7u) << 4, 2), 2);
  return to_float(T{bits});
}

template <class T, int kGroups>
void wgmma_of_warp(void* const* lanes) {
  static float a[16][16];
  for (int l = 0; l < 32; ++l) {
    const auto* lane = static_cast<const WgmmaLane<kGroups>*>(lanes[l]);
    for (int i = 0; i < 8; ++i) a[mma_a_row(l, i)][mma_a_col(l, i)] = unpack<T>(lane->a[i / 2], i % 2);
  }
  const uint64_t start = static_cast<const WgmmaLane<kGroups>*>(lanes[0])->b;
  for (int column = 0; column < 8 * kGroups; ++column) {
    float b[16];
    for (int k = 0; k < 16; ++k) b[k] = wgmma_b<T>(start, k, column);
    for (int l = 0; l < 32; ++l) {
      auto* lane = static_cast<WgmmaLane<kGroups>*>(lanes[l]);
      for (int i = 0; i < 4; ++i) {
        if (mma_d_col(l, i) != column % 8) continue;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += a[mma_d_row(l, i)][k] * b[k];
        lane->d[column / 8][i] += sum;
      }
    }
  }
}

template <class T, int kGroups>
QLORA_DEVICE void wgmma(float (&d)[kGroups][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
  WgmmaLane<kGroups> mine{{a[0], a[1], a[2], a[3]}, b, {}};
  if (adds) std::memcpy(mine.d, d, sizeof mine.d);
  simt::count_mma();
  simt::collective("wgmma", &mine, &wgmma_of_warp<T, kGroups>);
  std::memcpy(d, mine.d, sizeof mine.d);
}

}  // namespace qlora::cuda::ptx
