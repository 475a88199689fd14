// The avx2 kernels: one translation unit, one ISA, one set of flags (CMakeLists.txt). Empty off x86-64. A second table
// unpacks weights in another way, for processors with one port for shuffles.
#include "cpu/isa/table.h"

#if defined(__x86_64__)
#include "cpu/isa/make_table.h"
#include "cpu/isa/vec_avx2.h"

namespace qlora::cpu {
namespace {
// Looks up exact levels by vpermps. That takes 8 shuffles for 32 weights, and by bytes 12, or 13 in order. Levels of
// bfloat16 take 4.
struct VecAvx2OneShufflePort : VecAvx2 {
  static constexpr bool kExactByPlanes = false, kHasRuns32 = false;
};

constexpr KernelTable make_one_shuffle_port_table() {
  KernelTable t = make_table<VecAvx2>();
  t.pack_words = pack_words<VecAvx2OneShufflePort>;
  t.gemv = gemv<VecAvx2OneShufflePort>;
  t.gemm = gemm<VecAvx2OneShufflePort>;
  t.dequantize = dequantize<VecAvx2OneShufflePort>;
  return t;
}

constexpr KernelTable table = make_table<VecAvx2>(), one_shuffle_port_table = make_one_shuffle_port_table();
}  // namespace
const KernelTable* const kAvx2Table = &table;
const KernelTable* const kAvx2OneShufflePortTable = &one_shuffle_port_table;
}  // namespace qlora::cpu
#else
namespace qlora::cpu {
const KernelTable* const kAvx2Table = nullptr;
const KernelTable* const kAvx2OneShufflePortTable = nullptr;
}  // namespace qlora::cpu
#endif
