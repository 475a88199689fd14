// The op backward.experts for the CPU: gradients of the tokens, and of each expert's adapter and bias.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/cpu/experts.h"

namespace qlora::ops_cpu {
namespace {

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

void backward_tiles(const ExpertCall& c, const cpu::TileKernels& tiles, const ExpertGroups& groups, const Matrix& dy,
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
    token_factors.push_back({values, g.count, ranks, packed, ranks});
    cpu::FactorGradParams p{};
    p.factor = packed;
    p.m = g.count;
    p.r = ranks;
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

void backward_gemm(const ExpertCall& c, const ExpertGroups& groups, const Matrix& dy, const Needs& needs,
                   const Gradients& d) {
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
  const Experts e = check_experts(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size,
                                  expert_of_row, lora_a, with_ranks_side_by_side(lora_b, expert_of_row), scaling,
                                  std::nullopt, values_if(needs_lora));
  const int64_t n = e.w.n, k = e.w.k;
  const Matrix dy = tokens_matrix(grad, "grad", n, "out_features", x);
  STD_TORCH_CHECK(dy.rows == e.rows(), "grad has ", dy.rows, " rows: expert_of_row has ", e.rows(), " values");
  const ExpertRows rows(e);
  const ExpertCall call{kernels, e, rows, view_of(e.w)};
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
  for (const ExpertGroups& slice : rows.slices()) {
    if (tiles != nullptr)
      backward_tiles(call, *tiles, slice, dy, needs, d);
    else
      backward_gemm(call, slice, dy, needs, d);
  }
  return {needs.x ? sum_of_choices(e, d.rows, x) : nothing(), d.lora_a, d.lora_b, d.bias};
}

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) { m.impl("backward.experts", TORCH_BOX(&qlora::ops_cpu::backward_experts)); }
