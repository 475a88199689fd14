// forward and backward for CUDA: select.h says which kernels, this file allocates and launches them.
#include "ops/cuda_ops.h"
#include "ops/cuda_products.h"

namespace qlora::ops {

Tensor cuda_forward(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                    std::vector<int64_t> shape, std::string quant_type, int64_t block_size, OptionalTensor lora_a,
                    OptionalTensor lora_b, double scaling, OptionalTensor bias, OptionalTensor lora_x) {
  Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size);
  const int64_t n = base.w.n, k = base.w.k;
  const std::optional<Lora> lora = check_lora(lora_a, lora_b, n, k, scaling, x);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, lora);
  const std::optional<Matrix> bias_row = check_bias(bias, n, x);
  const GpuScope scope(x, "forward", {base.tokens.rows, n, k, lora ? lora->a.rows : 0});
  const cuda::Weight w = device_view_of(base.w);
  std::optional<Activation> t;
  Up up{};
  if (lora) {
    t = low_rank_down(dropped ? *dropped : base.tokens, rows_of(lora->a), lora->a.rows, lora->scaling, scope);
    up = {rows_of(lora->b), &*t};
  }
  const cuda::Problem problem{base.tokens.rows, n, k, base.tokens.dtype, block_size};
  const cuda::ForwardKernel kernel = cuda::select_forward(problem, scope.gpu());
  if (kernel == cuda::ForwardKernel::kDecode)
    return decode(w, base.tokens, lora ? &up : nullptr, bias_row ? &*bias_row : nullptr, x, scope);
  if (kernel == cuda::ForwardKernel::kGemm)
    return gemm(w, base.tokens, lora ? &up : nullptr, bias_row ? &*bias_row : nullptr, x, scope);
  if (kernel == cuda::ForwardKernel::kVendor)
    return dequantize_matmul(w, base.tokens, lora ? &up : nullptr, bias, x, scope);
  return general_product(packed_operand(w, false, base.tokens), lora ? &up : nullptr, bias_row ? &*bias_row : nullptr,
                         x, n, scope.stream());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cuda_backward(
    Tensor grad, Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
    std::vector<int64_t> shape, std::string quant_type, int64_t block_size, OptionalTensor lora_a,
    OptionalTensor lora_b, double scaling, OptionalTensor lora_x, bool needs_x, bool needs_lora, bool needs_lora_x,
    bool needs_bias) {
  Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size);
  const int64_t n = base.w.n, k = base.w.k;
  const Matrix dy = grad_matrix(grad, n, base.tokens);
  const std::optional<Lora> lora = check_lora(lora_a, lora_b, n, k, scaling, x);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, lora);
  const GpuScope scope(x, "backward", {base.tokens.rows, n, k, lora ? lora->a.rows : 0});
  const cudaStream_t stream = scope.stream();

  Tensor d_x = nothing(x), d_lora_a = nothing(x), d_lora_b = nothing(x), d_lora_x = nothing(x), d_bias = nothing(x);
  const Matrix& lora_tokens = dropped ? *dropped : base.tokens;
  const bool low_rank_to_x = needs_x && lora && !dropped;
  const bool on_tensor_cores = tensor_core_grads(dy, lora_tokens, scope);
  std::optional<Activation> u;  // scaling * dy B, [m, r]
  if (lora && needs_lora) {
    const Activation t = low_rank_down(lora_tokens, rows_of(lora->a), lora->a.rows, lora->scaling, scope, true);
    const cuda::DenseMatrix b = columns_of(lora->b);
    d_lora_a = torch::stable::new_empty(*lora_a, lora_a->sizes());
    d_lora_b = torch::stable::new_empty(*lora_b, lora_b->sizes());
    if (on_tensor_cores) {
      const Factor factor{b};
      u = low_rank_grad(t, dy, false, d_lora_b, scope, nullptr, &factor, lora->scaling);
      low_rank_grad(*u, lora_tokens, true, d_lora_a, scope, nullptr);
    } else {
      u = low_rank_down(dy, b, lora->b.cols, lora->scaling, scope);
      low_rank_grad_general(as_float(t, stream), dy, false, d_lora_b, stream);
      low_rank_grad_general(as_float(*u, stream), lora_tokens, true, d_lora_a, stream);
    }
  } else if (lora && (low_rank_to_x || needs_lora_x)) {
    u = low_rank_down(dy, columns_of(lora->b), lora->b.cols, lora->scaling, scope);
  }
  const Up down = u ? Up{columns_of(lora->a), &*u} : Up{};
  if (needs_x) d_x = input_grad(base.w, dy, low_rank_to_x ? &down : nullptr, x, scope);
  if (needs_lora_x && dropped) d_lora_x = low_rank_up(dy, down, x, k, scope);
  if (needs_bias) d_bias = column_sum(dy, stream);
  return {d_x, d_lora_a, d_lora_b, d_lora_x, d_bias};
}

}  // namespace qlora::ops
