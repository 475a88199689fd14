// AdamW (Loshchilov and Hutter 2019): the update of one element, the same on every device, and its 8-bit moments.
// 8-bit moments are quantized in blocks of 256 with one absmax each. The first moment uses the signed dynamic map, the
// second the unsigned one (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").
#pragma once

#include <cmath>

#include "format/dtype.h"
#include "format/dynamic_map.h"
#include "format/half.h"

namespace qlora {

inline constexpr int kMomentBlock = 256;

// Constants of one step, derived from the hyperparameters; each is rounded once from double.
struct AdamWStep {
  float decay;            // 1 - lr * weight_decay
  float one_minus_beta1;  // the update is m + (1 - beta1) (g - m), so beta1 itself is not needed
  float beta2, one_minus_beta2;
  float step_size;        // lr / (1 - beta1^step)
  float root_correction;  // sqrt(1 - beta2^step)
  float eps;
};

inline AdamWStep make_adamw_step(double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  const double steps = static_cast<double>(step);
  return {static_cast<float>(1.0 - lr * weight_decay),
          static_cast<float>(1.0 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2),
          static_cast<float>(lr / (1.0 - std::pow(beta1, steps))),
          static_cast<float>(std::sqrt(1.0 - std::pow(beta2, steps))),
          static_cast<float>(eps)};
}

// One parameter and its state, in the memory of the device that updates it. The moments are float32 (exp_avg …) or
// 8-bit (codes …); the pointers of the unused form are null.
struct AdamWParams {
  void* param;  // [numel]
  DType param_dtype;
  const void* grad;  // [numel]
  DType grad_dtype;
  int64_t numel;
  AdamWStep step;
  float* exp_avg;     // [numel]
  float* exp_avg_sq;  // [numel]
  uint8_t* codes;     // [numel], first moments in the signed dynamic map
  float* absmax;      // [ceil(numel / kMomentBlock)]
  uint8_t* codes_sq;  // [numel], second moments in the unsigned dynamic map
  float* absmax_sq;   // [ceil(numel / kMomentBlock)]
};

// Every operation is rounded separately, so the result is bit-equal on every device.
QLORA_INLINE void adamw_update(const AdamWStep& s, float grad, float& param, float& m, float& v) {
  m = m + s.one_minus_beta1 * (grad - m);
  v = s.beta2 * v + s.one_minus_beta2 * grad * grad;
  const float denominator = sqrtf(v) / s.root_correction + s.eps;
  param = param * s.decay - s.step_size * (m / denominator);
}

// A moment divided by the absmax of its block.
QLORA_INLINE float normalised_moment(float moment, float absmax) {
  const float reciprocal = 1.0f / absmax;
  if ((bits_of(reciprocal) & 0x7F800000u) != 0x7F800000u) return moment * reciprocal;
  return absmax > 0.0f ? moment / absmax : 0.0f;  // absmax is subnormal or zero
}

}  // namespace qlora
