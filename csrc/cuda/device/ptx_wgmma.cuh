// Wrappers of the instructions of Hopper's asynchronous tensor cores (wgmma), which exist only on sm_90a. tests/simt
// has a checked host implementation.
#pragma once

#include "cuda/device/ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QLORA_WGMMA
#endif

namespace qlora::cuda::ptx {

// Whether this code was compiled for a GPU with wgmma. Elsewhere it traps; select.h never starts such a kernel there.
QLORA_DEVICE bool can_run_wgmma() {
#ifdef QLORA_WGMMA
  return true;
#else
  __trap();
  return false;
#endif
}

// Makes shared memory written by this thread, by stores or by copies it waited for, visible to the wgmma instructions
// that other threads issue after the next barrier.
QLORA_DEVICE void fence_shared_for_wgmma() {
#ifdef QLORA_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The descriptor of a B operand: 16 elements of the reduction from rows of 64 16-bit elements in shared memory. The
// rows are laid out as by swizzled() in token_tile.cuh and start at a multiple of 1024 bytes. `address` is 0, 32, 64 or
// 96 bytes into the first row.
QLORA_DEVICE uint64_t wgmma_operand(SharedAddress address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32,
                     kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kEightRows | kUnused | (address & 0x3FFFFu) >> 4;
}

// Required before the first wgmma, and before a wgmma whose registers other instructions have written.
QLORA_DEVICE void wgmma_fence() {
#ifdef QLORA_WGMMA
  __syncwarp();  // all lanes must execute the following instructions together
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
QLORA_DEVICE void wgmma_commit() {
#ifdef QLORA_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Macros for inline assembly: accumulators of 8 and 32 columns as operands, and the names of 16 and 32 operands.
#define QLORA_SUMS_8(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define QLORA_SUMS_32(d, j) QLORA_SUMS_8(d, j), QLORA_SUMS_8(d, j + 1), QLORA_SUMS_8(d, j + 2), QLORA_SUMS_8(d, j + 3)
#define QLORA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define QLORA_NAMES_32 QLORA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// The text of a wgmma: shape and type of the instruction; names of the accumulators (sums) and of the operands a, b and
// adds.
#define QLORA_WGMMA_TEXT(shape, type, sums, a, b, adds)                                                            \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type \
  " {" sums "}, {" a "}, " b ", adds, 1, 1, 0;\n}"
#define QLORA_WGMMA_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds))

// d = a[64, 16] b[16, 8 groups], plus d if `adds`, by four warps with 16 rows each. Registers as in mma(); d[j] holds
// columns 8j … 8j + 7. It runs asynchronously: neither a nor d may be accessed before wgmma_wait().
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

// Waits until all but the last kPending committed groups are complete. The forms with d make it readable afterwards; d
// must belong to a completed group.
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
