// The avx512 kernels: one translation unit, one ISA, one set of flags (CMakeLists.txt). Empty off x86-64.
#include "cpu/isa/table.h"

#if defined(__x86_64__)
#include "cpu/isa/make_table.h"
#include "cpu/isa/vec_avx512.h"

namespace qlora::cpu {
namespace {
const KernelTable table = make_table<VecAvx512>();
}
const KernelTable* const kAvx512Table = &table;
}  // namespace qlora::cpu
#else
namespace qlora::cpu {
const KernelTable* const kAvx512Table = nullptr;
}
#endif
