// Declarations of the CUDA ops, and their registration for a dispatch key.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/arguments.h"

namespace qlora::ops {

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_quantize(Tensor weight, std::string quant_type, int64_t block_size,
                                                         bool double_quant, bool check_finite);
Tensor cuda_dequantize(Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                       std::vector<int64_t> shape, std::string quant_type, int64_t block_size, ScalarType dtype);
Tensor cuda_quantization_error(Tensor weight, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                               OptionalTensor nested_offset, std::string quant_type, int64_t block_size);

Tensor cuda_forward(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                    std::vector<int64_t> shape, std::string quant_type, int64_t block_size, OptionalTensor lora_a,
                    OptionalTensor lora_b, double scaling, OptionalTensor bias, OptionalTensor lora_x);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cuda_backward(
    Tensor grad, Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
    std::vector<int64_t> shape, std::string quant_type, int64_t block_size, OptionalTensor lora_a,
    OptionalTensor lora_b, double scaling, OptionalTensor lora_x, bool needs_x, bool needs_lora, bool needs_lora_x,
    bool needs_bias);

Tensor cuda_forward_multi(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                          OptionalTensor nested_offset, std::vector<int64_t> shape, std::string quant_type,
                          int64_t block_size, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor adapter_of_row,
                          OptionalTensor bias);
std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_backward_multi(
    Tensor grad, Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
    std::vector<int64_t> shape, std::string quant_type, int64_t block_size, Tensor lora_a, Tensor lora_b,
    Tensor scaling, Tensor adapter_of_row, bool needs_x, bool needs_lora, bool needs_bias);

Tensor cuda_forward_affine(Tensor x, Tensor quantized_w, double scale, double zero_point, Tensor b, Tensor a,
                           double alpha);
Tensor cuda_forward_affine_grid(Tensor x, Tensor quantized_w, Tensor scale, Tensor zero_point, Tensor b, Tensor a,
                                double alpha);
std::tuple<Tensor, Tensor, Tensor> cuda_backward_affine_grid(Tensor grad, Tensor x, Tensor quantized_w, Tensor scale,
                                                             Tensor zero_point, Tensor b, Tensor a, double alpha,
                                                             bool needs_x, bool needs_lora);

void cuda_adamw(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, double lr, double beta1, double beta2,
                double eps, double weight_decay, int64_t step);
void cuda_adamw_8bit(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_absmax, Tensor exp_avg_sq,
                     Tensor exp_avg_sq_absmax, double lr, double beta1, double beta2, double eps, double weight_decay,
                     int64_t step);

void cuda_adamw_many(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                     std::vector<Tensor> exp_avg_sqs, double lr, double beta1, double beta2, double eps,
                     double weight_decay, std::vector<int64_t> steps);
void cuda_adamw_8bit_many(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                          std::vector<Tensor> exp_avg_absmaxs, std::vector<Tensor> exp_avg_sqs,
                          std::vector<Tensor> exp_avg_sq_absmaxs, double lr, double beta1, double beta2, double eps,
                          double weight_decay, std::vector<int64_t> steps);

// Registers all CUDA ops in `library`, the variable of a STABLE_TORCH_LIBRARY_IMPL block.
template <class Library>
void implement_cuda_ops(Library& library) {
  library.impl("quantize", TORCH_BOX(&cuda_quantize));
  library.impl("dequantize", TORCH_BOX(&cuda_dequantize));
  library.impl("quantization_error", TORCH_BOX(&cuda_quantization_error));
  library.impl("forward", TORCH_BOX(&cuda_forward));
  library.impl("backward", TORCH_BOX(&cuda_backward));
  library.impl("forward.multi", TORCH_BOX(&cuda_forward_multi));
  library.impl("backward.multi", TORCH_BOX(&cuda_backward_multi));
  library.impl("forward.affine", TORCH_BOX(&cuda_forward_affine));
  library.impl("forward.affine_grid", TORCH_BOX(&cuda_forward_affine_grid));
  library.impl("backward.affine_grid", TORCH_BOX(&cuda_backward_affine_grid));
  library.impl("adamw", TORCH_BOX(&cuda_adamw));
  library.impl("adamw_8bit", TORCH_BOX(&cuda_adamw_8bit));
  library.impl("adamw.many", TORCH_BOX(&cuda_adamw_many));
  library.impl("adamw_8bit.many", TORCH_BOX(&cuda_adamw_8bit_many));
}

}  // namespace qlora::ops
