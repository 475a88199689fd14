// Host implementation of csrc/cuda/device/ptx.cuh: the same functions on fibers, written from the PTX manual's tables.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/device/types.h"
#include "simt.h"

#define QLORA_DEVICE [[maybe_unused]] static inline
#define QLORA_METHOD inline
#define QLORA_BOTH inline
#define QLORA_KERNEL __attribute__((visibility("default"), noinline))
#define QLORA_BOUNDS(threads, blocks_per_sm)
#define QLORA_PARAMS const
#define QLORA_TABLE static const

namespace qlora::cuda::ptx {

using std::fabs;
using std::fma;
using std::fmax;
using std::fmin;

QLORA_DEVICE int thread() { return simt::index().thread; }
QLORA_DEVICE int lane() { return simt::index().thread & 31; }
QLORA_DEVICE int warp() { return simt::index().thread >> 5; }
QLORA_DEVICE int threads() { return simt::index().threads; }
QLORA_DEVICE int block_x() { return static_cast<int>(simt::index().block[0]); }
QLORA_DEVICE int block_y() { return static_cast<int>(simt::index().block[1]); }
QLORA_DEVICE int block_z() { return static_cast<int>(simt::index().block[2]); }

QLORA_DEVICE void sync_threads() { simt::sync_threads(); }
template <int kThreads>
QLORA_DEVICE void sync_group(int group) {
  simt::sync_group(group, kThreads);
}
QLORA_DEVICE void sync_warp() {
  simt::collective("syncwarp", nullptr, [](void* const*) {});
}

template <class T>
QLORA_DEVICE T load(const T* p) {
  simt::global_read(p, sizeof(T));
  return *p;
}
template <class T>
QLORA_DEVICE void store(T* p, T value) {
  simt::global_write(p, sizeof(T));
  *p = value;
}
template <class T>
QLORA_DEVICE T load_once(const T* p) {
  return load(p);
}
QLORA_DEVICE void atomic_max(unsigned long long* p, unsigned long long value) {
  simt::global_write(p, sizeof *p);
  if (value > *p) *p = value;
}

QLORA_DEVICE SharedAddress shared_base() { return 0; }
template <class T, int kOffset = 0>
QLORA_DEVICE T load_shared(SharedAddress a) {
  T v;
  std::memcpy(&v, simt::shared_read(a + kOffset, sizeof v), sizeof v);
  return v;
}
template <class T>
QLORA_DEVICE void store_shared(SharedAddress a, T v) {
  simt::shared_write(a, &v, sizeof v);
}

template <int kOffset = 0>
QLORA_DEVICE void cp_async_16(SharedAddress to, const void* from) {
  simt::cp_async(to + kOffset, from);
}
QLORA_DEVICE void cp_async_commit() { simt::cp_async_commit(); }
template <int kPending>
QLORA_DEVICE void cp_async_wait() {
  simt::cp_async_wait(kPending);
}

namespace twin {
template <class T>
struct Exchange {
  T value;
  int from;
  T result;
};
template <class T>
T exchange(const char* place, T v, int from_lane) {
  Exchange<T> mine{v, from_lane & 31, v};
  simt::collective(place, &mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* lane = static_cast<Exchange<T>*>(lanes[i]);
      lane->result = static_cast<const Exchange<T>*>(lanes[lane->from])->value;
    }
  });
  return mine.result;
}
}  // namespace twin

template <class T>
QLORA_DEVICE T shuffle(T v, int from_lane) {
  return twin::exchange("shuffle", v, from_lane);
}
template <class T>
QLORA_DEVICE T shuffle_xor(T v, int mask) {
  return twin::exchange("shuffle_xor", v, lane() ^ mask);
}

QLORA_DEVICE uint32_t ballot(bool mine) {
  struct Vote {
    bool mine;
    uint32_t all;
  } vote{mine, 0};
  simt::collective("ballot", &vote, [](void* const* lanes) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= static_cast<uint32_t>(static_cast<Vote*>(lanes[i])->mine) << i;
    for (int i = 0; i < 32; ++i) static_cast<Vote*>(lanes[i])->all = all;
  });
  return vote.all;
}
template <class T>
QLORA_DEVICE bool can_run(int) {
  return true;
}

