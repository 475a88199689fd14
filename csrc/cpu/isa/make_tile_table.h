// Fills a table with the kernels on tiles of bfloat16; included once each by isa_amx.cpp and isa_avx512bf16.cpp.
#pragma once

#include "cpu/isa/make_table.h"
#include "cpu/tiles/backward_impl.h"
#include "cpu/tiles/forward_impl.h"

namespace qlora::cpu {
namespace {

constexpr TileKernels make_tile_kernels(int64_t gemv_tokens) {
  return TileKernels{gemv_tokens,
                     pack_factor,
                     forward_tokens,
                     forward_tokens_scratch,
                     forward_items,
                     forward_scratch,
                     forward,
                     backward_tokens,
                     backward_tokens_scratch,
                     backward_items,
                     backward_scratch,
                     backward,
                     pack_token_factor,
                     factor_grad,
                     factor_grad_scratch};
}

constexpr KernelTable make_tile_table(const char* isa, const TileKernels* tiles) {
  KernelTable t = make_table<VecAvx512>();
  t.isa = isa;
  t.tiles = tiles;
  return t;
}

}  // namespace
}  // namespace qlora::cpu
