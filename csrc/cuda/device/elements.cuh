// Loads and stores elements of any type as float32, and keeps the codebooks in device memory.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/launch.h"
#include "format/codebook.h"
#include "format/dynamic_map.h"

namespace qlora::cuda {

struct Tables {
  float levels[kQuantTypeCount][kLevels];  // [QuantType][code]
  DynamicMap dynamic;
};
constexpr Tables make_tables() {
  Tables t{};
  for (int type = 0; type < kQuantTypeCount; ++type)
    for (int code = 0; code < kLevels; ++code) t.levels[type][code] = codebook(static_cast<QuantType>(type))[code];
  t.dynamic = kDynamicMap;
  return t;
}
QLORA_TABLE Tables kTables = make_tables();

// a / b. A 64-bit division is a call of some 70 instructions, so 32-bit operands are divided in 32 bits.
QLORA_DEVICE int64_t divide(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

QLORA_DEVICE float load_as_float(const float* p) { return ptx::load(p); }
QLORA_DEVICE float load_as_float(const bf16* p) { return to_float(bf16{ptx::load(&p->bits)}); }
QLORA_DEVICE float load_as_float(const fp16* p) { return to_float(fp16{ptx::load(&p->bits)}); }

// Element i of an array whose type is known only at run time; all lanes take the same case.
QLORA_DEVICE float load_element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16:
      return load_as_float(static_cast<const bf16*>(data) + i);
    case DType::kFloat16:
      return load_as_float(static_cast<const fp16*>(data) + i);
    case DType::kInt8:
      return static_cast<float>(ptx::load(static_cast<const int8_t*>(data) + i));
    case DType::kUInt8:
      return static_cast<float>(ptx::load(static_cast<const uint8_t*>(data) + i));
    case DType::kInt16:
      return static_cast<float>(ptx::load(static_cast<const int16_t*>(data) + i));
    case DType::kInt32:
      return static_cast<float>(ptx::load(static_cast<const int32_t*>(data) + i));
    case DType::kInt64:
      return static_cast<float>(ptx::load(static_cast<const int64_t*>(data) + i));
    default:
      return load_as_float(static_cast<const float*>(data) + i);
  }
}

// Elements 8i … 8i + 7 of an array of any float type, aligned to 16 bytes.
QLORA_DEVICE void load_eight_elements(const void* data, DType dtype, int64_t i, float (&x)[8]) {
  if (dtype == DType::kFloat32) {
    const auto low = ptx::load(static_cast<const Floats4*>(data) + 2 * i);
    const auto high = ptx::load(static_cast<const Floats4*>(data) + 2 * i + 1);
    const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = all[e];
    return;
  }
  const auto words = ptx::load(static_cast<const Words4*>(data) + i);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int e = 0; e < 8; ++e)
    x[e] = dtype == DType::kBFloat16 ? ptx::unpack<bf16>(pairs[e / 2], e % 2) : ptx::unpack<fp16>(pairs[e / 2], e % 2);
}

// Elements 4i … 4i + 3 of such an array.
QLORA_DEVICE void load_four_elements(const void* data, DType dtype, int64_t i, float (&x)[4]) {
  if (dtype == DType::kFloat32) {
    const auto all = ptx::load(static_cast<const Floats4*>(data) + i);
    x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
    return;
  }
  const auto words = ptx::load(static_cast<const Words2*>(data) + i);
  const uint32_t pairs[2] = {words.x, words.y};
#pragma unroll
  for (int e = 0; e < 4; ++e)
    x[e] = dtype == DType::kBFloat16 ? ptx::unpack<bf16>(pairs[e / 2], e % 2) : ptx::unpack<fp16>(pairs[e / 2], e % 2);
}

QLORA_DEVICE void store_element(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::kBFloat16)
    ptx::store(&(static_cast<bf16*>(data) + i)->bits, from_float<bf16>(value).bits);
  else if (dtype == DType::kFloat16)
    ptx::store(&(static_cast<fp16*>(data) + i)->bits, from_float<fp16>(value).bits);
  else
    ptx::store(static_cast<float*>(data) + i, value);
}

// The scale of a block, computed by one lane. Product and sum are rounded separately: kernels are compiled without
// contraction.
QLORA_DEVICE float scale_at(const WeightView& w, int64_t block) {
  if (w.absmax != nullptr) return ptx::load(w.absmax + block);
  const float product = ptx::load(&kTables.dynamic.value[ptx::load(w.absmax_codes + block)]) *
                        ptx::load(w.nested_absmax + (block >> kNestedBlockShift));
  return product + ptx::load(w.nested_offset);
}

// One dequantized weight, in float32.
QLORA_DEVICE float weight_at(const WeightView& w, int64_t element) {
  const uint8_t byte = ptx::load(w.packed + (element >> 1));
  const int code = (element & 1) ? (byte & 0xF) : (byte >> 4);
  return ptx::load(&kTables.levels[static_cast<int>(w.quant_type)][code]) * scale_at(w, element >> w.block_shift);
}

}  // namespace qlora::cuda
