// The ops forward.multi and its backward for the CPU: many adapters in one batch, with W unpacked once for all of them.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "format/half.h"
#include "ops/checks.h"
#include "ops/cpu/common.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/gemv.h"
#include "ops/cpu/steps.h"
#include "ops/cpu/tiles.h"

namespace qlora::ops_cpu {
namespace {

void check_adapter_of_row(const Adapters& adapters) {
  for (int64_t t = 0; t < adapters.adapter_of_row.numel(); ++t)
    STD_TORCH_CHECK(adapters.of_row[t] >= -1 && adapters.of_row[t] < adapters.count, "adapter_of_row[", t,
                    "]=", adapters.of_row[t], ": it must be -1 (base only) or an adapter from 0 to ",
                    adapters.count - 1);
}

// The tokens in the order of their adapters, so that each adapter is a term of a few columns of one product, in which W
// is unpacked once. Tokens of the base come first.
class TokenGroups {
 public:
  struct Group {
    int64_t adapter, begin, count;
  };

  // `tokens` rows from row `first` on; the groups count from there.
  TokenGroups(const Adapters& adapters, int64_t first, int64_t tokens) {
    std::vector<int64_t> next(static_cast<size_t>(adapters.count + 1));  // of the base, then of each adapter
    const auto kind = [&](int64_t t) { return static_cast<size_t>(adapters.of_row[first + t] + 1); };
    for (int64_t t = 0; t < tokens; ++t) ++next[kind(t)];
    int64_t begin = 0;
    for (int64_t i = -1; i < adapters.count; ++i) {
      const int64_t count = std::exchange(next[static_cast<size_t>(i + 1)], begin);
      if (count > 0 && i >= 0) groups_.push_back({i, begin, count});
      begin += count;
    }
    order_.resize(static_cast<size_t>(tokens));
    for (int64_t t = 0; t < tokens; ++t) order_[static_cast<size_t>(next[kind(t)]++)] = t;
  }

  const std::vector<Group>& all() const { return groups_; }
  RowList order() const { return {order_.data(), static_cast<int64_t>(order_.size())}; }
  RowList rows_of(const Group& group) const { return {order_.data() + group.begin, group.count}; }

 private:
  std::vector<Group> groups_;
  std::vector<int64_t> order_;
};

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

Matrix last_rows(const Matrix& m, int64_t count) {
  return {m.tensor, static_cast<const float*>(m.data) + (m.rows - count) * m.cols, m.dtype, count, m.cols};
}

// The low-rank terms of one product, one for each group, with the matrices that they point to.
class AdapterTerms {
 public:
  AdapterTerms(const cpu::KernelTable& kernels, const TokenGroups& groups)
      : kernels_(kernels), groups_(groups.all()), owned_(groups.all().size()) {}

  // Sets the term of a group for `matrix`. Its activations are scale * (down · tokens)ᵀ, and are returned as [count,
  // r]. `tokens` are all tokens, in the order of the groups. Different groups may be set by different threads.
  Matrix set(size_t index, Matrix matrix, const Matrix& down, Operands form, const Columns& tokens, float scale) {
    const TokenGroups::Group& group = groups_[index];
    Owned& owned = owned_[index];
    owned.matrix = std::move(matrix);
    owned.activation = low_rank_down(kernels_, down, form, tokens, group.count, scale, group.begin);
    owned.packed = pack(kernels_, owned.activation, StepsAre::kColumns);
    return last_rows(owned.activation, group.count);
  }
  std::vector<GemmAdapterTerm> get() const {
    std::vector<GemmAdapterTerm> terms;
    for (size_t i = 0; i < owned_.size(); ++i)
      terms.push_back({&owned_[i].matrix, &owned_[i].activation, owned_[i].packed, groups_[i].begin});
    return terms;
  }

