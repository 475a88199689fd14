// Wrappers of GPU instructions, one function each. Kernels access memory, other lanes and the tensor cores only through
// this file, so that tests/simt can replace it with a checked host implementation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device/types.h"

#define QLORA_DEVICE static __device__ __forceinline__
#define QLORA_METHOD __device__ __forceinline__
#define QLORA_BOTH __host__ __device__ __forceinline__
#define QLORA_KERNEL __global__
#define QLORA_BOUNDS(threads, blocks_per_sm) __launch_bounds__(threads, blocks_per_sm)
#define QLORA_PARAMS const __grid_constant__
#define QLORA_TABLE static __device__ const

namespace qlora::cuda::ptx {

// ---- indices ----

QLORA_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
QLORA_DEVICE int lane() { return static_cast<int>(threadIdx.x & 31u); }
QLORA_DEVICE int warp() { return static_cast<int>(threadIdx.x >> 5); }
QLORA_DEVICE int threads() { return static_cast<int>(blockDim.x); }
QLORA_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
QLORA_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
QLORA_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

// ---- barriers ----

QLORA_DEVICE void sync_threads() { __syncthreads(); }
QLORA_DEVICE void sync_warp() { __syncwarp(); }
// Barrier of a group of kThreads adjacent threads (whole warps); at most 15 groups per block.
template <int kThreads>
QLORA_DEVICE void sync_group(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kThreads) : "memory");
}

// ---- global memory ----

template <class T>
QLORA_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
QLORA_DEVICE void store(T* p, T value) {
  *p = value;
}

// Written in PTX, because nvcc stores the members of a struct one by one unless its vectorizer merges the stores.
QLORA_DEVICE void store(Words4* p, Words4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
QLORA_DEVICE void store(Words2* p, Words2 v) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
QLORA_DEVICE void store(Floats2* p, Floats2 v) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(v.x), "f"(v.y) : "memory");
}
QLORA_DEVICE void store(Floats4* p, Floats4 v) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// For weights, which are read once: they must not evict x and the scales from L1.
QLORA_DEVICE uint32_t load_once(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
QLORA_DEVICE Words2 load_once(const Words2* p) {
  Words2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// Only for integers, whose maximum does not depend on the order of the threads.
QLORA_DEVICE void atomic_max(unsigned long long* p, unsigned long long value) { atomicMax(p, value); }

// ---- shared memory: byte addresses in the block's window ----

QLORA_DEVICE SharedAddress shared_base() {
  extern __shared__ __align__(1024) unsigned char qlora_dynamic_shared[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(qlora_dynamic_shared));
}

// kOffset is a constant byte offset that is encoded in the instruction.
template <int kOffset>
QLORA_DEVICE void load_shared(uint32_t& v, SharedAddress a) {
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(a), "n"(kOffset));
}
template <int kOffset>
QLORA_DEVICE void load_shared(float& v, SharedAddress a) {
  asm volatile("ld.shared.f32 %0, [%1 + %2];" : "=f"(v) : "r"(a), "n"(kOffset));
}
template <int kOffset>
QLORA_DEVICE void load_shared(double& v, SharedAddress a) {
  asm volatile("ld.shared.f64 %0, [%1 + %2];" : "=d"(v) : "r"(a), "n"(kOffset));
}
template <int kOffset>
QLORA_DEVICE void load_shared(uint16_t& v, SharedAddress a) {
  asm volatile("ld.shared.u16 %0, [%1 + %2];" : "=h"(v) : "r"(a), "n"(kOffset));
}
template <int kOffset>
QLORA_DEVICE void load_shared(uint8_t& v, SharedAddress a) {
  uint32_t wide;
  asm volatile("ld.shared.u8 %0, [%1 + %2];" : "=r"(wide) : "r"(a), "n"(kOffset));
  v = static_cast<uint8_t>(wide);
}
template <int kOffset>
QLORA_DEVICE void load_shared(Words2& v, SharedAddress a) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];" : "=r"(v.x), "=r"(v.y) : "r"(a), "n"(kOffset));
}
template <int kOffset>
QLORA_DEVICE void load_shared(Floats2& v, SharedAddress a) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];" : "=f"(v.x), "=f"(v.y) : "r"(a), "n"(kOffset));
}
template <int kOffset>
QLORA_DEVICE void load_shared(Words4& v, SharedAddress a) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(a), "n"(kOffset));
}
template <int kOffset>
QLORA_DEVICE void load_shared(Floats4& v, SharedAddress a) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(a), "n"(kOffset));
}
template <class T, int kOffset = 0>
QLORA_DEVICE T load_shared(SharedAddress a) {
  T v;
  load_shared<kOffset>(v, a);
  return v;
}

QLORA_DEVICE void store_shared(SharedAddress a, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(v));
}
QLORA_DEVICE void store_shared(SharedAddress a, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(v)); }
QLORA_DEVICE void store_shared(SharedAddress a, double v) { asm volatile("st.shared.f64 [%0], %1;" ::"r"(a), "d"(v)); }
QLORA_DEVICE void store_shared(SharedAddress a, Floats2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(a), "f"(v.x), "f"(v.y));
}
QLORA_DEVICE void store_shared(SharedAddress a, Floats4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(a), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w));
}
QLORA_DEVICE void store_shared(SharedAddress a, Words2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(a), "r"(v.x), "r"(v.y));
}
QLORA_DEVICE void store_shared(SharedAddress a, Words4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
}

