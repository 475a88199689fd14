// What the processor and the operating system can run, as the kernels' four levels.
#pragma once

namespace qlora::cpu {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };
inline constexpr int kIsaCount = 4;

const char* isa_name(Isa isa);

// Parses "scalar", "avx2", "avx512" or "amx"; false if it is none of them.
bool parse_isa(const char* name, Isa* out);

// The best level that this machine runs: instruction set, and registers saved by the operating system.
Isa detect_isa();

}  // namespace qlora::cpu
