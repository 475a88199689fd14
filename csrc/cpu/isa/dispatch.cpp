// Chooses the kernel table at run time.
#include "cpu/isa/dispatch.h"

#include <cstdlib>

namespace qlora::cpu {

const KernelTable* table_of(Isa isa) {
  static const Isa best = detect_isa();
  if (isa > best) return nullptr;
  const KernelTable* const avx2 = has_one_shuffle_port() ? kAvx2OneShufflePortTable : kAvx2Table;
  // Levels below `best` on another architecture's ladder have no table in this build.
  const KernelTable* const tables[kIsaCount] = {kScalarTable, avx2,       kAvx512Table,  kAvx512Bf16Table,
                                                kAmxTable,    kNeonTable, kNeonBf16Table};
  return tables[static_cast<int>(isa)];
}

const KernelTable* active_table(const char** bad_value) {
  static const Isa preferred = preferred_isa();
  const char* name = std::getenv(kIsaVariable);
  if (name == nullptr || *name == '\0') return table_of(preferred);
  Isa wanted;
  if (!parse_isa(name, &wanted)) {
    *bad_value = name;
    return nullptr;
  }
  const KernelTable* table = table_of(wanted);
  return table != nullptr ? table : table_of(preferred);
}

}  // namespace qlora::cpu
