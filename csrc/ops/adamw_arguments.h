// Checks of the arguments of optimizer steps, shared by all devices.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "format/adamw.h"
#include "ops/checks.h"

namespace qlora::ops {

struct Hyperparameters {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;
};

AdamWStep check_hyperparameters(const Hyperparameters& h);

// Checks that every list has one entry per parameter.
void check_lists(const std::vector<Tensor>& params, const std::vector<int64_t>& steps,
                 std::initializer_list<const std::vector<Tensor>*> others);

// Checks a tensor that is updated in place; it must be contiguous, because updates of a copy would be lost.
void check_flat(const Tensor& t, const char* name, int64_t numel, const Tensor& param);

AdamWParams check_param(const Tensor& param, const Tensor& grad, const Hyperparameters& h);

// `grad` must be contiguous and must live as long as the result, which points into it.
AdamWParams check_adamw(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                        const Hyperparameters& h);

AdamWParams check_adamw_8bit(const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
                             const Tensor& exp_avg_absmax, const Tensor& exp_avg_sq, const Tensor& exp_avg_sq_absmax,
                             const Hyperparameters& h);

}  // namespace qlora::ops
