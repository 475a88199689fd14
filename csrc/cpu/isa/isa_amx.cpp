// The amx kernels: those of avx512, plus products of bfloat16 tokens on tiles. One translation unit, one set of flags.
#include "cpu/isa/table.h"

#if defined(__x86_64__)
#include "cpu/isa/make_tile_table.h"
#include "cpu/tiles/few_tokens_amx_impl.h"

namespace qlora::cpu {
namespace {
int64_t forward_items_amx(const ForwardTilesParams& p) { return has_few_tokens(p) ? few_items(p) : forward_items(p); }
int64_t forward_scratch_amx(const ForwardTilesParams& p) {
  return has_few_tokens(p) ? few_scratch(p) : forward_scratch(p);
}
void forward_amx(const ForwardTilesParams& p, int64_t begin, int64_t end, float* scratch) {
  has_few_tokens(p) ? forward_few(p, begin, end, scratch) : forward(p, begin, end, scratch);
}

constexpr TileKernels make_tile_kernels_amx() {
  // 4096 x 4096 on two Sapphire Rapids cores: `gemv` takes 0.45, 0.58, 1.1 ms for 1, 2, 4 tokens; tiles, which lower
  // the clock by a fifth, take 0.66 ms for each.
  // There a product of 64 tokens takes 1.3 ms and each adapter on tiles 0.06 ms; the float32 terms of 16 adapters take
  // 0.7 ms on a Zen 5 (not measured with AMX).
  TileKernels t = make_tile_kernels(/*gemv_tokens=*/2, /*grouped_adapters=*/12);
  t.forward_items = forward_items_amx;
  t.forward_scratch = forward_scratch_amx;
  t.forward = forward_amx;
  return t;
}
const TileKernels tiles = make_tile_kernels_amx();
const KernelTable table = make_tile_table("amx", &tiles);
}  // namespace
const KernelTable* const kAmxTable = &table;
}  // namespace qlora::cpu
#else
namespace qlora::cpu {
const KernelTable* const kAmxTable = nullptr;
}
#endif
