// Declarations of the CUDA ops, and their registration for a dispatch key.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/arguments.h"

namespace qlora::ops_cuda {

using namespace ops;

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(Tensor weight, std::string quant_type, int64_t block_size,
                                                    bool double_quant, bool check_finite);
Tensor dequantize(Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                  std::vector<int64_t> shape, std::string quant_type, int64_t block_size, ScalarType dtype);
std::tuple<Tensor, Tensor, Tensor> search_scales(Tensor weight, Tensor importance, std::string quant_type,
                                                 int64_t block_size, bool double_quant);
Tensor quantize_with_feedback(Tensor weight, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                              std::string quant_type, int64_t block_size, OptionalTensor feedback,
                              OptionalTensor order);
Tensor quantization_error(Tensor weight, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                          OptionalTensor nested_offset, std::string quant_type, int64_t block_size);

Tensor forward(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
               std::vector<int64_t> shape, std::string quant_type, int64_t block_size, OptionalTensor lora_a,
               OptionalTensor lora_b, double scaling, OptionalTensor bias, OptionalTensor lora_x);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor packed, Tensor absmax,
                                                            OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                                            std::vector<int64_t> shape, std::string quant_type,
                                                            int64_t block_size, OptionalTensor lora_a,
                                                            OptionalTensor lora_b, double scaling,
                                                            OptionalTensor lora_x, bool needs_x, bool needs_lora,
                                                            bool needs_lora_x, bool needs_bias);

Tensor forward_multi(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                     std::vector<int64_t> shape, std::string quant_type, int64_t block_size, Tensor lora_a,
                     Tensor lora_b, Tensor scaling, Tensor adapter_of_row, OptionalTensor bias);
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_multi(Tensor grad, Tensor x, Tensor packed, Tensor absmax,
                                                          OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                                          std::vector<int64_t> shape, std::string quant_type,
                                                          int64_t block_size, Tensor lora_a, Tensor lora_b,
                                                          Tensor scaling, Tensor adapter_of_row, bool needs_x,
                                                          bool needs_lora, bool needs_bias);

std::vector<Tensor> forward_many(Tensor x, std::vector<Tensor> packed, std::vector<Tensor> absmax,
                                 std::vector<Tensor> nested_absmax, std::vector<Tensor> nested_offset,
                                 std::vector<int64_t> out_features, std::string quant_type, int64_t block_size,
                                 std::vector<Tensor> lora_a, std::vector<Tensor> lora_b, std::vector<double> scaling,
                                 std::vector<Tensor> bias);
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> backward_many(
    std::vector<Tensor> grad, Tensor x, std::vector<Tensor> packed, std::vector<Tensor> absmax,
    std::vector<Tensor> nested_absmax, std::vector<Tensor> nested_offset, std::vector<int64_t> out_features,
    std::string quant_type, int64_t block_size, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
    std::vector<double> scaling, bool needs_x, bool needs_lora, bool needs_bias);

Tensor forward_experts(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                       OptionalTensor nested_offset, std::vector<int64_t> shape, std::string quant_type,
                       int64_t block_size, Tensor expert_of_row, OptionalTensor lora_a, OptionalTensor lora_b,
                       double scaling, OptionalTensor bias);
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_experts(
    Tensor grad, Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
    std::vector<int64_t> shape, std::string quant_type, int64_t block_size, Tensor expert_of_row, OptionalTensor lora_a,
    OptionalTensor lora_b, double scaling, bool needs_x, bool needs_lora, bool needs_bias);

Tensor forward_affine(Tensor x, Tensor quantized_w, double scale, double zero_point, Tensor b, Tensor a, double alpha);
Tensor forward_affine_grid(Tensor x, Tensor quantized_w, Tensor scale, Tensor zero_point, Tensor b, Tensor a,
                           double alpha);
std::tuple<Tensor, Tensor, Tensor> backward_affine_grid(Tensor grad, Tensor x, Tensor quantized_w, Tensor scale,
                                                        Tensor zero_point, Tensor b, Tensor a, double alpha,
                                                        bool needs_x, bool needs_lora);

void adamw(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, double lr, double beta1, double beta2,
           double eps, double weight_decay, int64_t step);
void adamw_8bit(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_absmax, Tensor exp_avg_sq,
                Tensor exp_avg_sq_absmax, double lr, double beta1, double beta2, double eps, double weight_decay,
                int64_t step);

void adamw_many(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, double lr, double beta1, double beta2, double eps, double weight_decay,
                std::vector<int64_t> steps);
void adamw_8bit_many(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                     std::vector<Tensor> exp_avg_absmaxs, std::vector<Tensor> exp_avg_sqs,
                     std::vector<Tensor> exp_avg_sq_absmaxs, double lr, double beta1, double beta2, double eps,
                     double weight_decay, std::vector<int64_t> steps);

// Registers all CUDA ops in `library`, the variable of a STABLE_TORCH_LIBRARY_IMPL block.
template <class Library>
void implement_cuda_ops(Library& library) {
  library.impl("quantize", TORCH_BOX(&quantize));
  library.impl("dequantize", TORCH_BOX(&dequantize));
  library.impl("search_scales", TORCH_BOX(&search_scales));
  library.impl("quantize_with_feedback", TORCH_BOX(&quantize_with_feedback));
  library.impl("quantization_error", TORCH_BOX(&quantization_error));
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("backward", TORCH_BOX(&backward));
  library.impl("forward.multi", TORCH_BOX(&forward_multi));
  library.impl("backward.multi", TORCH_BOX(&backward_multi));
  library.impl("forward.many", TORCH_BOX(&forward_many));
  library.impl("backward.many", TORCH_BOX(&backward_many));
  library.impl("forward.experts", TORCH_BOX(&forward_experts));
  library.impl("backward.experts", TORCH_BOX(&backward_experts));
  library.impl("forward.affine", TORCH_BOX(&forward_affine));
  library.impl("forward.affine_grid", TORCH_BOX(&forward_affine_grid));
  library.impl("backward.affine_grid", TORCH_BOX(&backward_affine_grid));
  library.impl("adamw", TORCH_BOX(&adamw));
  library.impl("adamw_8bit", TORCH_BOX(&adamw_8bit));
  library.impl("adamw.many", TORCH_BOX(&adamw_many));
  library.impl("adamw_8bit.many", TORCH_BOX(&adamw_8bit_many));
}

}  // namespace qlora::ops_cuda
