// The ops forward.experts and its backward for the CPU: the products of all experts of a mixture in a few parallel
// loops. Every expert is multiplied by the kernel that `forward` would choose for its rows, with the same result.
#include "ops/cpu/experts.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace qlora::ops_cpu {
namespace {

using Groups = std::vector<ExpertGroup>;

// The checked arguments of a call.
struct Call {
  const cpu::KernelTable& kernels;
  const Experts& e;
  const ExpertRows& rows;
  WeightView stack;

  WeightView weight(const ExpertGroup& g) const { return weight_of_stack(stack, g.expert); }
  Matrix a(const ExpertGroup& g) const { return matrix_of_stack(e.adapter->a, g.expert, e.r); }
  Matrix b(const ExpertGroup& g) const { return matrix_of_stack(e.adapter->b, g.expert, stack.n); }
  const void* bias(const ExpertGroup& g) const { return e.bias ? matrix_of_stack(*e.bias, g.expert, 1).data : nullptr; }
  DType bias_dtype() const { return e.bias ? e.bias->dtype : DType::kFloat32; }
};

// Gathered rows of a matrix as packed columns of a gemm.
cpu::PackParams pack_rows_of(const Matrix& m, StepsAre steps_are, const int64_t* row_of, int64_t count, float* out) {
  const bool rows = steps_are == StepsAre::kRows;
  return {m.data, m.dtype, m.cols, rows, rows ? m.cols : count, rows ? count : m.cols, out, row_of};
}

int64_t packed_bytes_of(const cpu::KernelTable& kernels, int64_t cols, int64_t steps) {
  return kernels.packed_floats(cols, steps) * 4;
}

// A product with the gemm kernel, whose result is a float32 matrix [count, rows].
cpu::GemmParams float_product(const cpu::Term& term, Operands form, int64_t rows, int64_t count, float scale,
                              float* out) {
  cpu::GemmParams p;
  p.terms = &term;
  p.transposed = form == Operands::kTransposed;
  p.rows = rows;
  p.cols = count;
  p.scale = scale;
  p.out = out;
  p.out_ld = rows;
  return p;
}

// What the steps of a product on the gemm kernel have in common: operands and terms that outlive the loops.
struct GemmJob {
  WeightView weight;
  cpu::Term down, terms[2];  // of the down projection, and of the product
};

// ---- forward ----

void forward_gemv(const Call& c, const Groups& groups, void* y) {
  const int64_t n = c.stack.n, k = c.stack.k, r = c.e.r;
  if (groups.empty()) return;
  const bool with_words = k % kMinBlockSize == 0;
  const int64_t words = with_words ? c.kernels.words_floats(k) : 0;
  int64_t count = 0;
  for (const ExpertGroup& g : groups) count += g.count;
  const Tensor storage = empty_cpu({count * (k + words + r)}, ScalarType::Float);
  float *plain = storage.mutable_data_ptr<float>(), *by_word = plain + count * k, *x_down = by_word + count * words;
  std::vector<cpu::PackWordsParams> packs;
  std::vector<cpu::DotParams> downs;
  std::vector<cpu::GemvParams> products;
  const Matrix& x = c.e.tokens;
  for (const ExpertGroup& g : groups) {
    packs.push_back({x.data, x.dtype, k, plain, with_words ? by_word : nullptr, c.rows.tokens(g)});
    cpu::GemvParams p{};
    p.weight = c.weight(g);
    p.m = g.count;
    p.x_plain = plain;
    p.x_words = with_words ? by_word : nullptr;
    p.bias = c.bias(g);
    p.bias_dtype = c.bias_dtype();
    if (c.e.adapter) {
      const Matrix a = c.a(g), b = c.b(g);
      downs.push_back({a.data, a.dtype, r, k, plain, g.count, c.e.adapter->scaling, x_down});
      p.x_down = x_down;
      p.lora_b = b.data;
      p.lora_dtype = b.dtype;
      p.r = r;
    }
    p.y = y;
    p.dtype = x.dtype;
    p.out_row_of = c.rows.rows(g);
    products.push_back(p);
    plain += g.count * k;
    by_word += g.count * words;
    x_down += g.count * r;
  }
  // The number of tokens of a pack is that of its product.
  std::vector<std::pair<cpu::PackWordsParams, int64_t>> counted_packs;
  for (size_t i = 0; i < packs.size(); ++i) counted_packs.emplace_back(packs[i], groups[i].count);
  run_balanced(
      counted_packs, [](const auto& p) { return p.second; }, [&](const auto&) { return 8 * k; },
      [&](const auto& p, int64_t begin, int64_t end) { c.kernels.pack_words(p.first, begin, end); });
  run_balanced(
      downs, [](const cpu::DotParams& p) { return p.rows; }, [](const cpu::DotParams& p) { return p.k * p.m; },
      c.kernels.dot);
  run_balanced(
      products, [&](const cpu::GemvParams&) { return n; },
      [](const cpu::GemvParams& p) { return p.weight.k * (p.m + 3) + p.r * p.m; },
      [&](const cpu::GemvParams& p, int64_t begin, int64_t end) {
        c.kernels.gemv(p, begin, end, thread_scratch(c.kernels.gemv_scratch(p)));
      });
}

void forward_gemm(const Call& c, const Groups& groups, void* y) {
  const int64_t n = c.stack.n, k = c.stack.k, r = c.e.r;
  if (groups.empty()) return;
  Buffers buffers;
  for (const ExpertGroup& g : groups) {
    buffers.ask(packed_bytes_of(c.kernels, g.count, k));
    buffers.ask(g.count * r * 4);
    buffers.ask(packed_bytes_of(c.kernels, g.count, r));
  }
  buffers.allocate();
  std::vector<GemmJob> jobs(groups.size());
  std::vector<cpu::PackParams> packs, down_packs;
  std::vector<cpu::GemmParams> downs, products;
  for (size_t i = 0; i < groups.size(); ++i) {
    const ExpertGroup& g = groups[i];
    GemmJob& job = jobs[i];
    job.weight = c.weight(g);
    auto* columns = buffers.take<float>(packed_bytes_of(c.kernels, g.count, k));
    auto* x_down = buffers.take<float>(g.count * r * 4);
    auto* down_columns = buffers.take<float>(packed_bytes_of(c.kernels, g.count, r));
    packs.push_back(pack_rows_of(c.e.tokens, StepsAre::kColumns, c.rows.tokens(g), g.count, columns));
    job.terms[0] = {quantized(job.weight), columns, k};
    if (c.e.adapter) {
      job.down = {dense(c.a(g)), columns, k};
      downs.push_back(float_product(job.down, Operands::kAsStored, r, g.count, c.e.adapter->scaling, x_down));
      down_packs.push_back({x_down, DType::kFloat32, r, false, g.count, r, down_columns});
      job.terms[1] = {dense(c.b(g)), down_columns, r};
    }
    cpu::GemmParams p;
    p.terms = job.terms;
    p.term_count = c.e.adapter ? 2 : 1;
    p.rows = n;
    p.cols = g.count;
    p.bias = c.bias(g);
    p.bias_dtype = c.bias_dtype();
    p.out = y;
    p.out_dtype = c.e.tokens.dtype;
    p.out_ld = n;
    p.out_col_of = c.rows.rows(g);
    products.push_back(p);
  }
  run_packs(c.kernels, packs);
  run_gemms(c.kernels, downs);
  run_packs(c.kernels, down_packs);
  run_gemms(c.kernels, products);
}

void forward_tiles(const Call& c, const cpu::TileKernels& tiles, const Groups& groups, void* y) {
  const int64_t n = c.stack.n, k = c.stack.k, r = c.e.r;
  if (groups.empty() || n == 0) return;
  const bool by_nibble = cpu::unpacks_by_nibble(c.stack);
  const int64_t low_rank = r > 0 ? cpu::low_rank_steps(r, c.e.adapter->a.dtype) : 0;
  const auto token_bytes = [&](const ExpertGroup& g) {
    return cpu::tiles_of(g.count) * cpu::token_steps(k, low_rank) * cpu::kTileBytes;
  };
  const int64_t factor_bytes = r > 0 ? factor_of_a(c.a(groups[0]), r).packed_bytes() : 0;
  Buffers buffers;
  for (const ExpertGroup& g : groups) {
    buffers.ask(token_bytes(g));
    buffers.ask(factor_bytes);
  }
  buffers.allocate();
  std::vector<cpu::PackFactorParams> factors;
  std::vector<cpu::ForwardTokensParams> packs;
  std::vector<cpu::ForwardTilesParams> products;
  for (const ExpertGroup& g : groups) {
    cpu::ForwardTokensParams t{};
    cpu::ForwardTilesParams p{};
    t.x = c.e.tokens.data;
    t.m = g.count;
    t.k = k;
    t.by_nibble = by_nibble;
    t.out = buffers.take<uint8_t>(token_bytes(g));
    t.row_of = c.rows.tokens(g);
    auto* packed = buffers.take<uint8_t>(factor_bytes);
    if (c.e.adapter) {
      const Matrix b = c.b(g);
      t.factor = factor_of_a(c.a(g), r);
      t.adapters.scale = c.e.adapter->scaling;
      t.factor_rows = packed;
      factors.push_back({t.factor, t.adapters, true, by_nibble, packed});
      p.lora_b = b.data;
      p.lora_dtype = b.dtype;
      p.r = r;
      p.adapters = t.adapters;
    }
    packs.push_back(t);
    p.weight = c.weight(g);
    p.m = g.count;
    p.by_nibble = by_nibble;
    p.columns = t.out;
    p.bias = c.bias(g);
    p.bias_dtype = c.bias_dtype();
    p.y = y;
    p.out_row_of = c.rows.rows(g);
    products.push_back(p);
  }
  run_factor_packs(tiles, factors);
  run_forward_tokens(tiles, packs);
  run_forward_products(tiles, products);
}

// Zeros for the rows that no expert of this process computes.
void clear_rows(const std::vector<int64_t>& rows, int64_t cols, const Tensor& out) {
  const int64_t bytes = cols * out.element_size();
  auto* data = static_cast<char*>(out.mutable_data_ptr());
  for (const int64_t row : rows) std::fill_n(data + row * bytes, bytes, char{0});
}

// lora_b [experts, n, r] as kernels read it. PEFT's is a view of [n, r * experts], which is copied here for the experts
// in use; the rest of the copy stays uninitialised. (A permuted copy by torch takes ten times as long.)
OptionalTensor with_ranks_side_by_side(const OptionalTensor& lora_b, const Tensor& expert_of_row) {
  const bool is_known = lora_b.has_value() && lora_b->dim() == 3 && expert_of_row.scalar_type() == ScalarType::Long;
  if (!is_known || lora_b->is_contiguous() || !lora_b->is_cpu() || !expert_of_row.is_cpu()) return lora_b;
  const int64_t experts = lora_b->size(0), n = lora_b->size(1), r = lora_b->size(2);
  std::vector<bool> used(static_cast<size_t>(experts));
  const Tensor of_row = as_contiguous(expert_of_row);
  for (int64_t i = 0; i < of_row.numel(); ++i) {
    const int64_t expert = of_row.const_data_ptr<int64_t>()[i];
    if (expert >= 0 && expert < experts) used[static_cast<size_t>(expert)] = true;
  }
  const Tensor out = empty_of_shape(*lora_b);
  const auto copy = [&](auto* to, const auto* from) {
    const int64_t expert_stride = lora_b->stride(0), row_stride = lora_b->stride(1), rank_stride = lora_b->stride(2);
    parallel(n, rows_per_task(r * experts), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t expert = 0; expert < experts; ++expert) {
          if (!used[static_cast<size_t>(expert)]) continue;
          const auto* source = from + expert * expert_stride + row * row_stride;
          auto* target = to + (expert * n + row) * r;
          for (int64_t rank = 0; rank < r; ++rank) target[rank] = source[rank * rank_stride];
        }
    });
  };
  if (out.element_size() == 4)
    copy(static_cast<uint32_t*>(out.mutable_data_ptr()), static_cast<const uint32_t*>(lora_b->const_data_ptr()));
  else if (out.element_size() == 2)
    copy(static_cast<uint16_t*>(out.mutable_data_ptr()), static_cast<const uint16_t*>(lora_b->const_data_ptr()));
  else
    return lora_b;  // the check of the dtype will refuse it
  return out;
}