QLORA_DEVICE int popcount(uint32_t bits) { return __builtin_popcount(bits); }
QLORA_DEVICE int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

// PTX ISA, "ldmatrix": lane l holds row l % 8 of matrix l / 8.
namespace twin {
struct MatrixLane {
  uint16_t row[8];
  uint32_t result[4];
};
template <bool kTransposed>
void matrices_of_warp(void* const* lanes) {
  const auto element = [&](int matrix, int row, int col) -> uint32_t {
    return static_cast<const MatrixLane*>(lanes[8 * matrix + row])->row[col];
  };
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int g = l / 4, t = l % 4;
      static_cast<MatrixLane*>(lanes[l])->result[i] = kTransposed
                                                          ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16
                                                          : element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16;
    }
}
template <bool kTransposed>
void load_matrices(uint32_t (&m)[4], SharedAddress row) {
  MatrixLane mine{};
  std::memcpy(mine.row, simt::shared_read(row, 16), 16);
  simt::collective(kTransposed ? "ldmatrix.trans" : "ldmatrix", &mine, &matrices_of_warp<kTransposed>);
  for (int i = 0; i < 4; ++i) m[i] = mine.result[i];
}
}  // namespace twin

QLORA_DEVICE void load_matrices(uint32_t (&m)[4], SharedAddress row) { twin::load_matrices<false>(m, row); }
QLORA_DEVICE void load_matrices_transposed(uint32_t (&m)[4], SharedAddress row) { twin::load_matrices<true>(m, row); }

template <int kByte>
QLORA_DEVICE uint32_t byte_of(uint32_t word) {
  return word >> (8 * kByte) & 0xFFu;
}

QLORA_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) v |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7u)) & 0xFFu) << (8 * i);
  return v;
}

template <int kFactor>
QLORA_DEVICE uint32_t mad(uint32_t a, uint32_t c) {
  return a * kFactor + c;
}

template <class T>
QLORA_DEVICE uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(low).bits) | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
QLORA_DEVICE float unpack(uint32_t pair, int half) {
  return to_float(T{static_cast<uint16_t>(half == 0 ? pair : pair >> 16)});
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": the row and column of every element.
struct MmaLane {
  uint32_t a[4], b[2];
  float d[4];
};
QLORA_DEVICE int mma_a_row(int lane, int i) { return lane / 4 + (i == 2 || i == 3 || i == 6 || i == 7 ? 8 : 0); }
QLORA_DEVICE int mma_a_col(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0); }
QLORA_DEVICE int mma_b_row(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0); }
QLORA_DEVICE int mma_b_col(int lane, int) { return lane / 4; }
QLORA_DEVICE int mma_d_row(int lane, int i) { return lane / 4 + (i >= 2 ? 8 : 0); }
QLORA_DEVICE int mma_d_col(int lane, int i) { return lane % 4 * 2 + (i & 1); }

template <class T>
void mma_of_warp(void* const* lanes) {
  static float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto* lane = static_cast<const MmaLane*>(lanes[l]);
    for (int i = 0; i < 8; ++i) a[mma_a_row(l, i)][mma_a_col(l, i)] = unpack<T>(lane->a[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) b[mma_b_row(l, i)][mma_b_col(l, i)] = unpack<T>(lane->b[i / 2], i % 2);
  }
  for (int l = 0; l < 32; ++l) {
    auto* lane = static_cast<MmaLane*>(lanes[l]);
    for (int i = 0; i < 4; ++i) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[mma_d_row(l, i)][k] * b[k][mma_d_col(l, i)];
      lane->d[i] += sum;
    }
  }
}

template <class T>
QLORA_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  MmaLane mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  simt::count_mma();
  simt::collective("mma", &mine, &mma_of_warp<T>);
  for (int i = 0; i < 4; ++i) d[i] = mine.d[i];
}

}  // namespace qlora::cuda::ptx
