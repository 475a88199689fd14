// The avx512bf16 kernels: those of avx512, plus products of bfloat16 tokens with vdpbf16ps. One translation unit, one
// set of flags.
#include "cpu/isa/table.h"

#if defined(__x86_64__)
#include "cpu/isa/make_tile_table.h"

namespace qlora::cpu {
namespace {
// Tiles always multiply 16 tokens, which costs as much as `gemv` for four or five tokens.
const TileKernels tiles = make_tile_kernels(/*gemv_tokens=*/4);
const KernelTable table = make_tile_table("avx512bf16", &tiles);
}  // namespace
const KernelTable* const kAvx512Bf16Table = &table;
}  // namespace qlora::cpu
#else
namespace qlora::cpu {
const KernelTable* const kAvx512Bf16Table = nullptr;
}
#endif