Tensor forward_experts(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                       OptionalTensor nested_offset, std::vector<int64_t> shape, std::string quant_type,
                       int64_t block_size, Tensor expert_of_row, OptionalTensor lora_a, OptionalTensor lora_b,
                       double scaling, OptionalTensor bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const Experts e = check_experts(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size,
                                  expert_of_row, lora_a, with_ranks_side_by_side(lora_b, expert_of_row), scaling, bias);
  const ExpertRows rows(e);
  const Call call{kernels, e, rows, view_of(e.w)};
  const Tensor y = empty_cpu({e.rows(), e.w.n}, x.scalar_type());
  clear_rows(rows.without_expert(), e.w.n, y);
  const cpu::TileKernels* tiles = tiles_for(kernels, e.tokens, x);
  for (const Groups& slice : rows.slices()) {
    Groups by_gemv, by_gemm, by_tiles;
    for (const ExpertGroup& g : slice) {
      const cpu::ForwardKernel kernel = cpu::select_forward(g.count, e.w.k, tiles);
      (kernel == cpu::ForwardKernel::kTiles  ? by_tiles
       : kernel == cpu::ForwardKernel::kGemm ? by_gemm
                                             : by_gemv)
          .push_back(g);
    }
    forward_gemv(call, by_gemv, y.mutable_data_ptr());
    forward_gemm(call, by_gemm, y.mutable_data_ptr());
    if (tiles != nullptr) forward_tiles(call, *tiles, by_tiles, y.mutable_data_ptr());
  }
  return y;
}

