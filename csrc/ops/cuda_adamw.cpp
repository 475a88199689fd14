// adamw and adamw_8bit for CUDA: one launch each.
#include "ops/adamw_arguments.h"
#include "ops/cuda_ops.h"
#include "ops/cuda_runtime.h"

namespace qlora::ops {

void cuda_adamw(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, double lr, double beta1, double beta2,
                double eps, double weight_decay, int64_t step) {
  const Tensor g = as_contiguous(grad);
  const AdamWParams p = check_adamw(param, g, exp_avg, exp_avg_sq, {lr, beta1, beta2, eps, weight_decay, step});
  const GpuScope scope(param, "adamw", {0, p.numel, 0, 0});
  check(cuda::launch_adamw(p, scope.stream()), "adamw");
}

void cuda_adamw_8bit(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_absmax, Tensor exp_avg_sq,
                     Tensor exp_avg_sq_absmax, double lr, double beta1, double beta2, double eps, double weight_decay,
                     int64_t step) {
  const Tensor g = as_contiguous(grad);
  const AdamWParams p = check_adamw_8bit(param, g, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax,
                                         {lr, beta1, beta2, eps, weight_decay, step});
  const GpuScope scope(param, "adamw_8bit", {0, p.numel, 0, 0});
  check(cuda::launch_adamw(p, scope.stream()), "adamw_8bit");
}

}  // namespace qlora::ops
