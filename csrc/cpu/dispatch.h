// Which kernel table runs: the level that is fastest on the machine, or the one that QLORA_CPU_ISA names.
#pragma once

#include "cpu/cpu_features.h"
#include "cpu/kernel_table.h"

namespace qlora::cpu {

inline constexpr const char* kIsaVariable = "QLORA_CPU_ISA";
inline constexpr const char* kIsaChoices = "scalar, avx2, avx512, avx512bf16 or amx";  // for messages

// The variable is read at every call, so that one process can compare levels. `bad_value` receives the variable's text
// if it names no level; the result is then null. A cap above the machine's level is no error: it caps nothing.
const KernelTable* active_table(const char** bad_value);

// The level's table, or null where this build or machine cannot run it.
const KernelTable* table_of(Isa isa);

}  // namespace qlora::cpu
