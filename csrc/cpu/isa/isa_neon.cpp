// The neon kernels: one translation unit, one ISA, one set of flags (CMakeLists.txt). Empty off 64-bit ARM.
#include "cpu/isa/table.h"

#if defined(__aarch64__)
#include "cpu/isa/make_table.h"
#include "cpu/isa/vec_neon.h"

namespace qlora::cpu {
namespace {
const KernelTable table = make_table<VecNeon>();
}
const KernelTable* const kNeonTable = &table;
}  // namespace qlora::cpu
#else
namespace qlora::cpu {
const KernelTable* const kNeonTable = nullptr;
}
#endif
