// The avx512bf16 kernels: those of avx512, and products of bfloat16 tokens by vdpbf16ps. One translation unit, one set
// of flags.
#include "cpu/kernel_table.h"

#if defined(__x86_64__)
#include "cpu/tile_table.h"

namespace qlora::cpu {
namespace {
// Tiles multiply 16 tokens where there are fewer: as much work as decoding four or five.
const Matmul16 matmul16 = make_matmul16(/*decode_tokens=*/4);
const KernelTable table = make_tile_table("avx512bf16", &matmul16);
}  // namespace
const KernelTable* const kAvx512Bf16Table = &table;
}  // namespace qlora::cpu
#else
namespace qlora::cpu {
const KernelTable* const kAvx512Bf16Table = nullptr;
}
#endif
