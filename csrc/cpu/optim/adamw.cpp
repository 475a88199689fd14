// AdamW on the CPU: converts 256 elements at a time to float32, updates them and stores them back.
#include "cpu/optim/adamw.h"

#include <algorithm>

namespace qlora::cpu {
namespace {

void load(const void* data, DType dtype, int64_t first, int count, float* out) {
  for (int i = 0; i < count; ++i)
    out[i] = dtype == DType::kBFloat16  ? to_float(static_cast<const bf16*>(data)[first + i])
             : dtype == DType::kFloat16 ? to_float(static_cast<const fp16*>(data)[first + i])
                                        : static_cast<const float*>(data)[first + i];
}

void store(void* data, DType dtype, int64_t first, int count, const float* values) {
  for (int i = 0; i < count; ++i) {
    if (dtype == DType::kBFloat16)
      assign(static_cast<bf16*>(data)[first + i], values[i]);
    else if (dtype == DType::kFloat16)
      assign(static_cast<fp16*>(data)[first + i], values[i]);
    else
      static_cast<float*>(data)[first + i] = values[i];
  }
}

void update(const AdamWParams& p, int64_t first, int count, float* m, float* v) {
  float grad[kMomentBlock], param[kMomentBlock];
  load(p.grad, p.grad_dtype, first, count, grad);
  load(p.param, p.param_dtype, first, count, param);
  for (int i = 0; i < count; ++i) adamw_update(p.step, grad[i], param[i], m[i], v[i]);
  store(p.param, p.param_dtype, first, count, param);
}

int nearest_code(const DynamicMap& map, const DynamicCells& cells, float x) {
  const uint32_t bits = bits_of(x);
  const int code = cells.code[bits >> 31][dynamic_cell(bits)];
  return code + (code < kDynamicMapSize - 1 && x > map.threshold[code]);
}

float largest_magnitude(const float* x, int count) {
  float largest = 0.0f;
  for (int i = 0; i < count; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
  return largest;
}

}  // namespace

void adamw(const AdamWParams& p, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kMomentBlock)
    update(p, first, static_cast<int>(std::min<int64_t>(kMomentBlock, end - first)), p.exp_avg + first,
           p.exp_avg_sq + first);
}

void adamw_8bit(const AdamWParams& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kMomentBlock;
    const int count = static_cast<int>(std::min<int64_t>(kMomentBlock, p.numel - first));
    float m[kMomentBlock], v[kMomentBlock];
    for (int i = 0; i < count; ++i) {
      m[i] = kDynamicMap.value[p.codes[first + i]] * p.absmax[block];
      v[i] = kUnsignedDynamicMap.value[p.codes_sq[first + i]] * p.absmax_sq[block];
    }
    update(p, first, count, m, v);
    const float absmax = largest_magnitude(m, count), absmax_sq = largest_magnitude(v, count);
    p.absmax[block] = absmax;
    p.absmax_sq[block] = absmax_sq;
    for (int i = 0; i < count; ++i) {
      p.codes[first + i] =
          static_cast<uint8_t>(nearest_code(kDynamicMap, kDynamicCells, normalised_moment(m[i], absmax)));
      const int code = nearest_code(kUnsignedDynamicMap, kUnsignedDynamicCells, normalised_moment(v[i], absmax_sq));
      p.codes_sq[first + i] = static_cast<uint8_t>(code == 0 && v[i] > 0.0f ? 1 : code);
    }
  }
}

}  // namespace qlora::cpu
