// Checks of the arguments of optimizer steps, shared by all devices.
#include "ops/adamw_arguments.h"

namespace qlora::ops {

AdamWStep check_hyperparameters(const Hyperparameters& h) {
  STD_TORCH_CHECK(h.lr >= 0.0, "lr=", h.lr, " must not be negative");
  STD_TORCH_CHECK(h.beta1 >= 0.0 && h.beta1 < 1.0, "beta1=", h.beta1, " must be in [0, 1)");
  STD_TORCH_CHECK(h.beta2 >= 0.0 && h.beta2 < 1.0, "beta2=", h.beta2, " must be in [0, 1)");
  STD_TORCH_CHECK(h.eps >= 0.0, "eps=", h.eps, " must not be negative");
  STD_TORCH_CHECK(h.weight_decay >= 0.0, "weight_decay=", h.weight_decay, " must not be negative");
  STD_TORCH_CHECK(h.step >= 1, "step=", h.step, ": the first step is 1");
  return make_adamw_step(h.lr, h.beta1, h.beta2, h.eps, h.weight_decay, h.step);
}

void check_lists(const std::vector<Tensor>& params, const std::vector<int64_t>& steps,
                 std::initializer_list<const std::vector<Tensor>*> others) {
  bool agree = steps.size() == params.size();
  for (const auto* list : others) agree = agree && list->size() == params.size();
  STD_TORCH_CHECK(agree, "there are ", params.size(), " parameters: every list must have as many tensors, and steps");
}

void check_flat(const Tensor& t, const char* name, int64_t numel, const Tensor& param) {
  check_same_device(t, name, param, "param");
  STD_TORCH_CHECK(t.is_contiguous(), name, " is not contiguous: it is updated where it lies");
  STD_TORCH_CHECK(t.numel() == numel, name, " has ", t.numel(), " elements: it must have ", numel);
}

AdamWParams check_param(const Tensor& param, const Tensor& grad, const Hyperparameters& h) {
  check_flat(param, "param", param.numel(), param);
  check_same_device(grad, "grad", param, "param");
  STD_TORCH_CHECK(text_of(grad.sizes()) == text_of(param.sizes()), "grad has shape ", text_of(grad.sizes()),
                  ": it must be that of param, ", text_of(param.sizes()));
  AdamWParams p{};
  p.param = param.mutable_data_ptr();
  p.param_dtype = float_dtype(param.scalar_type(), "param");
  p.grad = grad.const_data_ptr();
  p.grad_dtype = float_dtype(grad.scalar_type(), "grad");
  p.numel = param.numel();
  p.step = check_hyperparameters(h);
  return p;
}

AdamWParams check_adamw(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                        const Hyperparameters& h) {
  AdamWParams p = check_param(param, grad, h);
  check_flat(exp_avg, "exp_avg", p.numel, param);
  check_flat(exp_avg_sq, "exp_avg_sq", p.numel, param);
  check_dtype(exp_avg, ScalarType::Float, "exp_avg", "it must be float32");
  check_dtype(exp_avg_sq, ScalarType::Float, "exp_avg_sq", "it must be float32");
  p.exp_avg = exp_avg.mutable_data_ptr<float>();
  p.exp_avg_sq = exp_avg_sq.mutable_data_ptr<float>();
  return p;
}

AdamWParams check_adamw_8bit(const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
                             const Tensor& exp_avg_absmax, const Tensor& exp_avg_sq, const Tensor& exp_avg_sq_absmax,
                             const Hyperparameters& h) {
  AdamWParams p = check_param(param, grad, h);
  const int64_t blocks = ceil_div(p.numel, kMomentBlock);
  check_flat(exp_avg, "exp_avg", p.numel, param);
  check_flat(exp_avg_absmax, "exp_avg_absmax", blocks, param);
  check_flat(exp_avg_sq, "exp_avg_sq", p.numel, param);
  check_flat(exp_avg_sq_absmax, "exp_avg_sq_absmax", blocks, param);
  check_dtype(exp_avg, ScalarType::Byte, "exp_avg", "it must be uint8");
  check_dtype(exp_avg_sq, ScalarType::Byte, "exp_avg_sq", "it must be uint8");
  check_dtype(exp_avg_absmax, ScalarType::Float, "exp_avg_absmax", "it must be float32");
  check_dtype(exp_avg_sq_absmax, ScalarType::Float, "exp_avg_sq_absmax", "it must be float32");
  p.codes = exp_avg.mutable_data_ptr<uint8_t>();
  p.absmax = exp_avg_absmax.mutable_data_ptr<float>();
  p.codes_sq = exp_avg_sq.mutable_data_ptr<uint8_t>();
  p.absmax_sq = exp_avg_sq_absmax.mutable_data_ptr<float>();
  return p;
}

}  // namespace qlora::ops
