// The ops forward.multi and its backward for the CPU: many adapters in one batch, with W unpacked once for all of them.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "format/half.h"
#include "ops/checks.h"
#include "ops/cpu/common.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/gemv.h"
#include "ops/cpu/tiles.h"

namespace qlora::ops {
namespace {

void check_adapter_of_row(const Adapters& adapters) {
  for (int64_t t = 0; t < adapters.adapter_of_row.numel(); ++t)
    STD_TORCH_CHECK(adapters.of_row[t] >= -1 && adapters.of_row[t] < adapters.count, "adapter_of_row[", t,
                    "]=", adapters.of_row[t], ": it must be -1 (base only) or an adapter from 0 to ",
                    adapters.count - 1);
}

// Sets the activations [tokens, r] of one adapter to zero for tokens of other adapters, so that every adapter can be a
// term of one sum. Each adapter costs r more steps of the product, but W is unpacked only once.
void mask_rows(const Matrix& activation, const Adapters& adapters, int64_t adapter) {
  float* data = static_cast<float*>(activation.tensor.mutable_data_ptr());
  for (int64_t t = 0; t < activation.rows; ++t)
    if (adapters.of_row[t] != adapter) std::fill_n(data + t * activation.cols, activation.cols, 0.0f);
}

// The adapters that occur in the batch; the others are left out of the product.
std::vector<int64_t> adapters_in_use(const Adapters& adapters, int64_t tokens) {
  std::vector<bool> used(static_cast<size_t>(adapters.count));
  for (int64_t t = 0; t < tokens; ++t)
    if (adapters.of_row[t] >= 0) used[static_cast<size_t>(adapters.of_row[t])] = true;
  std::vector<int64_t> in_use;
  for (int64_t i = 0; i < adapters.count; ++i)
    if (used[static_cast<size_t>(i)]) in_use.push_back(i);
  return in_use;
}

// In the product of one adapter, rows of other adapters are zeros, and 0 * inf is nan. So an adapter with nan or inf is
// rejected if the batch has rows of other adapters.
void check_isolated(const Adapters& adapters, const Matrix& matrix, int64_t adapter, const char* name) {
  bool alone = true;
  for (int64_t t = 0; t < adapters.adapter_of_row.numel(); ++t) alone = alone && adapters.of_row[t] == adapter;
  if (alone) return;
  // nan and inf have an exponent of all ones. Comparing integers of the element's width lets the compiler vectorize.
  const auto all_finite = [&](const auto* bits, auto exponent) {
    decltype(exponent) found = 0;
    for (int64_t i = 0; i < matrix.rows * matrix.cols; ++i)
      found |= static_cast<decltype(exponent)>((bits[i] & exponent) == exponent);
    return found == 0;
  };
  const bool finite = matrix.dtype == DType::kFloat32
                          ? all_finite(static_cast<const uint32_t*>(matrix.data), uint32_t{0x7F800000u})
                          : all_finite(static_cast<const uint16_t*>(matrix.data),
                                       static_cast<uint16_t>(matrix.dtype == DType::kBFloat16 ? 0x7F80u : 0x7C00u));
  STD_TORCH_CHECK(finite, name, "[", adapter,
                  "] holds nan or inf: in a batch it would reach the rows of other adapters");
}

// The adapters in use for a product on tiles; `ids` must outlive the result.
cpu::Adapters16 adapters_of_tiles(const Adapters& adapters, const std::vector<int64_t>& ids) {
  cpu::Adapters16 t;
  t.count = static_cast<int64_t>(ids.size());
  t.ids = ids.data();
  t.adapter_of_token = adapters.of_row;
  t.scales = adapters.scale;
  return t;
}

struct AdapterTerms {
  std::vector<Matrix> matrices, activations;
  std::vector<LowRankTerm> terms;

