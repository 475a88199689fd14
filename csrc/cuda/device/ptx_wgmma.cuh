// The instructions of Hopper's asynchronous tensor cores, beside ptx.cuh; they exist on sm_90a alone. tests/simt has a
// checked host twin.
#pragma once

#include "cuda/device/ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QLORA_WGMMA
#endif

namespace qlora::cuda::ptx {

// Whether this code was compiled for a GPU that has them; elsewhere a kernel ends at once, and select.h never starts
// it.
QLORA_DEVICE bool can_run_wgmma() {
#ifdef QLORA_WGMMA
  return true;
#else
  __trap();
  return false;
#endif
}

// What this thread wrote to shared memory, by stores and by copies that it waited for, is seen by wgmma of those who
// meet it at a barrier.
QLORA_DEVICE void fence_shared_for_wgmma() {
#ifdef QLORA_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Rows of 64 16-bit elements in shared memory, laid out as swizzled() in token_tile.cuh does, from a multiple of 1024
// bytes on: the descriptor of the B operand of sixteen of them. `address` may be 32, 64 or 96 bytes into a row.
QLORA_DEVICE uint64_t wgmma_operand(SharedAddress address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32,
                     kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kEightRows | kUnused | (address & 0x3FFFFu) >> 4;
}

// Before the first wgmma, and before one whose registers something else has written.
QLORA_DEVICE void wgmma_fence() {
#ifdef QLORA_WGMMA
  __syncwarp();  // all lanes have to execute what follows together
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
QLORA_DEVICE void wgmma_commit() {
#ifdef QLORA_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Accumulators as operands of an instruction: those of eight columns, of 32, and the names of 16 and 32 of them.
#define QLORA_SUMS_8(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define QLORA_SUMS_32(d, j) QLORA_SUMS_8(d, j), QLORA_SUMS_8(d, j + 1), QLORA_SUMS_8(d, j + 2), QLORA_SUMS_8(d, j + 3)
#define QLORA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define QLORA_NAMES_32 QLORA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// shape, type: of the instruction; sums: names of the accumulators; a, b, adds: names of the operands behind them.
#define QLORA_WGMMA_TEXT(shape, type, sums, a, b, adds)                                                            \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type \
  " {" sums "}, {" a "}, " b ", adds, 1, 1, 0;\n}"
#define QLORA_WGMMA_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds))

// d[64, 8 kGroups] (+)= a[64, 16] b[16, 8 kGroups] by four warps, each with sixteen rows; registers as in mma(), d[j]
// for columns 8j …. Under way until wgmma_wait(): neither a nor d may be touched.
template <class T>
QLORA_DEVICE void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
#ifdef QLORA_WGMMA
#define QLORA_WGMMA_64(type) QLORA_WGMMA_TEXT("m64n64k16", type, QLORA_NAMES_32, "%32, %33, %34, %35", "%36", "%37")
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(QLORA_WGMMA_64("bf16") : QLORA_SUMS_32(d, 0), QLORA_SUMS_32(d, 4) : QLORA_WGMMA_INPUTS);
  else
    asm volatile(QLORA_WGMMA_64("f16") : QLORA_SUMS_32(d, 0), QLORA_SUMS_32(d, 4) : QLORA_WGMMA_INPUTS);
#endif
}
template <class T>
QLORA_DEVICE void wgmma(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
#ifdef QLORA_WGMMA
#define QLORA_WGMMA_32(type) QLORA_WGMMA_TEXT("m64n32k16", type, QLORA_NAMES_16, "%16, %17, %18, %19", "%20", "%21")
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(QLORA_WGMMA_32("bf16") : QLORA_SUMS_32(d, 0) : QLORA_WGMMA_INPUTS);
  else
    asm volatile(QLORA_WGMMA_32("f16") : QLORA_SUMS_32(d, 0) : QLORA_WGMMA_INPUTS);
#endif
}

// All but the last kPending committed groups are through. With d: it belongs to them, and may be read from here on.
template <int kPending>
QLORA_DEVICE void wgmma_wait() {
#ifdef QLORA_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}
template <int kPending>
QLORA_DEVICE void wgmma_wait(float (&d)[8][4]) {
#ifdef QLORA_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %32;"
               : QLORA_SUMS_32(d, 0), QLORA_SUMS_32(d, 4)
               : "n"(kPending)
               : "memory");
#endif
}
template <int kPending>
QLORA_DEVICE void wgmma_wait(float (&d)[4][4]) {
#ifdef QLORA_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %16;" : QLORA_SUMS_32(d, 0) : "n"(kPending) : "memory");
#endif
}

}  // namespace qlora::cuda::ptx