// Loads four 8 x 8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8 and receives
// elements (g, 2t) and (g, 2t + 1) of each matrix, with g = lane / 4 and t = lane % 4; if transposed, (2t, g) and
// (2t + 1, g).
QLORA_DEVICE void load_matrices(uint32_t (&m)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row));
}
QLORA_DEVICE void load_matrices_transposed(uint32_t (&m)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row));
}

// Copies 16 bytes from global memory to shared memory at `to` + kOffset; cp_async_wait() completes the copy.
template <int kOffset = 0>
QLORA_DEVICE void cp_async_16(SharedAddress to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0 + %1], [%2], 16;" ::"r"(to), "n"(kOffset), "l"(from));
#else
  store_shared(to + kOffset, *static_cast<const Words4*>(from));
#endif
}
QLORA_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}
template <int kPending>
QLORA_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- other lanes of the warp ----

// Written in PTX, because the intrinsics add a move for each operand.
QLORA_DEVICE uint32_t shuffle(uint32_t v, int from_lane) {
  uint32_t result;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xFFFFFFFF;" : "=r"(result) : "r"(v), "r"(from_lane));
  return result;
}
QLORA_DEVICE int shuffle(int v, int from_lane) {
  return static_cast<int>(shuffle(static_cast<uint32_t>(v), from_lane));
}
QLORA_DEVICE float shuffle(float v, int from_lane) {
  float result;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xFFFFFFFF;" : "=f"(result) : "f"(v), "r"(from_lane));
  return result;
}
QLORA_DEVICE uint32_t shuffle_xor(uint32_t v, int mask) {
  uint32_t result;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xFFFFFFFF;" : "=r"(result) : "r"(v), "r"(mask));
  return result;
}
QLORA_DEVICE int shuffle_xor(int v, int mask) { return static_cast<int>(shuffle_xor(static_cast<uint32_t>(v), mask)); }
QLORA_DEVICE float shuffle_xor(float v, int mask) {
  float result;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xFFFFFFFF;" : "=f"(result) : "f"(v), "r"(mask));
  return result;
}
QLORA_DEVICE double shuffle_xor(double v, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, v, mask); }

// Bit l is set if `mine` is true in lane l.
QLORA_DEVICE uint32_t ballot(bool mine) { return __ballot_sync(0xFFFFFFFFu, mine); }

// ---- arithmetic ----

QLORA_DEVICE int popcount(uint32_t bits) { return __popc(bits); }
QLORA_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }  // bits != 0

// Byte kByte of a word, zero-extended.
template <int kByte>
QLORA_DEVICE uint32_t byte_of(uint32_t word) {
  uint32_t v;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(v) : "r"(word), "n"(0x4440 | kByte));
  return v;
}

// Selects four of eight bytes, numbered 0 … 3 in a and 4 … 7 in b: hex digit i of the selector chooses byte i.
QLORA_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(selector));
  return v;
}

// a * kFactor + c in one instruction; nvcc would generate a shift and an addition.
template <int kFactor>
QLORA_DEVICE uint32_t mad(uint32_t a, uint32_t c) {
  uint32_t v;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "n"(kFactor), "r"(c));
  return v;
}

// Rounds two floats to nearest even and packs them, `low` in the lower half.
template <class T>
QLORA_DEVICE uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
#else
  return static_cast<uint32_t>(from_float<bf16>(low).bits) | static_cast<uint32_t>(from_float<bf16>(high).bits) << 16;
#endif
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
#else
  uint16_t l, h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
  return static_cast<uint32_t>(l) | static_cast<uint32_t>(h) << 16;
#endif
}

// Converts one half of a pair to float32, exactly.
template <class T>
QLORA_DEVICE float unpack(uint32_t pair, int half);
template <>
__device__ __forceinline__ float unpack<bf16>(uint32_t pair, int half) {
  return float_of(half == 0 ? pair << 16 : pair & 0xFFFF0000u);
}
template <>
__device__ __forceinline__ float unpack<fp16>(uint32_t pair, int half) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(static_cast<uint16_t>(half == 0 ? pair : pair >> 16)));
  return v;
}

// ---- tensor cores ----

// Whether this GPU can run a kernel with operands T and this much shared memory. Turing has no bfloat16 tensor cores
// and 64 KiB of shared memory; kernels that select.h never chooses there compile to almost nothing.
template <class T>
QLORA_DEVICE bool can_run(int shared_bytes) {
#if __CUDA_ARCH__ >= 800
  return true;
#else
  if (std::is_same_v<T, fp16> && shared_bytes <= 64 * 1024) return true;
  __trap();
  return false;
#endif
}

// d[16, 8] = a[16, 16] b[16, 8] + c[16, 8] with float32 accumulation; c may be d. With g = lane / 4 and t = lane % 4, a
// lane holds these elements, where a and b hold pairs along the reduction, the lower half first:
// a[0] = (g, 2t), a[1] = (g + 8, 2t), a[2] = (g, 2t + 8), a[3] = (g + 8, 2t + 8); b[0] = (2t, g), b[1] = (2t + 8, g);
// d[0], d[1] = (g, 2t), (g, 2t + 1); d[2], d[3] = (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
QLORA_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]);
template <>
__device__ __forceinline__ void mma<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                          const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, "
      "%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
template <>
__device__ __forceinline__ void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                          const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
      "%12, "
      "%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  // Turing has no bfloat16 tensor cores; can_run() ends such kernels.
#endif
}

}  // namespace qlora::cuda::ptx
