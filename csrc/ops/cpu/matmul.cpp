// The ops forward and backward for the CPU, composed of a few products.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/select.h"
#include "ops/checks.h"
#include "ops/cpu/common.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/gemv.h"
#include "ops/cpu/tiles.h"

namespace qlora::ops {
namespace {

Tensor forward(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
               std::vector<int64_t> shape, std::string quant_type, int64_t block_size, OptionalTensor lora_a,
               OptionalTensor lora_b, double scaling, OptionalTensor bias, OptionalTensor lora_x) {
  const cpu::KernelTable& kernels = active_kernels();
  const Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size);
  const PackedWeight w = view_of(base.w);
  const Matrix& tokens = base.tokens;
  const int64_t n = w.n, k = w.k;
  const std::optional<Lora> lora = check_lora(lora_a, lora_b, n, k, scaling, x);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, lora);
  const std::optional<Matrix> bias_row = check_bias(bias, n, x);
  const cpu::Matmul16* tiles = tiles_for(kernels, tokens, x);
  const cpu::ForwardKernel kernel = cpu::select_forward(tokens.rows, k, tiles);
  if (kernel == cpu::ForwardKernel::kTiles) {
    std::optional<LowRankTiles> term;
    if (lora) term = forward_low_rank(*lora);
    return forward16(*tiles, w, tokens, term, dropped, bias_row, x);
  }
  if (kernel != cpu::ForwardKernel::kGemm) {
    const TokenFloats floats(kernels, tokens, kernel == cpu::ForwardKernel::kDecodeWords);
    if (!lora) return decode(kernels, w, tokens, floats, nullptr, bias_row, x);
    const TokenFloats lora_floats = dropped ? TokenFloats(kernels, *dropped, false) : floats;
    const Tensor t = empty_cpu({tokens.rows, lora->a.rows}, ScalarType::Float);
    low_rank_dot(kernels, lora->a, lora_floats.plain, tokens.rows, lora->scaling, t.mutable_data_ptr<float>());
    const DecodeLora up{t.const_data_ptr<float>(), lora->b.data, lora->b.dtype, lora->b.cols, nullptr};
    return decode(kernels, w, tokens, floats, &up, bias_row, x);
  }

  const Columns columns = pack(kernels, tokens, StepsAre::kColumns);
  std::optional<Matrix> t;
  std::vector<LowRankTerm> adapter;
  if (lora) {
    const Columns lora_columns = dropped ? pack(kernels, *dropped, StepsAre::kColumns) : columns;
    t = low_rank(kernels, lora->a, Operands::kAsStored, lora_columns, tokens.rows, lora->scaling);
    adapter.push_back({&lora->b, &*t});
  }
  return sum_of_terms(kernels, Operands::kAsStored, n, quantized(w), columns, k, adapter, x,
                      bias_row ? &*bias_row : nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor packed, Tensor absmax,
                                                            OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                                            std::vector<int64_t> shape, std::string quant_type,
                                                            int64_t block_size, OptionalTensor lora_a,
                                                            OptionalTensor lora_b, double scaling,
                                                            OptionalTensor lora_x, bool needs_x, bool needs_lora,
                                                            bool needs_lora_x, bool needs_bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size);
  const PackedWeight w = view_of(base.w);
  const Matrix& tokens = base.tokens;
  const int64_t n = w.n, k = w.k;
  const Matrix dy = grad_matrix(grad, n, tokens);
  const std::optional<Lora> lora = check_lora(lora_a, lora_b, n, k, scaling, x);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, lora);

  Tensor d_x = nothing(), d_lora_a = nothing(), d_lora_b = nothing(), d_lora_x = nothing(), d_bias = nothing();
  const bool low_rank_to_x = needs_x && lora && !dropped;
  if (const cpu::Matmul16* matmul16 = tiles_for(kernels, dy, x)) {
    const cpu::Matmul16& tiles = *matmul16;
    const bool needs_v = lora && (low_rank_to_x || needs_lora || (needs_lora_x && dropped));
    const bool needs_rows = needs_x || (needs_lora_x && dropped);
    std::optional<LowRankTiles> term;
    if (needs_v) term = backward_low_rank(*lora);
    const cpu::Adapters16 adapters = term ? term->adapters : cpu::Adapters16{};
    BackwardTokens v{nothing()};
    if (needs_rows || needs_v) v = backward_tokens16(tiles, dy, term ? &term->down : nullptr, adapters, needs_rows);
    if (needs_x) d_x = backward16(tiles, w, v, dy.rows, low_rank_to_x ? &*term : nullptr, x);
    if (needs_lora_x && dropped) {
      PackedWeight none;
      none.n = n;
      none.k = k;
      d_lora_x = backward16(tiles, none, v, dy.rows, &*term, x);
    }
    if (lora && needs_lora) {
      const Matrix& lora_tokens = dropped ? *dropped : tokens;
      const cpu::Factor16 a = factor_of_a(lora->a, lora->a.rows);
      const BackwardTokens u = backward_tokens16(tiles, lora_tokens, &a, adapters, false);
      d_lora_a = empty_cpu({lora->a.rows, k}, lora_a->scalar_type());
      d_lora_b = empty_cpu({n, lora->b.cols}, lora_a->scalar_type());
      factor_grad16(tiles, *v.v, lora_tokens, {}, true, d_lora_a);
      factor_grad16(tiles, *u.v, dy, {}, false, d_lora_b);
    }
    if (needs_bias) d_bias = bias_grad16(tiles, dy);
    return {d_x, d_lora_a, d_lora_b, d_lora_x, d_bias};
  }
  Columns dy_columns;
  if (needs_x || (lora && (needs_lora || needs_lora_x))) dy_columns = pack(kernels, dy, StepsAre::kColumns);
  std::optional<Matrix> u;  // scaling * dy B, [m, r]
  if (lora && (low_rank_to_x || needs_lora || needs_lora_x))
    u = low_rank(kernels, lora->b, Operands::kTransposed, dy_columns, dy.rows, lora->scaling);
  if (needs_x) {
    std::vector<LowRankTerm> adapter;
    if (low_rank_to_x) adapter.push_back({&lora->a, &*u});
    d_x = sum_of_terms(kernels, Operands::kTransposed, k, quantized(w), dy_columns, n, adapter, x);
  }
  if (needs_lora_x && dropped)
    d_lora_x = sum_of_terms(kernels, Operands::kTransposed, k, dense(lora->a), pack(kernels, *u, StepsAre::kColumns),
                            u->cols, {}, x);
  Columns dy_by_token;
  if (needs_bias || (lora && needs_lora)) dy_by_token = pack(kernels, dy, StepsAre::kRows);
  if (lora && needs_lora) {
    const Matrix& lora_tokens = dropped ? *dropped : tokens;
    const ScalarType dtype = lora_a->scalar_type();
    const Matrix t = low_rank(kernels, lora->a, Operands::kAsStored, pack(kernels, lora_tokens, StepsAre::kColumns),
                              tokens.rows, lora->scaling);
    d_lora_a = low_rank_grad(kernels, *u, pack(kernels, lora_tokens, StepsAre::kRows), k, dtype, true);
    d_lora_b = low_rank_grad(kernels, t, dy_by_token, n, dtype, false);
  }
  if (needs_bias) d_bias = bias_grad(kernels, dy_by_token, dy.rows, n);
  return {d_x, d_lora_a, d_lora_b, d_lora_x, d_bias};
}

}  // namespace
}  // namespace qlora::ops

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("forward", TORCH_BOX(&qlora::ops::forward));
  m.impl("backward", TORCH_BOX(&qlora::ops::backward));
}
