// The instruction set levels of the CPU kernels, and detection of those that processor and operating system support.
#pragma once

namespace qlora::cpu {

// The levels of each architecture form a ladder: x86-64 has kScalar to kAmx, 64-bit ARM has kScalar, kNeon and
// kNeonBf16. A level includes those below it on its ladder.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4, kNeon = 5, kNeonBf16 = 6 };
inline constexpr int kIsaCount = 7;

const char* isa_name(Isa isa);

// Parses the name of a level; false if the name is unknown.
bool parse_isa(const char* name, Isa* out);

// The highest level this machine runs: the processor has the instructions and the operating system saves the registers.
Isa detect_isa();

// The fastest level on this machine: the highest one, except avx512 instead of avx512bf16 on Intel processors, where
// vdpbf16ps runs at half the rate of float32 products (Sapphire Rapids: 2.2 cycles). Zen 4 and 5 run it at full rate.
Isa preferred_isa();

// Whether one port of the processor executes all shuffles of 256 bits: Intel's before Ice Lake, which have no GFNI.
bool has_one_shuffle_port();

}  // namespace qlora::cpu
