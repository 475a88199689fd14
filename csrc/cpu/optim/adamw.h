// AdamW on the CPU: plain loops that the compiler vectorizes. A step reads and writes each moment once.
#pragma once

#include <cstdint>

#include "format/adamw.h"

namespace qlora::cpu {

// Updates elements [begin, end) with float32 moments; begin is a multiple of kMomentBlock.
void adamw(const AdamWParams& p, int64_t begin, int64_t end);
// Updates blocks [begin, end) with 8-bit moments.
void adamw_8bit(const AdamWParams& p, int64_t begin, int64_t end);

}  // namespace qlora::cpu
