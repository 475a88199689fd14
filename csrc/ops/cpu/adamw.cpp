// The ops adamw and adamw_8bit for the CPU: checks and parallel loops.
#include "cpu/optim/adamw.h"

#include <torch/csrc/stable/library.h>

#include "ops/adamw_arguments.h"
#include "ops/cpu/common.h"

namespace qlora::ops_cpu {
namespace {

constexpr int64_t kBlocksPerTask = 32;  // 8192 elements

void adamw(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, double lr, double beta1, double beta2,
           double eps, double weight_decay, int64_t step) {
  const Tensor g = as_contiguous(grad);
  const AdamWParams p = check_adamw(param, g, exp_avg, exp_avg_sq, {lr, beta1, beta2, eps, weight_decay, step});
  parallel(ceil_div(p.numel, kMomentBlock), kBlocksPerTask, [&](int64_t begin, int64_t end) {
    cpu::adamw(p, begin * kMomentBlock, std::min(end * kMomentBlock, p.numel));
  });
}

void adamw_8bit(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_absmax, Tensor exp_avg_sq,
                Tensor exp_avg_sq_absmax, double lr, double beta1, double beta2, double eps, double weight_decay,
                int64_t step) {
  const Tensor g = as_contiguous(grad);
  const AdamWParams p = check_adamw_8bit(param, g, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax,
                                         {lr, beta1, beta2, eps, weight_decay, step});
  parallel(ceil_div(p.numel, kMomentBlock), kBlocksPerTask,
           [&](int64_t begin, int64_t end) { cpu::adamw_8bit(p, begin, end); });
}

void adamw_many(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, double lr, double beta1, double beta2, double eps, double weight_decay,
                std::vector<int64_t> steps) {
  check_lists(params, steps, {&grads, &exp_avgs, &exp_avg_sqs});
  for (size_t i = 0; i < params.size(); ++i)
    adamw(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], lr, beta1, beta2, eps, weight_decay, steps[i]);
}

void adamw_8bit_many(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                     std::vector<Tensor> exp_avg_absmaxs, std::vector<Tensor> exp_avg_sqs,
                     std::vector<Tensor> exp_avg_sq_absmaxs, double lr, double beta1, double beta2, double eps,
                     double weight_decay, std::vector<int64_t> steps) {
  check_lists(params, steps, {&grads, &exp_avgs, &exp_avg_absmaxs, &exp_avg_sqs, &exp_avg_sq_absmaxs});
  for (size_t i = 0; i < params.size(); ++i)
    adamw_8bit(params[i], grads[i], exp_avgs[i], exp_avg_absmaxs[i], exp_avg_sqs[i], exp_avg_sq_absmaxs[i], lr, beta1,
               beta2, eps, weight_decay, steps[i]);
}

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("adamw", TORCH_BOX(&qlora::ops_cpu::adamw));
  m.impl("adamw_8bit", TORCH_BOX(&qlora::ops_cpu::adamw_8bit));
  m.impl("adamw.many", TORCH_BOX(&qlora::ops_cpu::adamw_many));
  m.impl("adamw_8bit.many", TORCH_BOX(&qlora::ops_cpu::adamw_8bit_many));
}