  void add(Matrix matrix, Matrix activation) {
    matrices.push_back(std::move(matrix));
    activations.push_back(std::move(activation));
  }
  const std::vector<LowRankTerm>& get() {
    terms.clear();
    for (size_t i = 0; i < matrices.size(); ++i) terms.push_back({&matrices[i], &activations[i]});
    return terms;
  }
};

Tensor forward_multi(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                     std::vector<int64_t> shape, std::string quant_type, int64_t block_size, Tensor lora_a,
                     Tensor lora_b, Tensor scaling, Tensor adapter_of_row, OptionalTensor bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size);
  const PackedWeight w = view_of(base.w);
  const Matrix& tokens = base.tokens;
  const int64_t n = w.n, k = w.k;
  const Adapters adapters = check_adapters(lora_a, lora_b, scaling, adapter_of_row, base);
  check_adapter_of_row(adapters);
  const std::optional<Matrix> bias_row = check_bias(bias, n, x);
  const cpu::Matmul16* tiles = tiles_for(kernels, tokens, x);
  const cpu::ForwardKernel kernel = cpu::select_forward(tokens.rows, k, tiles);
  if (kernel == cpu::ForwardKernel::kDecodeWords || kernel == cpu::ForwardKernel::kDecodeSpans) {
    const TokenFloats floats(kernels, tokens, kernel == cpu::ForwardKernel::kDecodeWords);
    const Tensor t = empty_cpu({tokens.rows, adapters.r}, ScalarType::Float);
    float* t_data = t.mutable_data_ptr<float>();
    for (int64_t i = 0; i < tokens.rows; ++i) {
      const int64_t adapter = adapters.of_row[i];
      if (adapter >= 0)
        low_rank_dot(kernels, adapters.a_of(adapter), floats.plain + i * k, 1, adapters.scale[adapter],
                     t_data + i * adapters.r);
    }
    const DecodeLora up{t_data, adapters.b.data, adapters.b.dtype, adapters.r, adapters.of_row};
    return decode(kernels, w, tokens, floats, &up, bias_row, x);
  }
  const std::vector<int64_t> in_use = adapters_in_use(adapters, tokens.rows);
  for (const int64_t i : in_use) check_isolated(adapters, adapters.b_of(i), i, "lora_b");
  if (kernel == cpu::ForwardKernel::kTiles) {
    std::optional<LowRankTiles> term;
    if (!in_use.empty())
      term = LowRankTiles{factor_of_a(adapters.a, adapters.r), adapters.b.data, n * adapters.r,
                          adapters_of_tiles(adapters, in_use)};
    return forward16(*tiles, w, tokens, term, std::nullopt, bias_row, x);
  }
  const Columns columns = pack(kernels, tokens, StepsAre::kColumns);
  AdapterTerms terms;
  for (const int64_t i : in_use) {
    Matrix t = low_rank(kernels, adapters.a_of(i), Operands::kAsStored, columns, tokens.rows, adapters.scale[i]);
    mask_rows(t, adapters, i);
    terms.add(adapters.b_of(i), std::move(t));
  }
  return sum_of_terms(kernels, Operands::kAsStored, n, quantized(w), columns, k, terms.get(), x,
                      bias_row ? &*bias_row : nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_multi(Tensor grad, Tensor x, Tensor packed, Tensor absmax,
                                                          OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                                          std::vector<int64_t> shape, std::string quant_type,
                                                          int64_t block_size, Tensor lora_a, Tensor lora_b,
                                                          Tensor scaling, Tensor adapter_of_row, bool needs_x,
                                                          bool needs_lora, bool needs_bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size);
  const PackedWeight w = view_of(base.w);
  const Matrix& tokens = base.tokens;
  const int64_t n = w.n, k = w.k;
  const Matrix dy = grad_matrix(grad, n, tokens);
  const Adapters adapters = check_adapters(lora_a, lora_b, scaling, adapter_of_row, base);
  check_adapter_of_row(adapters);

  Tensor d_x = nothing(), d_lora_a = nothing(), d_lora_b = nothing(), d_bias = nothing();
  if (const cpu::Matmul16* matmul16 = tiles_for(kernels, dy, x)) {
    const cpu::Matmul16& tiles = *matmul16;
    const std::vector<int64_t> in_use = adapters_in_use(adapters, tokens.rows);
    for (const int64_t i : in_use)
      if (needs_x) check_isolated(adapters, adapters.a_of(i), i, "lora_a");
    if (needs_lora) {
      d_lora_a = torch::stable::new_zeros(lora_a, {adapters.count, adapters.r, k}, lora_a.scalar_type());
      d_lora_b = torch::stable::new_zeros(lora_b, {adapters.count, n, adapters.r}, lora_a.scalar_type());
    }
    const bool any = !in_use.empty();
    const LowRankTiles term{factor_of_b(adapters.b, n), adapters.a.data, adapters.r * k,
                            adapters_of_tiles(adapters, in_use)};
    const cpu::Adapters16 none;
    if (needs_x || (needs_lora && any)) {
      const BackwardTokens v =
          backward_tokens16(tiles, dy, any ? &term.down : nullptr, any ? term.adapters : none, needs_x);
      if (needs_x) d_x = backward16(tiles, w, v, dy.rows, any ? &term : nullptr, x);
      if (needs_lora && any) {
        const cpu::Factor16 a = factor_of_a(adapters.a, adapters.r);
        const BackwardTokens u = backward_tokens16(tiles, tokens, &a, term.adapters, false);
        factor_grad16(tiles, *v.v, tokens, term.adapters, true, d_lora_a);
        factor_grad16(tiles, *u.v, dy, term.adapters, false, d_lora_b);
      }
    }
    if (needs_bias) d_bias = bias_grad16(tiles, dy);
    return {d_x, d_lora_a, d_lora_b, d_bias};
  }
  Columns dy_columns, dy_by_token, x_columns, x_by_token;
  if (needs_x || needs_lora) dy_columns = pack(kernels, dy, StepsAre::kColumns);
  if (needs_bias || needs_lora) dy_by_token = pack(kernels, dy, StepsAre::kRows);
  if (needs_lora) {
    x_columns = pack(kernels, tokens, StepsAre::kColumns);
    x_by_token = pack(kernels, tokens, StepsAre::kRows);
    const ScalarType dtype = lora_a.scalar_type();
    d_lora_a = torch::stable::new_zeros(lora_a, {adapters.count, adapters.r, k}, dtype);
    d_lora_b = torch::stable::new_zeros(lora_b, {adapters.count, n, adapters.r}, dtype);
  }
  AdapterTerms terms;
  for (const int64_t i : adapters_in_use(adapters, tokens.rows)) {
    if (!needs_x && !needs_lora) break;
    if (needs_x) check_isolated(adapters, adapters.a_of(i), i, "lora_a");
    Matrix u = low_rank(kernels, adapters.b_of(i), Operands::kTransposed, dy_columns, dy.rows, adapters.scale[i]);
    mask_rows(u, adapters, i);
    if (needs_lora) {
      const Matrix t =
          low_rank(kernels, adapters.a_of(i), Operands::kAsStored, x_columns, tokens.rows, adapters.scale[i]);
      mask_rows(t, adapters, i);
      const ScalarType dtype = lora_a.scalar_type();
      Tensor slice_a = torch::stable::select(d_lora_a, 0, i), slice_b = torch::stable::select(d_lora_b, 0, i);
      torch::stable::copy_(slice_a, low_rank_grad(kernels, u, x_by_token, k, dtype, true));
      torch::stable::copy_(slice_b, low_rank_grad(kernels, t, dy_by_token, n, dtype, false));
    }
    terms.add(adapters.a_of(i), std::move(u));
  }
  if (needs_x) d_x = sum_of_terms(kernels, Operands::kTransposed, k, quantized(w), dy_columns, n, terms.get(), x);
  if (needs_bias) d_bias = bias_grad(kernels, dy_by_token, dy.rows, n);
  return {d_x, d_lora_a, d_lora_b, d_bias};
}

}  // namespace
}  // namespace qlora::ops

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("forward.multi", TORCH_BOX(&qlora::ops::forward_multi));
  m.impl("backward.multi", TORCH_BOX(&qlora::ops::backward_multi));
}
