// The ops adamw and adamw_8bit for CUDA: one launch for up to sixteen parameters.
#include "ops/adamw_arguments.h"
#include "ops/cuda/ops.h"
#include "ops/cuda/runtime.h"

namespace qlora::ops_cuda {

namespace {

constexpr int64_t kLarge = int64_t{1} << 20;  // parameters with more elements get their own launch

// Collects updates and launches them sixteen at a time. Every parameter of a launch gets as many thread blocks as the
// largest needs, so large parameters are launched alone.
class Updates {
 public:
  Updates(const Tensor& like, const char* op) : op_(op), scope_(like, op, {}) {}

  // Keeps `grad` alive until the launch.
  void add(const AdamWParams& p, Tensor grad) {
    if (p.numel == 0) return;
    if (p.numel > kLarge) launch();
    jobs_.job[jobs_.count++] = p;
    grads_.push_back(std::move(grad));
    if (jobs_.count == cuda::kMostUpdates || p.numel > kLarge) launch();
  }
  void launch() {
    if (jobs_.count > 0) check(cuda::launch_adamw(jobs_, scope_.stream()), op_);
    jobs_.count = 0;
    grads_.clear();
  }

 private:
  const char* op_;
  GpuScope scope_;
  cuda::AdamWJobs jobs_{};
  std::vector<Tensor> grads_;
};

}  // namespace

void adamw(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, double lr, double beta1, double beta2,
           double eps, double weight_decay, int64_t step) {
  adamw_many({param}, {grad}, {exp_avg}, {exp_avg_sq}, lr, beta1, beta2, eps, weight_decay, {step});
}

void adamw_8bit(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_absmax, Tensor exp_avg_sq,
                Tensor exp_avg_sq_absmax, double lr, double beta1, double beta2, double eps, double weight_decay,
                int64_t step) {
  adamw_8bit_many({param}, {grad}, {exp_avg}, {exp_avg_absmax}, {exp_avg_sq}, {exp_avg_sq_absmax}, lr, beta1, beta2,
                  eps, weight_decay, {step});
}

void adamw_many(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, double lr, double beta1, double beta2, double eps, double weight_decay,
                std::vector<int64_t> steps) {
  check_lists(params, steps, {&grads, &exp_avgs, &exp_avg_sqs});
  if (params.empty()) return;
  Updates updates(params[0], "adamw");
  for (size_t i = 0; i < params.size(); ++i) {
    check_same_device(params[i], "a parameter", params[0], "the first one");
    const Tensor grad = as_contiguous(grads[i]);
    updates.add(
        check_adamw(params[i], grad, exp_avgs[i], exp_avg_sqs[i], {lr, beta1, beta2, eps, weight_decay, steps[i]}),
        grad);
  }
  updates.launch();
}

void adamw_8bit_many(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                     std::vector<Tensor> exp_avg_absmaxs, std::vector<Tensor> exp_avg_sqs,
                     std::vector<Tensor> exp_avg_sq_absmaxs, double lr, double beta1, double beta2, double eps,
                     double weight_decay, std::vector<int64_t> steps) {
  check_lists(params, steps, {&grads, &exp_avgs, &exp_avg_absmaxs, &exp_avg_sqs, &exp_avg_sq_absmaxs});
  if (params.empty()) return;
  Updates updates(params[0], "adamw_8bit");
  for (size_t i = 0; i < params.size(); ++i) {
    check_same_device(params[i], "a parameter", params[0], "the first one");
    const Tensor grad = as_contiguous(grads[i]);
    updates.add(check_adamw_8bit(params[i], grad, exp_avgs[i], exp_avg_absmaxs[i], exp_avg_sqs[i],
                                 exp_avg_sq_absmaxs[i], {lr, beta1, beta2, eps, weight_decay, steps[i]}),
                grad);
  }
  updates.launch();
}

}  // namespace qlora::ops_cuda
