// forward and backward for the CPU: each is a few products on the kernels' one loop nest, composed here.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/select.h"
#include "ops/checks.h"
#include "ops/cpu_common.h"
#include "ops/cpu_decode.h"
#include "ops/cpu_products.h"

namespace qlora::ops {
namespace {

struct Lora {
  Matrix a, b;  // [r, k], [n, r]
  float scaling;
};

std::optional<Lora> check_lora(const OptionalTensor& a, const OptionalTensor& b, int64_t n, int64_t k, double scaling) {
  STD_TORCH_CHECK(a.has_value() == b.has_value(),
                  a.has_value() ? "lora_a was given without lora_b" : "lora_b was given without lora_a",
                  ": an adapter needs both");
  if (!a.has_value()) return std::nullopt;
  STD_TORCH_CHECK(a->dim() == 2, "lora_a has shape ", text_of(a->sizes()), ": it must be [rank, in_features]");
  const int64_t r = a->size(0);
  STD_TORCH_CHECK(r > 0, "rank=0: an adapter needs a rank of at least 1");
  STD_TORCH_CHECK(a->scalar_type() == b->scalar_type(), "lora_a and lora_b must have the same dtype");
  return Lora{lora_matrix(*a, "lora_a", r, k, "[rank, in_features]"),
              lora_matrix(*b, "lora_b", n, r, "[out_features, rank]"), static_cast<float>(scaling)};
}

std::optional<Matrix> check_lora_x(const OptionalTensor& lora_x, const Tensor& x, const std::optional<Lora>& lora) {
  if (!lora_x.has_value()) return std::nullopt;
  STD_TORCH_CHECK(lora.has_value(), "lora_x was given without lora_a and lora_b");
  STD_TORCH_CHECK(text_of(lora_x->sizes()) == text_of(x.sizes()) && lora_x->scalar_type() == x.scalar_type(),
                  "lora_x has shape ", text_of(lora_x->sizes()), ": it must have the shape and dtype of x, ",
                  text_of(x.sizes()));
  return tokens_matrix(*lora_x, "lora_x", x.size(x.dim() - 1), "in_features");
}

Tensor forward(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
               std::vector<int64_t> shape, std::string quant_type, int64_t block_size, OptionalTensor lora_a,
               OptionalTensor lora_b, double scaling, OptionalTensor bias, OptionalTensor lora_x) {
  const cpu::KernelTable& kernels = active_kernels();
  check_matrix_shape(shape);
  const int64_t n = shape[0], k = shape[1];
  const CheckedWeight w = check_weight(packed, absmax, nested_absmax, nested_offset, n, k, quant_type, block_size);
  const Matrix tokens = tokens_matrix(x, "x", k, "in_features");
  const std::optional<Lora> lora = check_lora(lora_a, lora_b, n, k, scaling);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, lora);
  const std::optional<Matrix> bias_row = check_bias(bias, n);
  const cpu::ForwardKernel kernel = cpu::select_forward(tokens.rows, k);
  if (kernel != cpu::ForwardKernel::kGemm) {
    const TokenFloats floats(kernels, tokens, kernel == cpu::ForwardKernel::kDecodeWords);
    if (!lora) return decode(kernels, w.view, tokens, floats, nullptr, bias_row, x);
    const TokenFloats lora_floats = dropped ? TokenFloats(kernels, *dropped, false) : floats;
    const Tensor t = empty_cpu({tokens.rows, lora->a.rows}, ScalarType::Float);
    low_rank_dot(kernels, lora->a, lora_floats.plain, tokens.rows, lora->scaling, t.mutable_data_ptr<float>());
    const DecodeLora up{t.const_data_ptr<float>(), lora->b.data, lora->b.dtype, lora->b.cols, nullptr};
    return decode(kernels, w.view, tokens, floats, &up, bias_row, x);
  }

  const Columns columns = pack(kernels, tokens, StepsAre::kColumns);
  std::optional<Matrix> t;
  std::vector<LowRankTerm> adapter;
  if (lora) {
    const Columns lora_columns = dropped ? pack(kernels, *dropped, StepsAre::kColumns) : columns;
    t = low_rank(kernels, lora->a, Operands::kAsStored, lora_columns, tokens.rows, lora->scaling);
    adapter.push_back({&lora->b, &*t});
  }
  return sum_of_terms(kernels, Operands::kAsStored, n, quantized(w.view), columns, k, adapter, x,
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
  check_matrix_shape(shape);
  const int64_t n = shape[0], k = shape[1];
  const CheckedWeight w = check_weight(packed, absmax, nested_absmax, nested_offset, n, k, quant_type, block_size);
  const Matrix tokens = tokens_matrix(x, "x", k, "in_features");
  const Matrix dy = tokens_matrix(grad, "grad", n, "out_features");
  STD_TORCH_CHECK(dy.rows == tokens.rows, "grad has ", dy.rows, " rows: x has ", tokens.rows);
  const std::optional<Lora> lora = check_lora(lora_a, lora_b, n, k, scaling);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, lora);

  Tensor d_x = nothing(), d_lora_a = nothing(), d_lora_b = nothing(), d_lora_x = nothing(), d_bias = nothing();
  const bool low_rank_to_x = needs_x && lora && !dropped;
  Columns dy_columns;
  if (needs_x || (lora && (needs_lora || needs_lora_x))) dy_columns = pack(kernels, dy, StepsAre::kColumns);
  std::optional<Matrix> u;  // scaling * dy B, [m, r]
  if (lora && (low_rank_to_x || needs_lora || needs_lora_x))
    u = low_rank(kernels, lora->b, Operands::kTransposed, dy_columns, dy.rows, lora->scaling);
  if (needs_x) {
    std::vector<LowRankTerm> adapter;
    if (low_rank_to_x) adapter.push_back({&lora->a, &*u});
    d_x = sum_of_terms(kernels, Operands::kTransposed, k, quantized(w.view), dy_columns, n, adapter, x);
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
