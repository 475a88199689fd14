// Scales of many blocks, decoded by whole warps: the dynamic map lives in the registers of a warp, eight values a lane,
// and is read by shuffles. No table in memory, so no bank conflicts and no scattered sectors.
#pragma once

#include "cuda/device/elements.cuh"

namespace qlora::cuda {

class WarpScales {
 public:
  // Whole warps only, like every member.
  QLORA_METHOD explicit WarpScales(const Weight& w) {
    if (w.absmax != nullptr) return;
    offset_ = ptx::load(w.nested_offset);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) map_[i] = ptx::load(&kTables.dynamic.value[i * 32 + ptx::lane()]);
  }

  // The scale of a block of the lane's own choice; a lane with `valid` unset reads nothing and gets 0.
  QLORA_METHOD float of_block(const Weight& w, int64_t block, bool valid) const {
    if (w.absmax != nullptr) return valid ? ptx::load(w.absmax + block) : 0.0f;
    const int code = valid ? ptx::load(w.absmax_codes + block) : 0;
    const float nested = valid ? ptx::load(w.nested_absmax + (block >> kNestedBlockShift)) : 0.0f;
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float candidate = ptx::shuffle(map_[i], code & 31);
      value = code >> 5 == i ? candidate : value;
    }
    const float product = value * nested;  // two roundings, as the format says
    return valid ? product + offset_ : 0.0f;
  }

 private:
  static constexpr int kPerLane = kDynamicMapSize / 32;
  float offset_ = 0.0f;
  float map_[kPerLane] = {};
};

}  // namespace qlora::cuda
