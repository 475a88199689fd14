// The ops forward and backward for the CPU, composed of a few products.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/select.h"
#include "ops/checks.h"
#include "ops/cpu/common.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/gemv.h"
#include "ops/cpu/tiles.h"

namespace qlora::ops_cpu {
namespace {

// The checked arguments of a call; tensors belong to the caller.
struct Call {
  const cpu::KernelTable& kernels;
  const WeightView& w;
  const Matrix& tokens;
  const std::optional<Adapter>& adapter;
  const std::optional<Matrix>& dropped;  // lora_x; if not given, adapters take the tokens
  const Tensor& like;

  const Matrix& adapter_tokens() const { return dropped ? *dropped : tokens; }
};

Tensor forward_tiles(const Call& c, const cpu::TileKernels& tiles, const std::optional<Matrix>& bias) {
  std::optional<TileAdapterTerm> term;
  if (c.adapter) term = forward_term(*c.adapter);
  return run_forward_tiles(tiles, c.w, c.tokens, term, c.dropped, bias, c.like);
}

Tensor forward_gemv(const Call& c, bool with_words, const std::optional<Matrix>& bias) {
  const TokenFloats floats(c.kernels, c.tokens, with_words);
  if (!c.adapter) return run_gemv(c.kernels, c.w, c.tokens, floats, nullptr, bias, c.like);
  const Adapter& adapter = *c.adapter;
  const TokenFloats adapter_floats = c.dropped ? TokenFloats(c.kernels, *c.dropped, false) : floats;
  const Tensor x_down = empty_cpu({c.tokens.rows, adapter.a.rows}, ScalarType::Float);
  low_rank_down_gemv(c.kernels, adapter.a, adapter_floats.plain, c.tokens.rows, adapter.scaling,
                     x_down.mutable_data_ptr<float>());
  const GemvAdapterTerm term{x_down.const_data_ptr<float>(), adapter.b.data, adapter.b.dtype, adapter.b.cols, nullptr};
  return run_gemv(c.kernels, c.w, c.tokens, floats, &term, bias, c.like);
}

Tensor forward_gemm(const Call& c, const std::optional<Matrix>& bias) {
  const Columns columns = pack(c.kernels, c.tokens, StepsAre::kColumns);
  std::optional<Matrix> x_down;
  std::vector<GemmAdapterTerm> terms;
  if (c.adapter) {
    const Columns adapter_columns = c.dropped ? pack(c.kernels, *c.dropped, StepsAre::kColumns) : columns;
    x_down =
        low_rank_down(c.kernels, c.adapter->a, Operands::kAsStored, adapter_columns, c.tokens.rows, c.adapter->scaling);
    terms.push_back({&c.adapter->b, &*x_down});
  }
  return sum_of_terms(c.kernels, Operands::kAsStored, c.w.n, quantized(c.w), columns, c.w.k, terms, c.like,
                      bias ? &*bias : nullptr);
}

Tensor forward(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
               std::vector<int64_t> shape, std::string quant_type, int64_t block_size, OptionalTensor lora_a,
               OptionalTensor lora_b, double scaling, OptionalTensor bias, OptionalTensor lora_x) {
  const cpu::KernelTable& kernels = active_kernels();
  const Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size);
  const WeightView w = view_of(base.w);
  const std::optional<Adapter> adapter = check_lora(lora_a, lora_b, w.n, w.k, scaling, x);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, adapter);
  const std::optional<Matrix> bias_row = check_bias(bias, w.n, x);
  const Call call{kernels, w, base.tokens, adapter, dropped, x};
  const cpu::TileKernels* tiles = tiles_for(kernels, base.tokens, x);
  switch (cpu::select_forward(base.tokens.rows, w.k, tiles)) {
    case cpu::ForwardKernel::kTiles:
      return forward_tiles(call, *tiles, bias_row);
    case cpu::ForwardKernel::kGemvWords:
      return forward_gemv(call, /*with_words=*/true, bias_row);
    case cpu::ForwardKernel::kGemvElements:
      return forward_gemv(call, /*with_words=*/false, bias_row);
    default:
      return forward_gemm(call, bias_row);
  }
}

// What a backward call returns; an empty tensor for what was not requested.
struct Gradients {
  Tensor x = nothing(), lora_a = nothing(), lora_b = nothing(), lora_x = nothing(), bias = nothing();
};
struct Needs {
  bool x, lora, lora_x, bias;  // lora and lora_x only with an adapter, lora_x only with dropped tokens
  bool adapter_in_x;           // the gradient of x includes the adapter's term
  bool dy_down() const { return adapter_in_x || lora || lora_x; }
};