 private:
  struct Owned {
    Matrix matrix, activation;
    Columns packed;
  };
  const cpu::KernelTable& kernels_;
  const std::vector<TokenGroups::Group>& groups_;
  std::vector<Owned> owned_;
};

// Calls fn(index, group) for each group: many small groups in parallel, few large ones one after another, because then
// the products inside are parallel.
template <class Fn>
void for_each_group(const TokenGroups& groups, const Fn& fn) {
  constexpr int64_t kMany = 4;
  const auto& all = groups.all();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fn(static_cast<size_t>(i), all[static_cast<size_t>(i)]);
  };
  const auto count = static_cast<int64_t>(all.size());
  if (count >= kMany) return parallel(count, 1, run);
  run(0, count);
}

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

// Sets the low-rank terms of all groups for the factors of a forward product. `columns` are all tokens, in the order of
// the groups.
void set_forward_terms(const Call& c, const TokenGroups& groups, const Columns& columns, AdapterTerms& terms) {
  for_each_group(groups, [&](size_t index, const TokenGroups::Group& group) {
    const int64_t i = group.adapter;
    terms.set(index, c.adapters.b_of(i), c.adapters.a_of(i), Operands::kAsStored, columns, c.adapters.scale[i]);
  });
}

// Whether the low-rank terms are computed by dot products for each token. With few tokens of each adapter most of a
// group's vector would be empty. With one token of each of 16 adapters this takes 0.6 to 0.7 of the time, with four
// 1.05 to 1.1 (Zen 5; 576 x 576 and 4096 x 4096).
bool has_small_groups(const TokenGroups& groups, int64_t tokens) {
  constexpr int64_t kTokensOfGroup = 2;
  const auto count = static_cast<int64_t>(groups.all().size());
  return count > 1 && tokens <= kTokensOfGroup * count;
}

// The low-rank terms of some tokens, float32 [tokens, n], by dot products; zeros for tokens of the base.
Tensor low_rank_by_token(const Call& c, const Matrix& tokens, int64_t first) {
  const TokenFloats floats(c.kernels, tokens, false);
  const int64_t n = c.w.n, r = c.adapters.r;
  const Tensor out = empty_cpu({tokens.rows, n}, ScalarType::Float),
               x_down = empty_cpu({tokens.rows, r}, ScalarType::Float);
  float *y = out.mutable_data_ptr<float>(), *down = x_down.mutable_data_ptr<float>();
  parallel(tokens.rows, rows_per_task(r * (c.w.k + n)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t adapter = c.adapters.of_row[first + t];
      if (adapter < 0) {
        std::fill_n(y + t * n, n, 0.0f);
        continue;
      }
      const Matrix a = c.adapters.a_of(adapter), b = c.adapters.b_of(adapter);
      c.kernels.dot({a.data, a.dtype, r, c.w.k, floats.plain + t * c.w.k, 1, c.adapters.scale[adapter], down + t * r},
                    0, r);
      c.kernels.dot({b.data, b.dtype, n, r, down + t * r, 1, 1.0f, y + t * n}, 0, n);
    }
  });
  return out;
}

