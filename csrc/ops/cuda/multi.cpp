// The ops forward.multi and its backward for CUDA: many adapters in one batch, with W unpacked once for all of them.
//
// adapter_of_row stays on the device, because reading it on the host would wait for the stream. Rows with an invalid
// adapter become nan.
#include "ops/cuda/ops.h"
#include "ops/cuda/products.h"

namespace qlora::ops_cuda {
namespace {

// Sorting costs two launches and does not pay off for few tokens, which read each adapter's factor about once anyway.
std::optional<TokenPlan> plan_if_it_pays(const Adapters& adapters, const Matrix& x, const GpuScope& scope) {
  if (x.rows <= cuda::kGemvMostTokens || adapters.count == 0 || !tensor_core_down(x, adapters.r, scope))
    return std::nullopt;
  return plan_tokens(adapters, x.rows, scope);
}

}  // namespace

Tensor forward_multi(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                     std::vector<int64_t> shape, std::string quant_type, int64_t block_size, Tensor lora_a,
                     Tensor lora_b, Tensor scaling, Tensor adapter_of_row, OptionalTensor bias) {
  Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size);
  const int64_t n = base.w.n, k = base.w.k;
  const Adapters adapters = check_adapters(lora_a, lora_b, scaling, adapter_of_row, base);
  const std::optional<Matrix> bias_row = check_bias(bias, n, x);
  const GpuScope scope(x, "forward.multi", {base.tokens.rows, n, k, adapters.r});
  const WeightView w = device_view_of(base.w);
  const std::optional<TokenPlan> plan = plan_if_it_pays(adapters, base.tokens, scope);
  const cuda::LowRankFactor a = a_factor(adapters.a, adapters.r * k);
  const AdapterActivation x_down = low_rank_down_multi(base.tokens, a, adapters, plan ? &*plan : nullptr, scope);
  const AdapterTerm up{b_factor(adapters.b, n * adapters.r), &adapters.b, &x_down, &adapters};
  const cuda::Problem problem{base.tokens.rows, n, k, base.tokens.dtype, block_size, true};
  const cuda::ForwardKernel kernel = cuda::select_forward(problem, scope.gpu());
  if (kernel == cuda::ForwardKernel::kGemv)
    return run_gemv(w, base.tokens, &up, bias_row ? &*bias_row : nullptr, x, scope);
  if (kernel == cuda::ForwardKernel::kGemm)
    return run_gemm(w, base.tokens, &up, bias_row ? &*bias_row : nullptr, x, scope);
  if (kernel == cuda::ForwardKernel::kDequantizeMatmul)
    return dequantize_matmul(w, base.tokens, &up, bias_row ? &*bias_row : nullptr, x, scope);
  return general_product(packed_operand(w, false, base.tokens), &up, bias_row ? &*bias_row : nullptr, x, n,
                         scope.stream());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_multi(Tensor grad, Tensor x, Tensor packed, Tensor absmax,
                                                          OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                                          std::vector<int64_t> shape, std::string quant_type,
                                                          int64_t block_size, Tensor lora_a, Tensor lora_b,
                                                          Tensor scaling, Tensor adapter_of_row, bool needs_x,
                                                          bool needs_lora, bool needs_bias) {
  Base base =
      check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size, values_if(needs_lora));
  const int64_t n = base.w.n, k = base.w.k;
  const Matrix dy = grad_matrix(grad, n, base.tokens);
  const Adapters adapters = check_adapters(lora_a, lora_b, scaling, adapter_of_row, base);
  const GpuScope scope(x, "backward.multi", {base.tokens.rows, n, k, adapters.r});
  const cudaStream_t stream = scope.stream();

  OptionalTensor d_x, d_lora_a, d_lora_b, d_bias;
  const cuda::LowRankFactor a = a_factor(adapters.a, adapters.r * k), b = b_factor(adapters.b, adapters.r * n);
  const bool on_tensor_cores = needs_lora && adapters.count > 0 && tensor_core_grads(dy, base.tokens, scope);
  std::optional<TokenPlan> tokens_by_adapter;
  if (on_tensor_cores)
    tokens_by_adapter = plan_tokens(adapters, base.tokens.rows, scope);
  else if (needs_x || needs_lora)
    tokens_by_adapter = plan_if_it_pays(adapters, dy, scope);
  const TokenPlan* plan = tokens_by_adapter ? &*tokens_by_adapter : nullptr;
  std::optional<AdapterActivation> dy_down;  // scaling * dy · lora_b of the row's adapter, [m, r]
  if (needs_lora) {
    d_lora_a = empty_of_shape(lora_a);
    d_lora_b = empty_of_shape(lora_b);
  }
  if (on_tensor_cores) {
    std::vector<AdapterActivation> both =
        low_rank_down_tiled({{base.tokens, a}, {dy, b}}, adapters.r, 1.0f, scope, /*note_largest=*/true, plan);
    low_rank_grads(both[0], both[1], base.tokens, dy, *d_lora_a, *d_lora_b, scope, plan);
    dy_down = std::move(both[1]);
  } else if (needs_x || needs_lora) {
    dy_down = low_rank_down_multi(dy, b, adapters, plan, scope);
  }
  if (needs_x) {
    const AdapterTerm down{a, &adapters.a, &*dy_down, &adapters};
    d_x = input_grad(base.w, input_grad_kernel(base.w, dy, true, x, scope), dy, &down, x, scope);
  }
  if (needs_lora && !on_tensor_cores) {
    const AdapterActivation x_down = token_dot(base.tokens, a, adapters.r, 1.0f, stream, &adapters);
    low_rank_grad_general(dy_down->values, base.tokens, true, *d_lora_a, stream, &adapters);
    low_rank_grad_general(x_down.values, dy, false, *d_lora_b, stream, &adapters);
  }
  if (needs_bias) d_bias = column_sum(dy, stream);
  const auto given = [&](const OptionalTensor& t) { return t ? *t : nothing(x); };
  return {given(d_x), given(d_lora_a), given(d_lora_b), given(d_bias)};
}

}  // namespace qlora::ops_cuda
