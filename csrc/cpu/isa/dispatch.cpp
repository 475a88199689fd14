// Chooses the kernel table at run time.
#include "cpu/isa/dispatch.h"

#include <cstdlib>

namespace qlora::cpu {

const KernelTable* table_of(Isa isa) {
  static const Isa best = detect_isa();
  if (isa > best) return nullptr;
  const KernelTable* const avx2 = has_one_shuffle_port() ? kAvx2OneShufflePortTable : kAvx2Table;
  const KernelTable* const tables[kIsaCount] = {kScalarTable, avx2, kAvx512Table, kAvx512Bf16Table, kAmxTable};
  return tables[static_cast<int>(isa)];
}

const KernelTable* active_table(const char** bad_value) {
  static const Isa best = detect_isa(), preferred = preferred_isa();
  Isa isa = preferred;
  const char* cap = std::getenv(kIsaVariable);
  if (cap != nullptr && *cap != '\0') {
    Isa wanted;
    if (!parse_isa(cap, &wanted)) {
      *bad_value = cap;
      return nullptr;
    }
    isa = wanted <= best ? wanted : preferred;
  }
  return table_of(isa);
}

}  // namespace qlora::cpu
