// The kernels for any machine: one translation unit, one ISA, one set of flags.
#include "cpu/isa/make_table.h"
#include "cpu/isa/vec_scalar.h"

namespace qlora::cpu {
namespace {
const KernelTable table = make_table<VecScalar>();
}
const KernelTable* const kScalarTable = &table;
}  // namespace qlora::cpu
