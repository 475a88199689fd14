// Computes the scales of many blocks with whole warps. The dynamic map is kept in registers, four values per lane, and
// read by shuffles, which avoids bank conflicts and scattered loads of a table in memory.
#pragma once

#include "cuda/device/elements.cuh"

namespace qlora::cuda {

// A scale as stored in memory: absmax, or with double quantization the nested absmax and the code.
struct RawScale {
  float absmax;
  int code;
};

class WarpScales {
 public:
  // Whole warps must call this and every other member.
  QLORA_METHOD explicit WarpScales(const WeightView& w) : nested_(w.absmax == nullptr) {
    if (!nested_) return;
    offset_ = ptx::load(w.nested_offset);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      map_[i] = bits_of(ptx::load(&kTables.dynamic.value[kZero + i * 32 + ptx::lane()]));
  }

  // The scale of a block; each lane may pass a different one. Some 30 instructions with double quantization.
  QLORA_METHOD float of_block(const WeightView& w, int64_t block) const { return value(load(w, block)); }

  // The same in two steps, so that loads of several scales can overlap.
  QLORA_METHOD RawScale load(const WeightView& w, int64_t block) const {
    if (!nested_) return {ptx::load(w.absmax + block), 0};
    return load_nested(w, block);
  }
  QLORA_METHOD float value(RawScale raw) const { return nested_ ? value_nested(raw) : raw.absmax; }

  QLORA_METHOD bool nested() const { return nested_; }
  QLORA_METHOD static RawScale load_nested(const WeightView& w, int64_t block) {
    return {ptx::load(w.nested_absmax + (block >> kNestedBlockShift)), ptx::load(w.absmax_codes + block)};
  }
  QLORA_METHOD float value_nested(RawScale raw) const {
    // The map is symmetric around 0 except for the last value, 1, so registers hold only its non-negative half:
    // magnitudes 0 … 127; 128 stands for 1.
    const int code = raw.code - kZero;
    const int magnitude = code < 0 ? -code : code;
    uint32_t candidate[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) candidate[i] = ptx::shuffle(map_[i], magnitude);  // modulo 32
    const bool odd = (magnitude & 32) != 0;
    const uint32_t low = odd ? candidate[1] : candidate[0], high = odd ? candidate[3] : candidate[2];
    const uint32_t value = magnitude == 128 ? bits_of(1.0f) : magnitude >= 64 ? high : low;
    const float product = float_of(value | (code & 0x80000000u)) * raw.absmax;  // rounded before the addition
    return product + offset_;
  }

 private:
  static constexpr int kZero = kDynamicMapSize / 2 - 1;  // the code that stands for 0
  static constexpr int kPerLane = kDynamicMapSize / 64;
  static_assert(kDynamicMap.value[kZero] == 0.0f && kDynamicMap.value[kDynamicMapSize - 1] == 1.0f &&
                    kDynamicMap.value[kZero - 5] == -kDynamicMap.value[kZero + 5],
                "the map is odd about kZero");
  bool nested_;
  float offset_ = 0.0f;
  uint32_t map_[kPerLane] = {};  // float32 bits
};

}  // namespace qlora::cuda
