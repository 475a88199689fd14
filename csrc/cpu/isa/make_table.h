// Fills a table with the kernels of one vector type; included once by each isa_*.cpp.
#pragma once

#include "cpu/gemm/gemm_impl.h"
#include "cpu/gemv/gemv_impl.h"
#include "cpu/quantize/dequantize_impl.h"
#include "cpu/quantize/feedback_impl.h"
#include "cpu/quantize/quantize_impl.h"
#include "cpu/quantize/search_scales_impl.h"

namespace qlora::cpu {
namespace {

template <class V>
constexpr KernelTable make_table() {
  KernelTable t{};
  t.isa = V::kIsa;
  t.lanes = V::kLanes;
  t.tile_cols = V::kLanes * V::kTileVecs;
  t.quantize = quantize<V>;
  t.search_scales = search_scales<V>;
  t.feedback_scratch = feedback_scratch<V>;
  t.quantize_with_feedback = quantize_with_feedback<V>;
  t.dequantize = dequantize<V>;
  t.pack = pack<V>;
  t.gemm_items = gemm_items<V>;
  t.gemm_scratch = gemm_scratch<V>;
  t.gemm = gemm<V>;
  t.pack_words = pack_words<V>;
  t.gemv_scratch = gemv_scratch<V>;
  t.gemv = gemv<V>;
  t.dot = dot<V>;
  return t;
}

}  // namespace
}  // namespace qlora::cpu
