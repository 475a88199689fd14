// The ops forward.affine and its backward for the CPU: integer weights with scale and zero point.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/cpu/common.h"
#include "ops/cpu/gemm.h"

namespace qlora::ops_cpu {
namespace {

cpu::Operand integers(const Affine& affine) {
  cpu::Operand operand;
  operand.dense = affine.quantized.const_data_ptr();
  operand.dtype = affine.dtype;
  operand.ld = affine.out;
  operand.affine = affine.grid;
  return operand;
}

Tensor forward_affine_grid(Tensor x, Tensor quantized_w, Tensor scale, Tensor zero_point, Tensor b, Tensor a,
                           double alpha) {
  const cpu::KernelTable& kernels = active_kernels();
  const Affine affine = check_affine(x, quantized_w, scale, zero_point, b, a, alpha);
  const Matrix& tokens = affine.tokens;
  const Columns columns = pack(kernels, tokens, StepsAre::kColumns);
  const Matrix x_down = low_rank_down(kernels, affine.b, Operands::kTransposed, columns, tokens.rows, affine.scaling);
  return sum_of_terms(kernels, Operands::kTransposed, affine.out, integers(affine), columns, affine.in,
                      {{&affine.a, &x_down}}, x);
}

Tensor forward_affine(Tensor x, Tensor quantized_w, double scale, double zero_point, Tensor b, Tensor a, double alpha) {
  Tensor scale_tensor = empty_cpu({1}, ScalarType::Float), zero_tensor = empty_cpu({1}, ScalarType::Float);
  *scale_tensor.mutable_data_ptr<float>() = static_cast<float>(scale);
  *zero_tensor.mutable_data_ptr<float>() = static_cast<float>(zero_point);
  return forward_affine_grid(x, quantized_w, scale_tensor, zero_tensor, b, a, alpha);
}

std::tuple<Tensor, Tensor, Tensor> backward_affine_grid(Tensor grad, Tensor x, Tensor quantized_w, Tensor scale,
                                                        Tensor zero_point, Tensor b, Tensor a, double alpha,
                                                        bool needs_x, bool needs_lora) {
  const cpu::KernelTable& kernels = active_kernels();
  const Affine affine = check_affine(x, quantized_w, scale, zero_point, b, a, alpha, values_if(needs_lora));
  const Matrix& tokens = affine.tokens;
  const Matrix dy = grad_matrix(grad, affine.out, tokens);
  Tensor d_x = nothing(), d_b = nothing(), d_a = nothing();
  const Columns dy_columns = pack(kernels, dy, StepsAre::kColumns);
  const Matrix dy_down = low_rank_down(kernels, affine.a, Operands::kAsStored, dy_columns, dy.rows, affine.scaling);
  if (needs_x)
    d_x = sum_of_terms(kernels, Operands::kAsStored, affine.in, integers(affine), dy_columns, affine.out,
                       {{&affine.b, &dy_down}}, x);
  if (needs_lora) {
    const Matrix x_down = low_rank_down(kernels, affine.b, Operands::kAsStored, tokens, affine.scaling);
    d_b = low_rank_grad(kernels, dy_down, tokens, b.scalar_type(), false);
    d_a = low_rank_grad(kernels, x_down, dy, a.scalar_type(), true);
  }
  return {d_x, d_b, d_a};
}

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("forward.affine", TORCH_BOX(&qlora::ops_cpu::forward_affine));
  m.impl("forward.affine_grid", TORCH_BOX(&qlora::ops_cpu::forward_affine_grid));
  m.impl("backward.affine_grid", TORCH_BOX(&qlora::ops_cpu::backward_affine_grid));
}
