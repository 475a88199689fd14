// Fills a table with the kernels of one vector type; included once by each isa_*.cpp.
#pragma once

#include "cpu/gemm/gemm_impl.h"
#include "cpu/gemv/gemv_impl.h"
#include "cpu/quantize/dequantize_impl.h"
#include "cpu/quantize/quantize_impl.h"

namespace qlora::cpu {
namespace {

template <class V>
constexpr KernelTable make_table() {
  return KernelTable{V::kIsa,       V::kLanes,       V::kLanes * V::kTileVecs,
                     quantize<V>,   dequantize<V>,   pack<V>,
                     gemm_items<V>, gemm_scratch<V>, gemm<V>,
                     pack_words<V>, gemv_scratch<V>, gemv<V>,
                     dot<V>,        nullptr};
}

}  // namespace
}  // namespace qlora::cpu
