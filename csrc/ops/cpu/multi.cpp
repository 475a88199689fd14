// The ops forward.multi and its backward for the CPU: many adapters in one batch, with W unpacked once for all of them.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "format/half.h"
#include "ops/checks.h"
#include "ops/cpu/common.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/gemv.h"
#include "ops/cpu/tiles.h"

namespace qlora::ops_cpu {
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
cpu::TileAdapters adapters_of_tiles(const Adapters& adapters, const std::vector<int64_t>& ids) {
  cpu::TileAdapters t;
  t.count = static_cast<int64_t>(ids.size());
  t.ids = ids.data();
  t.adapter_of_token = adapters.of_row;
  t.scales = adapters.scale;
  return t;
}

// The low-rank terms of one product, with the matrices that they point to.
class AdapterTerms {
 public:
  void add(Matrix matrix, Matrix activation) {
    matrices_.push_back(std::move(matrix));
    activations_.push_back(std::move(activation));
  }
  std::vector<GemmAdapterTerm> get() const {
    std::vector<GemmAdapterTerm> terms;
    for (size_t i = 0; i < matrices_.size(); ++i) terms.push_back({&matrices_[i], &activations_[i]});
    return terms;
  }

 private:
  std::vector<Matrix> matrices_, activations_;
};

// The checked arguments of a call; tensors belong to the caller.
struct Call {
  const cpu::KernelTable& kernels;
  const WeightView& w;
  const Matrix& tokens;
  const Adapters& adapters;
  const std::vector<int64_t>& in_use;
  const Tensor& like;
};

Tensor forward_gemv(const Call& c, bool with_words, const std::optional<Matrix>& bias) {
  const TokenFloats floats(c.kernels, c.tokens, with_words);
  const Tensor x_down = empty_cpu({c.tokens.rows, c.adapters.r}, ScalarType::Float);
  float* data = x_down.mutable_data_ptr<float>();
  for (int64_t i = 0; i < c.tokens.rows; ++i) {
    const int64_t adapter = c.adapters.of_row[i];
    if (adapter >= 0)
      low_rank_down_gemv(c.kernels, c.adapters.a_of(adapter), floats.plain + i * c.w.k, 1, c.adapters.scale[adapter],
                         data + i * c.adapters.r);
  }
  const GemvAdapterTerm term{data, c.adapters.b.data, c.adapters.b.dtype, c.adapters.r, c.adapters.of_row};
  return run_gemv(c.kernels, c.w, c.tokens, floats, &term, bias, c.like);
}

Tensor forward_tiles(const Call& c, const cpu::TileKernels& tiles, const std::optional<Matrix>& bias) {
  std::optional<TileAdapterTerm> term;
  if (!c.in_use.empty())
    term = TileAdapterTerm{factor_of_a(c.adapters.a, c.adapters.r), c.adapters.b.data, c.w.n * c.adapters.r,
                           adapters_of_tiles(c.adapters, c.in_use)};
  return run_forward_tiles(tiles, c.w, c.tokens, term, std::nullopt, bias, c.like);
}

Tensor forward_gemm(const Call& c, const std::optional<Matrix>& bias) {
  const Columns columns = pack(c.kernels, c.tokens, StepsAre::kColumns);
  AdapterTerms terms;
  for (const int64_t i : c.in_use) {
    Matrix x_down =
        low_rank_down(c.kernels, c.adapters.a_of(i), Operands::kAsStored, columns, c.tokens.rows, c.adapters.scale[i]);
    mask_rows(x_down, c.adapters, i);
    terms.add(c.adapters.b_of(i), std::move(x_down));
  }
  return sum_of_terms(c.kernels, Operands::kAsStored, c.w.n, quantized(c.w), columns, c.w.k, terms.get(), c.like,
                      bias ? &*bias : nullptr);
}

Tensor forward_multi(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                     std::vector<int64_t> shape, std::string quant_type, int64_t block_size, Tensor lora_a,
                     Tensor lora_b, Tensor scaling, Tensor adapter_of_row, OptionalTensor bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size);
  const WeightView w = view_of(base.w);
  const Adapters adapters = check_adapters(lora_a, lora_b, scaling, adapter_of_row, base);
  check_adapter_of_row(adapters);
  const std::optional<Matrix> bias_row = check_bias(bias, w.n, x);
  std::vector<int64_t> in_use;  // gemv needs no list of them
  const Call call{kernels, w, base.tokens, adapters, in_use, x};
  const cpu::TileKernels* tiles = tiles_for(kernels, base.tokens, x);
  const cpu::ForwardKernel kernel = cpu::select_forward(base.tokens.rows, w.k, tiles);
  if (kernel == cpu::ForwardKernel::kGemvWords || kernel == cpu::ForwardKernel::kGemvElements)
    return forward_gemv(call, kernel == cpu::ForwardKernel::kGemvWords, bias_row);
  in_use = adapters_in_use(adapters, base.tokens.rows);
  for (const int64_t i : in_use) check_isolated(adapters, adapters.b_of(i), i, "lora_b");
  if (kernel == cpu::ForwardKernel::kTiles) return forward_tiles(call, *tiles, bias_row);
  return forward_gemm(call, bias_row);
}

// What a backward call returns; an empty tensor for what was not requested.
struct Gradients {
  Tensor x = nothing(), lora_a = nothing(), lora_b = nothing(), bias = nothing();
};
struct Needs {
  bool x, lora, bias;
};