Tensor forward_tiles(const Call& c, const cpu::TileKernels& tiles, const std::optional<Matrix>& bias) {
  if (static_cast<int64_t>(c.in_use.size()) < tiles.grouped_adapters) {
    std::optional<TileAdapterTerm> term;
    if (!c.in_use.empty())
      term = TileAdapterTerm{factor_of_a(c.adapters.a, c.adapters.r), c.adapters.b.data, c.w.n * c.adapters.r,
                             adapters_of_tiles(c.adapters, c.in_use)};
    return run_forward_tiles(tiles, c.w, c.tokens, term, std::nullopt, bias, c.like);
  }
  // As steps of the tiles, each adapter would be multiplied with all tokens. So the low-rank terms are computed for
  // groups of tokens, in float32, and added before the result is rounded; some tokens at a time, to bound the memory.
  constexpr int64_t kSlice = 1024;
  const Tensor y = on_huge_pages(empty_with_last_dim(c.like, c.w.n, c.like.scalar_type()));
  const auto* x = static_cast<const uint16_t*>(c.tokens.data);
  auto* out = static_cast<uint16_t*>(y.mutable_data_ptr());
  for (int64_t first = 0; first < c.tokens.rows && c.w.n > 0; first += kSlice) {
    const int64_t count = std::min(kSlice, c.tokens.rows - first);
    const Matrix slice{c.tokens.tensor, x + first * c.w.k, c.tokens.dtype, count, c.w.k};
    const TokenGroups groups(c.adapters, first, count);
    Tensor low_rank = nothing();
    if (has_small_groups(groups, count)) {
      low_rank = low_rank_by_token(c, slice, first);
    } else {
      const RowList order = groups.order();
      AdapterTerms terms(c.kernels, groups);
      set_forward_terms(c, groups, pack(c.kernels, slice, StepsAre::kColumns, &order), terms);
      low_rank = empty_cpu({count, c.w.n}, ScalarType::Float);
      sum_into(c.kernels, Operands::kAsStored, c.w.n, count, nullptr, terms.get(), nullptr, order.numbers,
               low_rank.mutable_data_ptr(), DType::kFloat32);
    }
    run_forward_tiles_into(tiles, c.w, slice, std::nullopt, std::nullopt, bias, low_rank.const_data_ptr<float>(),
                           out + first * c.w.n);
  }
  return y;
}

Tensor forward_gemm(const Call& c, const std::optional<Matrix>& bias) {
  const TokenGroups groups(c.adapters, 0, c.tokens.rows);
  const Matrix* bias_row = bias ? &*bias : nullptr;
  if (has_small_groups(groups, c.tokens.rows)) {
    const Tensor low_rank = low_rank_by_token(c, c.tokens, 0);
    return sum_of_terms(c.kernels, Operands::kAsStored, c.w.n, quantized(c.w),
                        pack(c.kernels, c.tokens, StepsAre::kColumns), c.w.k, {}, c.like, bias_row, nullptr,
                        low_rank.const_data_ptr<float>());
  }
  const RowList order = groups.order();
  const Columns columns = pack(c.kernels, c.tokens, StepsAre::kColumns, &order);
  AdapterTerms terms(c.kernels, groups);
  set_forward_terms(c, groups, columns, terms);
  return sum_of_terms(c.kernels, Operands::kAsStored, c.w.n, quantized(c.w), columns, c.w.k, terms.get(), c.like,
                      bias_row, order.numbers);
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

// The part of a gradient [adapters, …] that belongs to one adapter.
void* of_adapter(const Tensor& gradient, int64_t adapter) {
  const int64_t bytes = gradient.numel() / gradient.size(0) * gradient.element_size();
  return static_cast<char*>(gradient.mutable_data_ptr()) + adapter * bytes;
}

// The gradients of the factors from the activations [m, adapters in use * r]. Each sums over the tokens of its adapter
// alone: as zeros the activations of other tokens would carry their nan and inf into it.
void factor_grads_tiles(const Call& c, const cpu::TileKernels& tiles, const Matrix& dy, const Matrix& dy_down,
                        const Matrix& x_down, const Gradients& d) {
  const TokenGroups groups(c.adapters, 0, c.tokens.rows);
  const int64_t r = c.adapters.r, pitch = dy_down.cols;
  const auto packed_bytes = [&](const TokenGroups::Group& group) {
    return cpu::tiles_of(r) * 2 * ceil_div(group.count, cpu::kStep) * cpu::kTileBytes;
  };
  Buffers buffers;
  for (const TokenGroups::Group& group : groups.all())
    for (int i = 0; i < 2; ++i) buffers.ask(packed_bytes(group));
  buffers.allocate();
  std::vector<cpu::PackTokenFactorParams> packs;
  std::vector<cpu::FactorGradParams> grads;
  int64_t place = 0;  // of the adapter among those in use, which the groups follow
  for (const TokenGroups::Group& group : groups.all()) {
    const int64_t* rows = groups.rows_of(group).numbers;
    const auto add_grad = [&](const Matrix& activation, const Matrix& matrix, bool r_is_major, const Tensor& out) {
      auto* packed = buffers.take<uint8_t>(packed_bytes(group));
      packs.push_back({static_cast<const float*>(activation.data) + place * r, group.count, r, packed, pitch, rows});
      cpu::FactorGradParams p{};
      p.factor = packed;
      p.m = group.count;
      p.r = r;
      p.features = matrix.cols;
      p.matrix = matrix.data;
      p.r_is_major = r_is_major;
      p.out = of_adapter(out, group.adapter);
      p.out_dtype = float_dtype(out.scalar_type(), "lora");
      p.row_of = rows;
      grads.push_back(p);
    };
    add_grad(dy_down, c.tokens, true, d.lora_a);
    add_grad(x_down, dy, false, d.lora_b);
    ++place;
  }
  run_token_factor_packs(tiles, packs);
  run_factor_grads(tiles, grads);
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
      factor_grads_tiles(c, tiles, dy, *dy_down.activation, *x_down.activation, d);
    }
  }
  if (needs.bias) d.bias = bias_grad_tiles(tiles, dy);
  return d;
}

