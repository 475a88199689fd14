// The avx512bf16 kernels: those of avx512, plus products of bfloat16 tokens with vdpbf16ps. One translation unit, one
// set of flags.
#include "cpu/isa/table.h"

#if defined(__x86_64__)
#include "cpu/isa/make_tile_table.h"

namespace qlora::cpu {
namespace {
// Tiles always multiply 16 tokens, which costs as much as `gemv` for four or five tokens.
// Two adapters on tiles are up to 8 % faster than grouped, four are as fast, sixteen take 1.3 to 2.8 times as long
// (Zen 5; 4096 x 4096 and 576 x 576, 16 to 512 tokens).
const TileKernels tiles = make_tile_kernels(/*gemv_tokens=*/4, /*grouped_adapters=*/4);
const KernelTable table = make_tile_table("avx512bf16", &tiles);
}  // namespace
const KernelTable* const kAvx512Bf16Table = &table;
}  // namespace qlora::cpu
#else
namespace qlora::cpu {
const KernelTable* const kAvx512Bf16Table = nullptr;
}
#endif
