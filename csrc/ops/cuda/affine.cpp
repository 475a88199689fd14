// The ops forward.affine and its backward for CUDA: integer weights with scale and zero point.
#include "ops/cuda/ops.h"
#include "ops/cuda/products.h"

namespace qlora::ops_cuda {
namespace {

// A product with quantized_W [in, out] as operand, reduced over its rows (in) or its columns (out).
cuda::GeneralParams integers(const Affine& affine, bool steps_are_in, const Matrix& columns) {
  cuda::GeneralParams p;
  p.operand = {affine.quantized.const_data_ptr(), affine.dtype, steps_are_in ? 1 : affine.out,
               steps_are_in ? affine.out : 1};
  p.affine = affine.grid;
  p.affine_rows_are_channels = steps_are_in;
  p.steps = steps_are_in ? affine.in : affine.out;
  p.columns = rows_of(columns);
  return p;
}

}  // namespace

Tensor forward_affine_grid(Tensor x, Tensor quantized_w, Tensor scale, Tensor zero_point, Tensor b, Tensor a,
                           double alpha) {
  const Affine affine = check_affine(x, quantized_w, scale, zero_point, b, a, alpha);
  const GpuScope scope(x, "forward.affine", {affine.tokens.rows, affine.out, affine.in, affine.r});
  const AdapterActivation x_down =
      token_dot(affine.tokens, b_factor(affine.b), affine.r, affine.scaling, scope.stream());
  const AdapterTerm up{a_factor(affine.a), &affine.a, &x_down};
  return general_product(integers(affine, true, affine.tokens), &up, nullptr, x, affine.out, scope.stream());
}

Tensor forward_affine(Tensor x, Tensor quantized_w, double scale, double zero_point, Tensor b, Tensor a, double alpha) {
  const auto number = [&](double value) {
    Tensor t = empty_like_device(x, {1}, ScalarType::Float);
    torch::stable::fill_(t, value);
    return t;
  };
  return forward_affine_grid(x, quantized_w, number(scale), number(zero_point), b, a, alpha);
}

std::tuple<Tensor, Tensor, Tensor> backward_affine_grid(Tensor grad, Tensor x, Tensor quantized_w, Tensor scale,
                                                        Tensor zero_point, Tensor b, Tensor a, double alpha,
                                                        bool needs_x, bool needs_lora) {
  const Affine affine = check_affine(x, quantized_w, scale, zero_point, b, a, alpha, values_if(needs_lora));
  const Matrix dy = grad_matrix(grad, affine.out, affine.tokens);
  const GpuScope scope(x, "backward.affine", {affine.tokens.rows, affine.out, affine.in, affine.r});
  const cudaStream_t stream = scope.stream();
  Tensor d_x = nothing(x), d_b = nothing(x), d_a = nothing(x);
  const AdapterActivation dy_down = token_dot(dy, a_factor(affine.a), affine.r, affine.scaling, stream);
  if (needs_x) {
    const AdapterTerm down{b_factor(affine.b), &affine.b, &dy_down};
    d_x = general_product(integers(affine, false, dy), &down, nullptr, x, affine.in, stream);
  }
  if (needs_lora) {
    const AdapterActivation x_down = token_dot(affine.tokens, b_factor(affine.b), affine.r, affine.scaling, stream);
    d_b = empty_of_shape(b);
    d_a = empty_of_shape(a);
    low_rank_grad_general(dy_down.values, affine.tokens, false, d_b, stream);
    low_rank_grad_general(x_down.values, dy, true, d_a, stream);
  }
  return {d_x, d_b, d_a};
}

}  // namespace qlora::ops_cuda