// ---- backward ----

// What a backward call returns; an empty tensor for what was not requested.
struct Gradients {
  Tensor rows = nothing(), lora_a = nothing(), lora_b = nothing(), bias = nothing();  // rows [rows, k]
};
struct Needs {
  bool x, lora, bias;
};

// The part of a gradient [experts, …] that belongs to one expert.
void* of_expert(const Tensor& gradient, const ExpertGroup& g) {
  const int64_t bytes = gradient.numel() / gradient.size(0) * gradient.element_size();
  return static_cast<char*>(gradient.mutable_data_ptr()) + g.expert * bytes;
}

void backward_tiles(const Call& c, const cpu::TileKernels& tiles, const Groups& groups, const Matrix& dy,
                    const Needs& needs, const Gradients& d) {
  const int64_t n = c.stack.n, k = c.stack.k, r = c.e.r;
  const bool adapts = r > 0 && (needs.x || needs.lora), by_nibble = cpu::unpacks_by_nibble(c.stack);
  const DType dtype = adapts ? c.e.adapter->a.dtype : DType::kFloat32;
  const int64_t row_steps = cpu::token_steps(n, adapts ? cpu::low_rank_steps(r, dtype) : 0);
  const auto row_bytes = [&](const ExpertGroup& g) {
    return needs.x ? cpu::tiles_of(g.count) * row_steps * cpu::kTileBytes : 0;
  };
  const auto activation_bytes = [&](const ExpertGroup& g) { return adapts ? g.count * r * 4 : 0; };
  const auto token_factor_bytes = [&](const ExpertGroup& g, int64_t ranks) {
    return cpu::tiles_of(ranks) * 2 * ceil_div(g.count, cpu::kStep) * cpu::kTileBytes;
  };
  const int64_t b_bytes = adapts ? factor_of_b(c.b(groups[0]), n).packed_bytes() : 0;
  const int64_t a_bytes = adapts && needs.lora ? factor_of_a(c.a(groups[0]), r).packed_bytes() : 0;
  int64_t most = 0;
  Buffers buffers;
  for (const ExpertGroup& g : groups) {
    most = std::max(most, g.count);
    buffers.ask(row_bytes(g));
    buffers.ask(activation_bytes(g));
    buffers.ask(b_bytes);
    if (needs.lora) {
      buffers.ask(activation_bytes(g));
      buffers.ask(a_bytes);
      buffers.ask(token_factor_bytes(g, r));
      buffers.ask(token_factor_bytes(g, r));
    }
    if (needs.bias) buffers.ask(token_factor_bytes(g, 1));
  }
  buffers.allocate();
  const std::vector<float> ones(static_cast<size_t>(needs.bias ? most : 0), 1.0f);

  std::vector<cpu::PackFactorParams> factors;
  std::vector<cpu::BackwardTokensParams> tokens;
  std::vector<cpu::BackwardTilesParams> products;
  std::vector<cpu::PackTokenFactorParams> token_factors;
  std::vector<cpu::FactorGradParams> grads;
  // Adds one gradient, the sum over tokens of values [count, ranks] times rows of `matrix`.
  const auto add_grad = [&](const ExpertGroup& g, const float* values, int64_t ranks, const Matrix& matrix,
                            const int64_t* row_of, bool r_is_major, const Tensor& out) {
    auto* packed = buffers.take<uint8_t>(token_factor_bytes(g, ranks));
    token_factors.push_back({values, g.count, ranks, packed});
    cpu::FactorGradParams p{};
    p.factor = packed;
    p.m = g.count;
    p.r = p.group = ranks;
    p.features = matrix.cols;
    p.matrix = matrix.data;
    p.r_is_major = r_is_major;
    p.out = of_expert(out, g);
    p.out_dtype = float_dtype(out.scalar_type(), "lora");
    p.row_of = row_of;
    grads.push_back(p);
  };
  for (const ExpertGroup& g : groups) {
    cpu::BackwardTokensParams t{};
    t.dy = dy.data;
    t.m = g.count;
    t.n = n;
    t.row_of = c.rows.rows(g);
    auto* packed_rows = buffers.take<uint8_t>(row_bytes(g));
    t.out = needs.x ? packed_rows : nullptr;
    auto* dy_down = buffers.take<float>(activation_bytes(g));
    auto* packed_b = buffers.take<uint8_t>(b_bytes);
    if (adapts) {
      t.factor = factor_of_b(c.b(g), n);
      t.adapters.scale = c.e.adapter->scaling;
      t.factor_columns = packed_b;
      t.dy_down = dy_down;
      factors.push_back({t.factor, t.adapters, false, false, packed_b});
    }
    if (needs.x || adapts) tokens.push_back(t);
    if (needs.x) {
      cpu::BackwardTilesParams p{};
      p.weight = c.weight(g);
      p.m = g.count;
      p.by_nibble = by_nibble;
      p.rows = packed_rows;
      p.row_steps = row_steps;
      if (adapts) {
        p.lora_a = c.a(g).data;
        p.lora_dtype = dtype;
        p.r = r;
        p.adapters = t.adapters;
      }
      p.dx = d.rows.mutable_data_ptr();
      p.out_row_of = c.rows.rows(g);
      products.push_back(p);
    }
    if (needs.lora) {
      auto* x_down = buffers.take<float>(activation_bytes(g));
      auto* packed_a = buffers.take<uint8_t>(a_bytes);
      cpu::BackwardTokensParams down{};
      down.dy = c.e.tokens.data;
      down.m = g.count;
      down.n = k;
      down.row_of = c.rows.tokens(g);
      down.factor = factor_of_a(c.a(g), r);
      down.adapters = t.adapters;
      down.factor_columns = packed_a;
      down.dy_down = x_down;
      factors.push_back({down.factor, down.adapters, false, false, packed_a});
      tokens.push_back(down);
      add_grad(g, dy_down, r, c.e.tokens, c.rows.tokens(g), true, d.lora_a);
      add_grad(g, x_down, r, dy, c.rows.rows(g), false, d.lora_b);
    }
    if (needs.bias) add_grad(g, ones.data(), 1, dy, c.rows.rows(g), true, d.bias);
  }
  run_factor_packs(tiles, factors);
  run_backward_tokens(tiles, tokens);
  if (k > 0) run_backward_products(tiles, products);
  run_token_factor_packs(tiles, token_factors);
  run_factor_grads(tiles, grads);
}

