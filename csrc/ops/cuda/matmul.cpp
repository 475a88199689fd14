// The ops forward and backward for CUDA: allocates tensors and launches the kernels that select.h chooses.
#include "ops/cuda/ops.h"
#include "ops/cuda/products.h"

namespace qlora::ops_cuda {

Tensor forward(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
               std::vector<int64_t> shape, std::string quant_type, int64_t block_size, OptionalTensor lora_a,
               OptionalTensor lora_b, double scaling, OptionalTensor bias, OptionalTensor lora_x) {
  Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size);
  const int64_t n = base.w.n, k = base.w.k;
  const std::optional<Adapter> lora = check_lora(lora_a, lora_b, n, k, scaling, x);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, lora);
  const std::optional<Matrix> bias_row = check_bias(bias, n, x);
  const GpuScope scope(x, "forward", {base.tokens.rows, n, k, lora ? lora->a.rows : 0});
  const WeightView w = device_view_of(base.w);
  const cuda::Problem problem{base.tokens.rows, n, k, base.tokens.dtype, block_size};
  const cuda::ForwardKernel kernel = cuda::select_forward(problem, scope.gpu());
  std::optional<AdapterActivation> x_down;
  std::optional<AdapterTerm> term;
  if (lora) {
    x_down = low_rank_down(dropped ? *dropped : base.tokens, a_factor(lora->a), lora->a.rows, lora->scaling, scope);
    term = AdapterTerm{b_factor(lora->b), &lora->b, &*x_down};
  }
  const AdapterTerm* up = term ? &*term : nullptr;
  const Matrix* addend = bias_row ? &*bias_row : nullptr;
  if (kernel == cuda::ForwardKernel::kGemv) return run_gemv(w, base.tokens, up, addend, x, scope);
  if (kernel == cuda::ForwardKernel::kGemm) return run_gemm(w, base.tokens, up, addend, x, scope);
  if (kernel == cuda::ForwardKernel::kDequantizeMatmul) return dequantize_matmul(w, base.tokens, up, addend, x, scope);
  return general_product(packed_operand(w, false, base.tokens), up, addend, x, n, scope.stream());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor packed, Tensor absmax,
                                                            OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                                            std::vector<int64_t> shape, std::string quant_type,
                                                            int64_t block_size, OptionalTensor lora_a,
                                                            OptionalTensor lora_b, double scaling,
                                                            OptionalTensor lora_x, bool needs_x, bool needs_lora,
                                                            bool needs_lora_x, bool needs_bias) {
  Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size,
                         values_if(needs_lora && !lora_x));
  const int64_t n = base.w.n, k = base.w.k;
  const Matrix dy = grad_matrix(grad, n, base.tokens);
  const std::optional<Adapter> lora = check_lora(lora_a, lora_b, n, k, scaling, x);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, lora, values_if(needs_lora));
  const GpuScope scope(x, "backward", {base.tokens.rows, n, k, lora ? lora->a.rows : 0});
  const cudaStream_t stream = scope.stream();

  OptionalTensor d_x, d_lora_a, d_lora_b, d_lora_x, d_bias;
  const Matrix& lora_tokens = dropped ? *dropped : base.tokens;
  const bool low_rank_to_x = needs_x && lora && !dropped;
  std::optional<AdapterActivation> dy_down;  // scaling * dy · lora_b, [m, r]
  if (lora && needs_lora) {
    const cuda::LowRankFactor a = a_factor(lora->a), b = b_factor(lora->b);
    const int64_t r = lora->a.rows;
    d_lora_a = empty_of_shape(*lora_a);
    d_lora_b = empty_of_shape(*lora_b);
    if (tensor_core_grads(dy, lora_tokens, scope)) {
      std::vector<AdapterActivation> both =
          low_rank_down_tiled({{lora_tokens, a}, {dy, b}}, r, lora->scaling, scope, /*note_largest=*/true);
      low_rank_grads(both[0], both[1], lora_tokens, dy, *d_lora_a, *d_lora_b, scope);
      dy_down = std::move(both[1]);
    } else {
      dy_down = low_rank_down(dy, b, r, lora->scaling, scope);
      const AdapterActivation x_down = low_rank_down(lora_tokens, a, r, lora->scaling, scope);
      low_rank_grad_general(x_down.values, dy, false, *d_lora_b, stream);
      low_rank_grad_general(dy_down->values, lora_tokens, true, *d_lora_a, stream);
    }
  } else if (lora && (low_rank_to_x || needs_lora_x)) {
    dy_down = low_rank_down(dy, b_factor(lora->b), lora->b.cols, lora->scaling, scope);
  }
  AdapterTerm down{};
  if (dy_down) down = {a_factor(lora->a), &lora->a, &*dy_down};
  if (needs_x) {
    const cuda::BackwardKernel kernel = input_grad_kernel(base.w, dy, false, x, scope);
    d_x = input_grad(base.w, kernel, dy, low_rank_to_x ? &down : nullptr, x, scope);
  }
  if (needs_lora_x && dropped) d_lora_x = low_rank_up(dy, down, x, k, scope);
  if (needs_bias) d_bias = column_sum(dy, stream);
  const auto given = [&](const OptionalTensor& t) { return t ? *t : nothing(x); };
  return {given(d_x), given(d_lora_a), given(d_lora_b), given(d_lora_x), given(d_bias)};
}

}  // namespace qlora::ops_cuda