Gradients backward_gemm(const Call& c, const Matrix& dy, const Needs& needs) {
  Gradients d;
  const TokenGroups groups(c.adapters, 0, c.tokens.rows);
  const RowList order = groups.order();
  Columns dy_columns, x_columns;
  if (needs.x || needs.lora) dy_columns = pack(c.kernels, dy, StepsAre::kColumns, &order);
  if (needs.lora) {
    x_columns = pack(c.kernels, c.tokens, StepsAre::kColumns, &order);
    make_adapter_gradients(c, d);
  }
  AdapterTerms terms(c.kernels, groups);
  const auto run_group = [&](size_t index, const TokenGroups::Group& group) {
    const int64_t i = group.adapter;
    const RowList rows = groups.rows_of(group);
    const float scale = c.adapters.scale[i];
    const Matrix dy_down =
        terms.set(index, c.adapters.a_of(i), c.adapters.b_of(i), Operands::kTransposed, dy_columns, scale);
    if (!needs.lora) return;
    const Matrix x_down = last_rows(
        low_rank_down(c.kernels, c.adapters.a_of(i), Operands::kAsStored, x_columns, group.count, scale, group.begin),
        group.count);
    const Columns x_by_token = pack(c.kernels, c.tokens, StepsAre::kRows, &rows);
    const Columns dy_by_token = pack(c.kernels, dy, StepsAre::kRows, &rows);
    const DType dtype = c.adapters.a.dtype;
    write_low_rank_grad(c.kernels, dy_down, x_by_token, c.w.k, true, dtype, of_adapter(d.lora_a, i));
    write_low_rank_grad(c.kernels, x_down, dy_by_token, c.w.n, false, dtype, of_adapter(d.lora_b, i));
  };
  if (needs.x || needs.lora) for_each_group(groups, run_group);
  if (needs.x)
    d.x = sum_of_terms(c.kernels, Operands::kTransposed, c.w.k, quantized(c.w), dy_columns, c.w.n, terms.get(), c.like,
                       nullptr, order.numbers);
  if (needs.bias) d.bias = bias_grad(c.kernels, dy);
  return d;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_multi(Tensor grad, Tensor x, Tensor packed, Tensor absmax,
                                                          OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                                          std::vector<int64_t> shape, std::string quant_type,
                                                          int64_t block_size, Tensor lora_a, Tensor lora_b,
                                                          Tensor scaling, Tensor adapter_of_row, bool needs_x,
                                                          bool needs_lora, bool needs_bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const Base base =
      check_base(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size, values_if(needs_lora));
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
