// Fills a table with the kernels on tiles of bfloat16; included once each by isa_amx.cpp,
// isa_avx512bf16.cpp and isa_neonbf16.cpp.
#pragma once

#include "cpu/isa/make_table.h"
#include "cpu/tiles/backward_impl.h"
#include "cpu/tiles/forward_impl.h"

namespace qlora::cpu {
namespace {

constexpr TileKernels make_tile_kernels(int64_t gemv_tokens, int64_t grouped_adapters) {
  TileKernels t{};
  t.gemv_tokens = gemv_tokens;
  t.grouped_adapters = grouped_adapters;
  t.pack_factor = pack_factor;
  t.forward_tokens = forward_tokens;
  t.forward_tokens_scratch = forward_tokens_scratch;
  t.forward_items = forward_items;
  t.forward_scratch = forward_scratch;
  t.forward = forward;
  t.backward_tokens = backward_tokens;
  t.backward_tokens_scratch = backward_tokens_scratch;
  t.backward_items = backward_items;
  t.backward_scratch = backward_scratch;
  t.backward = backward;
  t.pack_token_factor = pack_token_factor;
  t.factor_grad = factor_grad;
  t.factor_grad_scratch = factor_grad_scratch;
  return t;
}

constexpr KernelTable make_tile_table(const char* isa, const TileKernels* tiles) {
  KernelTable t = make_table<Vec>();
  t.isa = isa;
  t.tiles = tiles;
  return t;
}

}  // namespace
}  // namespace qlora::cpu
