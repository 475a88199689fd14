// The neonbf16 kernels: those of neon, plus products of bfloat16 tokens with bfmmla. One translation unit, one set of
// flags.
#include "cpu/isa/table.h"

#if defined(__aarch64__)
#include "cpu/isa/make_tile_table.h"

namespace qlora::cpu {
namespace {
// Not measured. For 64 weights of a row `gemv` takes about 115, 150, 200 and 230 instructions for one to four tokens,
// tiles 180 for up to 16. The number of adapters is that of avx512bf16.
const TileKernels tiles = make_tile_kernels(/*gemv_tokens=*/2, /*grouped_adapters=*/4);
const KernelTable table = make_tile_table("neonbf16", &tiles);
}  // namespace
const KernelTable* const kNeonBf16Table = &table;
}  // namespace qlora::cpu
#else
namespace qlora::cpu {
const KernelTable* const kNeonBf16Table = nullptr;
}
#endif
