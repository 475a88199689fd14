// Which kernel table runs: the best level of the machine, capped by QLORA_CPU_ISA.
#pragma once

#include "cpu/cpu_features.h"
#include "cpu/kernel_table.h"

namespace qlora::cpu {

inline constexpr const char* kIsaVariable = "QLORA_CPU_ISA";
inline constexpr const char* kIsaChoices = "scalar, avx2, avx512 or amx";  // for messages

// The variable is read at every call, so that one process can compare levels. `bad_value` receives the variable's text
// if it names no level; the result is then null. A cap above the machine's level is no error: it caps nothing.
const KernelTable* active_table(const char** bad_value);

// The level's table, or null where this build or machine cannot run it.
const KernelTable* table_of(Isa isa);

}  // namespace qlora::cpu
