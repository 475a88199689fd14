// Splits a thread block into groups of threads that each take a share of the reduction. While one group waits for
// loads another multiplies, and all groups share the tables in shared memory.
#pragma once

#include "cuda/device/ptx.cuh"

namespace qlora::cuda {

struct WholeBlock {
  static QLORA_METHOD void sync() { ptx::sync_threads(); }
};

// kGroups groups of kThreads threads; each group has its own barrier.
template <int kGroups, int kThreads>
struct Groups {
  static QLORA_METHOD int index() { return kGroups == 1 ? 0 : ptx::thread() / kThreads; }
  static QLORA_METHOD int thread() { return kGroups == 1 ? ptx::thread() : ptx::thread() % kThreads; }
  static QLORA_METHOD int warp() { return kGroups == 1 ? ptx::warp() : ptx::warp() % (kThreads / 32); }
  static QLORA_METHOD void sync() {
    if constexpr (kGroups == 1)
      ptx::sync_threads();
    else
      ptx::sync_group<kThreads>(index());
  }

  // Adds the sums of all groups to those of the first group, in order of the groups. `base` points to sum_bytes() bytes
  // of shared memory that nothing else uses once all threads have called this. Returns true for the first group.
  template <int kOuter, int kInner>
  static QLORA_METHOD bool add_up(SharedAddress base, float (&sum)[kOuter][kInner][4]) {
    if constexpr (kGroups > 1) {
      constexpr int kPitch = kThreads * 16;  // adjacent threads store adjacent words
      constexpr int kGroupBytes = kThreads * kOuter * kInner * 16;
      const SharedAddress mine = base + thread() * 16;
      ptx::sync_threads();
      if (index() > 0) {
#pragma unroll
        for (int i = 0; i < kOuter; ++i)
#pragma unroll
          for (int j = 0; j < kInner; ++j)
            ptx::store_shared(mine + (index() - 1) * kGroupBytes + (i * kInner + j) * kPitch,
                              Floats4{sum[i][j][0], sum[i][j][1], sum[i][j][2], sum[i][j][3]});
      }
      ptx::sync_threads();
      if (index() > 0) return false;
#pragma unroll
      for (int group = 0; group < kGroups - 1; ++group)
#pragma unroll
        for (int i = 0; i < kOuter; ++i)
#pragma unroll
          for (int j = 0; j < kInner; ++j) {
            const auto other = ptx::load_shared<Floats4>(mine + group * kGroupBytes + (i * kInner + j) * kPitch);
            sum[i][j][0] += other.x;
            sum[i][j][1] += other.y;
            sum[i][j][2] += other.z;
            sum[i][j][3] += other.w;
          }
    }
    return true;
  }
  // Bytes that add_up() needs for `values` floats per thread.
  static constexpr int sum_bytes(int values) { return (kGroups - 1) * kThreads * values * 4; }
};

}  // namespace qlora::cuda
