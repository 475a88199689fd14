// AdamW on the CPU: plain loops that the compiler vectorizes; a step reads and writes each moment once.
#pragma once

#include <cstdint>

#include "format/adamw.h"

namespace qlora::cpu {

// Elements [begin, end) with moments in float32; begin is a multiple of kMomentBlock.
void adamw(const AdamWParams& p, int64_t begin, int64_t end);
// Blocks [begin, end) with moments in 8 bit.
void adamw_8bit(const AdamWParams& p, int64_t begin, int64_t end);

}  // namespace qlora::cpu
