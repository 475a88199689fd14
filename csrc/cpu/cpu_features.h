// What the processor and the operating system can run, as the kernels' levels.
#pragma once

namespace qlora::cpu {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
inline constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// Parses the name of a level; false if it is none.
bool parse_isa(const char* name, Isa* out);

// The best level that this machine runs: instruction set, and registers saved by the operating system.
Isa detect_isa();

// The level that is fastest here: the best one, but avx512 instead of avx512bf16 on Intel's processors, where vdpbf16ps
// runs at half the rate of float32 products (Sapphire Rapids: 2.2 cycles). Zen 4 and 5 run it at the full rate.
Isa preferred_isa();

}  // namespace qlora::cpu