void backward_gemm(const Call& c, const Groups& groups, const Matrix& dy, const Needs& needs, const Gradients& d) {
  const int64_t n = c.stack.n, k = c.stack.k, r = c.e.r;
  const bool adapts = r > 0 && (needs.x || needs.lora), by_token = needs.lora || needs.bias;
  int64_t most = 0;
  Buffers buffers;
  const auto columns_bytes = [&](int64_t cols, int64_t steps) { return packed_bytes_of(c.kernels, cols, steps); };
  for (const ExpertGroup& g : groups) {
    most = std::max(most, g.count);
    if (needs.x || adapts) buffers.ask(columns_bytes(g.count, n));
    if (adapts) {
      buffers.ask(g.count * r * 4);
      buffers.ask(columns_bytes(g.count, r));
    }
    if (by_token) buffers.ask(columns_bytes(n, g.count));
    if (needs.lora) {
      buffers.ask(columns_bytes(g.count, k));
      buffers.ask(columns_bytes(k, g.count));
      buffers.ask(g.count * r * 4);
    }
  }
  buffers.allocate();
  const std::vector<float> ones(static_cast<size_t>(needs.bias ? most : 0), 1.0f);

  struct Job : GemmJob {
    cpu::Term x_down, grad_a, grad_b, grad_bias;
  };
  std::vector<Job> jobs(groups.size());
  std::vector<cpu::PackParams> packs, down_packs;
  std::vector<cpu::GemmParams> downs, products;
  // A gradient of a factor: the sum over tokens of values [count, ranks] times packed columns [count, features].
  const auto add_grad = [&](cpu::Term& term, const ExpertGroup& g, const float* values, int64_t ranks,
                            const float* columns, int64_t features, bool r_is_major, const Tensor& out) {
    cpu::Operand operand;
    operand.dense = values;
    operand.ld = ranks;
    term = {operand, columns, g.count};
    cpu::GemmParams p = float_product(term, Operands::kTransposed, ranks, features, 1.0f, nullptr);
    p.out = of_expert(out, g);
    p.out_dtype = float_dtype(out.scalar_type(), "lora");
    p.out_ld = r_is_major ? features : ranks;
    p.rows_are_major = r_is_major;
    products.push_back(p);
  };
  for (size_t i = 0; i < groups.size(); ++i) {
    const ExpertGroup& g = groups[i];
    Job& job = jobs[i];
    job.weight = c.weight(g);
    const float* dy_columns = nullptr;
    if (needs.x || adapts) {
      auto* columns = buffers.take<float>(columns_bytes(g.count, n));
      packs.push_back(pack_rows_of(dy, StepsAre::kColumns, c.rows.rows(g), g.count, columns));
      dy_columns = columns;
    }
    float *dy_down = nullptr, *down_columns = nullptr;
    if (adapts) {
      dy_down = buffers.take<float>(g.count * r * 4);
      down_columns = buffers.take<float>(columns_bytes(g.count, r));
      job.down = {dense(c.b(g)), dy_columns, n};
      downs.push_back(float_product(job.down, Operands::kTransposed, r, g.count, c.e.adapter->scaling, dy_down));
      down_packs.push_back({dy_down, DType::kFloat32, r, false, g.count, r, down_columns});
    }
    if (needs.x) {
      job.terms[0] = {quantized(job.weight), dy_columns, n};
      if (adapts) job.terms[1] = {dense(c.a(g)), down_columns, r};
      cpu::GemmParams p;
      p.terms = job.terms;
      p.term_count = adapts ? 2 : 1;
      p.transposed = true;
      p.rows = k;
      p.cols = g.count;
      p.out = d.rows.mutable_data_ptr();
      p.out_dtype = c.e.tokens.dtype;
      p.out_ld = k;
      p.out_col_of = c.rows.rows(g);
      products.push_back(p);
    }
    const float* dy_by_token = nullptr;
    if (by_token) {
      auto* columns = buffers.take<float>(columns_bytes(n, g.count));
      packs.push_back(pack_rows_of(dy, StepsAre::kRows, c.rows.rows(g), g.count, columns));
      dy_by_token = columns;
    }
    if (needs.lora) {
      auto* columns = buffers.take<float>(columns_bytes(g.count, k));
      auto* x_by_token = buffers.take<float>(columns_bytes(k, g.count));
      auto* x_down = buffers.take<float>(g.count * r * 4);
      packs.push_back(pack_rows_of(c.e.tokens, StepsAre::kColumns, c.rows.tokens(g), g.count, columns));
      packs.push_back(pack_rows_of(c.e.tokens, StepsAre::kRows, c.rows.tokens(g), g.count, x_by_token));
      job.x_down = {dense(c.a(g)), columns, k};
      downs.push_back(float_product(job.x_down, Operands::kAsStored, r, g.count, c.e.adapter->scaling, x_down));
      add_grad(job.grad_a, g, dy_down, r, x_by_token, k, true, d.lora_a);
      add_grad(job.grad_b, g, x_down, r, dy_by_token, n, false, d.lora_b);
    }
    if (needs.bias) add_grad(job.grad_bias, g, ones.data(), 1, dy_by_token, n, true, d.bias);
  }
  run_packs(c.kernels, packs);
  run_gemms(c.kernels, downs);
  run_packs(c.kernels, down_packs);
  run_gemms(c.kernels, products);
}