Gradients backward_tiles(const Call& c, const cpu::TileKernels& tiles, const Matrix& dy, const Needs& needs) {
  Gradients d;
  std::optional<TileAdapterTerm> term;
  if (needs.dy_down()) term = backward_term(*c.adapter);
  const cpu::TileAdapters adapters = term ? term->adapters : cpu::TileAdapters{};
  const bool needs_rows = needs.x || needs.lora_x;
  BackwardTokens dy_down{nothing()};
  if (needs_rows || term) dy_down = pack_backward_tokens(tiles, dy, term ? &term->down : nullptr, adapters, needs_rows);
  if (needs.x) d.x = run_backward_tiles(tiles, c.w, dy_down, dy.rows, needs.adapter_in_x ? &*term : nullptr, c.like);
  if (needs.lora_x) {
    WeightView none;
    none.n = c.w.n;
    none.k = c.w.k;
    d.lora_x = run_backward_tiles(tiles, none, dy_down, dy.rows, &*term, c.like);
  }
  if (needs.lora) {
    const Adapter& adapter = *c.adapter;
    const cpu::TileFactor a = factor_of_a(adapter.a, adapter.a.rows);
    const BackwardTokens x_down = pack_backward_tokens(tiles, c.adapter_tokens(), &a, adapters, false);
    d.lora_a = empty_cpu({adapter.a.rows, c.w.k}, adapter.a.tensor.scalar_type());
    d.lora_b = empty_cpu({c.w.n, adapter.b.cols}, adapter.b.tensor.scalar_type());
    factor_grad_tiles(tiles, *dy_down.activation, c.adapter_tokens(), true, d.lora_a);
    factor_grad_tiles(tiles, *x_down.activation, dy, false, d.lora_b);
  }
  if (needs.bias) d.bias = bias_grad_tiles(tiles, dy);
  return d;
}

Gradients backward_gemm(const Call& c, const Matrix& dy, const Needs& needs) {
  Gradients d;
  Columns dy_columns;
  if (needs.x) dy_columns = pack(c.kernels, dy, StepsAre::kColumns);
  std::optional<Matrix> dy_down;
  if (needs.dy_down()) {
    const Adapter& adapter = *c.adapter;
    dy_down = low_rank_down(c.kernels, adapter.b, Operands::kAsStored, dy, adapter.scaling);
  }
  if (needs.x) {
    std::vector<GemmAdapterTerm> terms;
    if (needs.adapter_in_x) terms.push_back({&c.adapter->a, &*dy_down});
    d.x = sum_of_terms(c.kernels, Operands::kTransposed, c.w.k, quantized(c.w), dy_columns, c.w.n, terms, c.like);
  }
  if (needs.lora_x)
    d.lora_x = sum_of_terms(c.kernels, Operands::kTransposed, c.w.k, dense(c.adapter->a),
                            pack(c.kernels, *dy_down, StepsAre::kColumns), dy_down->cols, {}, c.like);
  if (needs.lora) {
    const ScalarType dtype = c.adapter->a.tensor.scalar_type();
    const Matrix x_down =
        low_rank_down(c.kernels, c.adapter->a, Operands::kTransposed, c.adapter_tokens(), c.adapter->scaling);
    d.lora_a = low_rank_grad(c.kernels, *dy_down, c.adapter_tokens(), dtype, true);
    d.lora_b = low_rank_grad(c.kernels, x_down, dy, dtype, false);
  }
  if (needs.bias) d.bias = bias_grad(c.kernels, dy);
  return d;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor packed, Tensor absmax,
                                                            OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                                            std::vector<int64_t> shape, std::string quant_type,
                                                            int64_t block_size, OptionalTensor lora_a,
                                                            OptionalTensor lora_b, double scaling,
                                                            OptionalTensor lora_x, bool needs_x, bool needs_lora,
                                                            bool needs_lora_x, bool needs_bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size,
                               values_if(needs_lora && !lora_x));
  const WeightView w = view_of(base.w);
  const Matrix dy = grad_matrix(grad, w.n, base.tokens);
  const std::optional<Adapter> adapter = check_lora(lora_a, lora_b, w.n, w.k, scaling, x);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, adapter, values_if(needs_lora));
  const Call call{kernels, w, base.tokens, adapter, dropped, x};
  const bool adapts = adapter.has_value();
  const Needs needs{needs_x, needs_lora && adapts, needs_lora_x && dropped, needs_bias, needs_x && adapts && !dropped};
  const cpu::TileKernels* tiles = tiles_for(kernels, dy, x);
  const Gradients d = tiles != nullptr ? backward_tiles(call, *tiles, dy, needs) : backward_gemm(call, dy, needs);
  return {d.x, d.lora_a, d.lora_b, d.lora_x, d.bias};
}

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("forward", TORCH_BOX(&qlora::ops_cpu::forward));
  m.impl("backward", TORCH_BOX(&qlora::ops_cpu::backward));
}
