// The amx kernels: those of avx512, and products of bfloat16 tokens on tiles. One translation unit, one set of flags.
#include "cpu/kernel_table.h"

#if defined(__x86_64__)
#include "cpu/amx_backward_impl.h"
#include "cpu/amx_forward_impl.h"
#include "cpu/make_table.h"

namespace qlora::cpu {
namespace {
const Matmul16 matmul16 = {pack_factor,
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

constexpr KernelTable make_amx_table() {
  KernelTable t = make_table<VecAvx512>();
  t.isa = "amx";
  t.matmul16 = &matmul16;
  return t;
}
const KernelTable table = make_amx_table();
}  // namespace
const KernelTable* const kAmxTable = &table;
}  // namespace qlora::cpu
#else
namespace qlora::cpu {
const KernelTable* const kAmxTable = nullptr;
}
#endif