// dx [..., k]: the sum of the gradients of a token's rows, each rounded to the dtype of x.
Tensor sum_of_choices(const Experts& e, const Tensor& rows, const Tensor& x) {
  if (e.rows() == 0) return torch::stable::new_zeros(x, x.sizes());
  if (e.choices == 1) return torch::stable::reshape(rows, x.sizes());
  const Tensor by_token = torch::stable::view(rows, {e.tokens.rows, e.choices, e.w.k});
  return torch::stable::reshape(torch::stable::sum(by_token, std::vector<int64_t>{1}), x.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_experts(
    Tensor grad, Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
    std::vector<int64_t> shape, std::string quant_type, int64_t block_size, Tensor expert_of_row, OptionalTensor lora_a,
    OptionalTensor lora_b, double scaling, bool needs_x, bool needs_lora, bool needs_bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const Experts e =
      check_experts(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size, expert_of_row,
                    lora_a, with_ranks_side_by_side(lora_b, expert_of_row), scaling, std::nullopt);
  const int64_t n = e.w.n, k = e.w.k;
  const Matrix dy = tokens_matrix(grad, "grad", n, "out_features", x);
  STD_TORCH_CHECK(dy.rows == e.rows(), "grad has ", dy.rows, " rows: expert_of_row has ", e.rows(), " values");
  const ExpertRows rows(e);
  const Call call{kernels, e, rows, view_of(e.w)};
  const Needs needs{needs_x, needs_lora && e.adapter.has_value(), needs_bias};
  Gradients d;
  if (needs.x) {
    d.rows = empty_cpu({e.rows(), k}, x.scalar_type());
    clear_rows(rows.without_expert(), k, d.rows);
  }
  if (needs.lora) {  // zeros for the experts without rows
    d.lora_a = torch::stable::new_zeros(*lora_a, {e.count, e.r, k}, lora_a->scalar_type());
    d.lora_b = torch::stable::new_zeros(*lora_b, {e.count, n, e.r}, lora_b->scalar_type());
  }
  if (needs.bias) d.bias = torch::stable::new_zeros(x, {e.count, n}, ScalarType::Float);
  const cpu::TileKernels* tiles = tiles_for(kernels, dy, x);
  for (const Groups& slice : rows.slices()) {
    if (tiles != nullptr)
      backward_tiles(call, *tiles, slice, dy, needs, d);
    else
      backward_gemm(call, slice, dy, needs, d);
  }
  return {needs.x ? sum_of_choices(e, d.rows, x) : nothing(), d.lora_a, d.lora_b, d.bias};
}

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("forward.experts", TORCH_BOX(&qlora::ops_cpu::forward_experts));
  m.impl("backward.experts", TORCH_BOX(&qlora::ops_cpu::backward_experts));
}
