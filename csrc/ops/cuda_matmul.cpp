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
  const cuda::Problem problem{base.tokens.rows, n, k, base.tokens.dtype, block_size};
  const cuda::ForwardKernel kernel = cuda::select_forward(problem, scope.gpu());
  std::optional<Activation> t;
  Up up{};
  if (lora) {
    PackQueue packs(scope.stream());
    up.matrix = rows_of(lora->b);
    if (kernel == cuda::ForwardKernel::kGemm || kernel == cuda::ForwardKernel::kVendor)
      up.operand = up_operand(up, lora->a.rows, n, base.tokens, packs, kernel == cuda::ForwardKernel::kGemm);
    t = low_rank_down(dropped ? *dropped : base.tokens, rows_of(lora->a), lora->a.rows, lora->scaling, scope, packs);
    packs.flush();
    up.activation = &*t;
  }
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

  OptionalTensor d_x, d_lora_a, d_lora_b, d_lora_x, d_bias;
  const Matrix& lora_tokens = dropped ? *dropped : base.tokens;
  const bool low_rank_to_x = needs_x && lora && !dropped;
  const bool on_tensor_cores = tensor_core_grads(dy, lora_tokens, scope);
  const cuda::BackwardKernel kernel = input_grad_kernel(base.w, dy, false, x, scope);
  const bool on_tensor_cores_to_x = low_rank_to_x && kernel != cuda::BackwardKernel::kGeneral;
  PackQueue packs(stream), results(stream);
  std::optional<Activation> u;  // scaling * dy B, [m, r]
  Up down{};
  if (lora) down.matrix = columns_of(lora->a);
  if (on_tensor_cores_to_x)
    down.operand = up_operand(down, lora->a.rows, k, dy, packs, kernel == cuda::BackwardKernel::kGemmDx);
  if (lora && needs_lora) {
    const cuda::DenseMatrix b = columns_of(lora->b);
    std::optional<DownOperand> b_operand;
    if (on_tensor_cores) b_operand = down_operand({b}, lora->b.cols, dy, packs);
    const Activation t =
        low_rank_down(lora_tokens, rows_of(lora->a), lora->a.rows, lora->scaling, scope, packs, on_tensor_cores);
    d_lora_a = empty_of_shape(*lora_a);
    d_lora_b = empty_of_shape(*lora_b);
    if (on_tensor_cores) {
      u = low_rank_grad(t, dy, false, *d_lora_b, scope, packs, results, nullptr, &*b_operand, lora->scaling);
      down.activation = &*u;
      if (on_tensor_cores_to_x) down.activation_operand = activation_operand(down, dy, packs);
      low_rank_grad(*u, lora_tokens, true, *d_lora_a, scope, packs, results, nullptr);
      results.flush();
    } else {
      u = low_rank_down(dy, b, lora->b.cols, lora->scaling, scope, packs);
      low_rank_grad_general(as_float(t, stream), dy, false, *d_lora_b, stream);
      low_rank_grad_general(as_float(*u, stream), lora_tokens, true, *d_lora_a, stream);
    }
  } else if (lora && (low_rank_to_x || needs_lora_x)) {
    u = low_rank_down(dy, columns_of(lora->b), lora->b.cols, lora->scaling, scope, packs);
  }
  packs.flush();
  if (u) down.activation = &*u;
  if (needs_x) d_x = input_grad(base.w, kernel, dy, low_rank_to_x ? &down : nullptr, x, scope);
  if (needs_lora_x && dropped) d_lora_x = low_rank_up(dy, down, x, k, scope);
  if (needs_bias) d_bias = column_sum(dy, stream);
  const auto given = [&](const OptionalTensor& t) { return t ? *t : nothing(x); };
  return {given(d_x), given(d_lora_a), given(d_lora_b), given(d_lora_x), given(d_bias)};
}

}  // namespace qlora::ops
