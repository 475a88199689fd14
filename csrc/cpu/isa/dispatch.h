// Choice of the kernel table: the fastest level of the machine, or the level that QLORA_CPU_ISA names.
#pragma once

#include "cpu/isa/features.h"
#include "cpu/isa/table.h"

namespace qlora::cpu {

inline constexpr const char* kIsaVariable = "QLORA_CPU_ISA";
inline constexpr const char* kIsaChoices = "scalar, avx2, avx512, avx512bf16, amx, neon or neonbf16";  // for messages

// Reads the variable at every call, so that one process can compare levels. If the variable names no level, `bad_value`
// receives its text and the result is null. A level that this machine does not run is ignored.
const KernelTable* active_table(const char** bad_value);

// The table of a level, or null if this build or machine cannot run it.
const KernelTable* table_of(Isa isa);

}  // namespace qlora::cpu