// Zeros for the adapters that are not in use.
void make_adapter_gradients(const Call& c, Gradients& d) {
  const ScalarType dtype = c.adapters.a.tensor.scalar_type();
  const int64_t count = c.adapters.count, r = c.adapters.r;
  d.lora_a = torch::stable::new_zeros(c.adapters.a.tensor, {count, r, c.w.k}, dtype);
  d.lora_b = torch::stable::new_zeros(c.adapters.b.tensor, {count, c.w.n, r}, dtype);
}

Gradients backward_tiles(const Call& c, const cpu::TileKernels& tiles, const Matrix& dy, const Needs& needs) {
  Gradients d;
  if (needs.lora) make_adapter_gradients(c, d);
  const bool any = !c.in_use.empty(), needs_lora = needs.lora && any;
  const TileAdapterTerm term{factor_of_b(c.adapters.b, c.w.n), c.adapters.a.data, c.adapters.r * c.w.k,
                             adapters_of_tiles(c.adapters, c.in_use)};
  if (needs.x || needs_lora) {
    const BackwardTokens dy_down =
        pack_backward_tokens(tiles, dy, any ? &term.down : nullptr, any ? term.adapters : cpu::TileAdapters{}, needs.x);
    if (needs.x) d.x = run_backward_tiles(tiles, c.w, dy_down, dy.rows, any ? &term : nullptr, c.like);
    if (needs_lora) {
      const cpu::TileFactor a = factor_of_a(c.adapters.a, c.adapters.r);
      const BackwardTokens x_down = pack_backward_tokens(tiles, c.tokens, &a, term.adapters, false);
      factor_grad_tiles(tiles, *dy_down.activation, c.tokens, term.adapters, true, d.lora_a);
      factor_grad_tiles(tiles, *x_down.activation, dy, term.adapters, false, d.lora_b);
    }
  }
  if (needs.bias) d.bias = bias_grad_tiles(tiles, dy);
  return d;
}

Gradients backward_gemm(const Call& c, const Matrix& dy, const Needs& needs) {
  Gradients d;
  Columns dy_columns, dy_by_token, x_columns, x_by_token;
  if (needs.x || needs.lora) dy_columns = pack(c.kernels, dy, StepsAre::kColumns);
  if (needs.bias || needs.lora) dy_by_token = pack(c.kernels, dy, StepsAre::kRows);
  if (needs.lora) {
    x_columns = pack(c.kernels, c.tokens, StepsAre::kColumns);
    x_by_token = pack(c.kernels, c.tokens, StepsAre::kRows);
    make_adapter_gradients(c, d);
  }
  AdapterTerms terms;
  for (const int64_t i : c.in_use) {
    if (!needs.x && !needs.lora) break;
    const float scale = c.adapters.scale[i];
    Matrix dy_down = low_rank_down(c.kernels, c.adapters.b_of(i), Operands::kTransposed, dy_columns, dy.rows, scale);
    mask_rows(dy_down, c.adapters, i);
    if (needs.lora) {
      const Matrix x_down =
          low_rank_down(c.kernels, c.adapters.a_of(i), Operands::kAsStored, x_columns, c.tokens.rows, scale);
      mask_rows(x_down, c.adapters, i);
      const ScalarType dtype = d.lora_a.scalar_type();
      Tensor slice_a = torch::stable::select(d.lora_a, 0, i), slice_b = torch::stable::select(d.lora_b, 0, i);
      torch::stable::copy_(slice_a, low_rank_grad(c.kernels, dy_down, x_by_token, c.w.k, dtype, true));
      torch::stable::copy_(slice_b, low_rank_grad(c.kernels, x_down, dy_by_token, c.w.n, dtype, false));
    }
    terms.add(c.adapters.a_of(i), std::move(dy_down));
  }
  if (needs.x)
    d.x = sum_of_terms(c.kernels, Operands::kTransposed, c.w.k, quantized(c.w), dy_columns, c.w.n, terms.get(), c.like);
  if (needs.bias) d.bias = bias_grad(c.kernels, dy_by_token, dy.rows, c.w.n);
  return d;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_multi(Tensor grad, Tensor x, Tensor packed, Tensor absmax,
                                                          OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                                          std::vector<int64_t> shape, std::string quant_type,
                                                          int64_t block_size, Tensor lora_a, Tensor lora_b,
                                                          Tensor scaling, Tensor adapter_of_row, bool needs_x,
                                                          bool needs_lora, bool needs_bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const Base base = check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size);
  const WeightView w = view_of(base.w);
  const Matrix dy = grad_matrix(grad, w.n, base.tokens);
  const Adapters adapters = check_adapters(lora_a, lora_b, scaling, adapter_of_row, base);
  check_adapter_of_row(adapters);
  const std::vector<int64_t> in_use = adapters_in_use(adapters, base.tokens.rows);
  if (needs_x)
    for (const int64_t i : in_use) check_isolated(adapters, adapters.a_of(i), i, "lora_a");
  const Call call{kernels, w, base.tokens, adapters, in_use, x};
  const Needs needs{needs_x, needs_lora, needs_bias};
  const cpu::TileKernels* tiles = tiles_for(kernels, dy, x);
  const Gradients d = tiles != nullptr ? backward_tiles(call, *tiles, dy, needs) : backward_gemm(call, dy, needs);
  return {d.x, d.lora_a, d.lora_b, d.bias};
}

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("forward.multi", TORCH_BOX(&qlora::ops_cpu::forward_multi));
  m.impl("backward.multi", TORCH_BOX(&qlora::ops_cpu::backward_multi));
}
