// The op backward.many for the CPU: the gradient of the tokens that several layers share, as one sum over all layers,
// and the gradients of each layer's adapter and bias.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/cpu/steps.h"

namespace qlora::ops_cpu {
namespace {

// What a backward call returns; an empty tensor for what was not requested.
struct Gradients {
  Tensor x = nothing();
  std::vector<Tensor> lora_a, lora_b, bias;

  explicit Gradients(size_t layers) : lora_a(layers, Tensor()), lora_b(layers, Tensor()), bias(layers, Tensor()) {
    for (auto* list : {&lora_a, &lora_b, &bias})
      for (Tensor& t : *list) t = nothing();
  }
};
struct Needs {
  bool x, lora, bias;

  bool lora_of(const Layer& layer) const { return lora && layer.adapter; }
  bool dy_down_of(const Layer& layer) const { return (x || lora) && layer.adapter; }
};
// The gradients of the results that were used, by layer.
using Grads = std::vector<std::optional<Matrix>>;

void backward_tiles(const cpu::TileKernels& tiles, const Layers& layers, const Grads& grads, const Needs& needs,
                    const Gradients& d) {
  const Matrix& x = layers.tokens;
  const int64_t m = x.rows, k = x.cols;
  const bool needs_dx = needs.x && k > 0;
  const auto row_steps = [&](const Layer& layer) {
    const int64_t low_rank =
        needs.dy_down_of(layer) ? cpu::low_rank_steps(layer.adapter->a.rows, layer.adapter->a.dtype) : 0;
    return cpu::token_steps(layer.w.n, low_rank);
  };
  const auto row_bytes = [&](const Layer& layer) {
    return needs_dx ? cpu::tiles_of(m) * row_steps(layer) * cpu::kTileBytes : 0;
  };
  const auto token_factor_bytes = [&](int64_t ranks) {
    return cpu::tiles_of(ranks) * 2 * ceil_div(m, cpu::kStep) * cpu::kTileBytes;
  };
  Buffers buffers;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i]) continue;
    const Layer& layer = layers.all[i];
    buffers.ask(row_bytes(layer));
    if (needs.dy_down_of(layer)) {
      const int64_t r = layer.adapter->a.rows;
      buffers.ask(m * r * 4);
      buffers.ask(backward_term(*layer.adapter).down.packed_bytes());
      if (needs.lora) {
        buffers.ask(m * r * 4);
        buffers.ask(forward_term(*layer.adapter).down.packed_bytes());
        buffers.ask(token_factor_bytes(r));
        buffers.ask(token_factor_bytes(r));
      }
    }
    if (needs.bias) buffers.ask(token_factor_bytes(1));
  }
  buffers.allocate();
  const std::vector<float> ones(static_cast<size_t>(needs.bias ? m : 0), 1.0f);

  std::vector<cpu::PackFactorParams> factors;
  std::vector<cpu::BackwardTokensParams> tokens;
  std::vector<cpu::BackwardTilesParams> products;  // the terms of dx
  std::vector<cpu::PackTokenFactorParams> token_factors;
  std::vector<cpu::FactorGradParams> factor_grads;
  // Adds one gradient, the sum over tokens of values [m, ranks] times `matrix`.
  const auto add_grad = [&](const float* values, int64_t ranks, const Matrix& matrix, bool r_is_major,
                            const Tensor& out) {
    auto* packed = buffers.take<uint8_t>(token_factor_bytes(ranks));
    token_factors.push_back({values, m, ranks, packed});
    cpu::FactorGradParams p{};
    p.factor = packed;
    p.m = m;
    p.r = p.group = ranks;
    p.features = matrix.cols;
    p.matrix = matrix.data;
    p.r_is_major = r_is_major;
    p.out = out.mutable_data_ptr();
    p.out_dtype = float_dtype(out.scalar_type(), "lora");
    factor_grads.push_back(p);
  };
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i]) continue;
    const Layer& layer = layers.all[i];
    const Matrix& dy = *grads[i];
    cpu::BackwardTokensParams t{};
    t.dy = dy.data;
    t.m = m;
    t.n = dy.cols;
    auto* packed_rows = buffers.take<uint8_t>(row_bytes(layer));
    t.out = needs_dx ? packed_rows : nullptr;
    cpu::BackwardTilesParams p{};
    p.weight = view_of(layer.w);
    p.m = m;
    p.by_nibble = cpu::unpacks_by_nibble(p.weight);
    p.rows = packed_rows;
    p.row_steps = row_steps(layer);
    p.dx = d.x.mutable_data_ptr();
    if (needs.dy_down_of(layer)) {
      const TileAdapterTerm term = backward_term(*layer.adapter);
      const int64_t r = term.down.r;
      auto* dy_down = buffers.take<float>(m * r * 4);
      auto* packed_b = buffers.take<uint8_t>(term.down.packed_bytes());
      t.factor = term.down;
      t.adapters = p.adapters = term.adapters;
      t.factor_columns = packed_b;
      t.dy_down = dy_down;
      factors.push_back({t.factor, t.adapters, false, false, packed_b});
      p.lora_a = term.up;
      p.lora_dtype = term.down.dtype;
      p.r = r;
      if (needs.lora) {
        cpu::BackwardTokensParams down{};
        down.dy = x.data;
        down.m = m;
        down.n = k;
        down.factor = forward_term(*layer.adapter).down;
        down.adapters = term.adapters;
        down.dy_down = buffers.take<float>(m * r * 4);
        auto* packed_a = buffers.take<uint8_t>(down.factor.packed_bytes());
        down.factor_columns = packed_a;
        factors.push_back({down.factor, down.adapters, false, false, packed_a});
        tokens.push_back(down);
        add_grad(dy_down, r, x, true, d.lora_a[i]);
        add_grad(down.dy_down, r, dy, false, d.lora_b[i]);
      }
    }
    if (needs_dx || needs.dy_down_of(layer)) tokens.push_back(t);
    if (needs_dx && dy.cols > 0) products.push_back(p);
    if (needs.bias) add_grad(ones.data(), 1, dy, true, d.bias[i]);
  }
  run_factor_packs(tiles, factors);
  run_backward_tokens(tiles, tokens);
  if (!products.empty()) {
    for (size_t i = 0; i + 1 < products.size(); ++i) products[i].next = &products[i + 1];
    const cpu::BackwardTilesParams& sum = products.front();
    parallel(tiles.backward_items(sum), 1, [&](int64_t begin, int64_t end) {
      tiles.backward(sum, begin, end, thread_scratch(tiles.backward_scratch(sum)));
    });
  } else if (needs_dx) {
    Tensor dx = d.x;
    torch::stable::zero_(dx);
  }
  run_token_factor_packs(tiles, token_factors);
  run_factor_grads(tiles, factor_grads);
}

void backward_gemm(const cpu::KernelTable& kernels, const Layers& layers, const Grads& grads, const Needs& needs,
                   const Gradients& d) {
  const Matrix& x = layers.tokens;
  const int64_t m = x.rows, k = x.cols;
  const auto by_token = [&](const Layer& layer) { return needs.lora_of(layer) || needs.bias; };
  const auto by_column = [&](const Layer& layer) { return needs.x || needs.lora_of(layer); };
  bool needs_lora = false;
  Buffers buffers;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i]) continue;
    const Layer& layer = layers.all[i];
    const int64_t n = layer.w.n;
    if (by_column(layer)) buffers.ask(packed_bytes_of(kernels, m, n));
    if (needs.dy_down_of(layer)) {
      buffers.ask(m * layer.adapter->a.rows * 4);
      if (needs.x) buffers.ask(packed_bytes_of(kernels, m, layer.adapter->a.rows));
    }
    if (by_token(layer)) buffers.ask(packed_bytes_of(kernels, n, m));
    if (needs.lora_of(layer)) buffers.ask(m * layer.adapter->a.rows * 4);
    needs_lora = needs_lora || needs.lora_of(layer);
  }
  if (needs_lora) {
    buffers.ask(packed_bytes_of(kernels, m, k));
    buffers.ask(packed_bytes_of(kernels, k, m));
  }
  buffers.allocate();
  const std::vector<float> ones(static_cast<size_t>(needs.bias ? m : 0), 1.0f);

  struct Job {
    WeightView weight;
    cpu::Term dy_down, x_down, grad_a, grad_b, grad_bias;
  };
  std::vector<Job> jobs(grads.size());
  std::vector<cpu::Term> dx_terms, dx_low_rank_terms;
  std::vector<cpu::PackParams> packs, down_packs;
  std::vector<cpu::GemmParams> downs, products;
  const auto packed = [&](const Matrix& matrix, StepsAre steps_are) {
    const bool rows = steps_are == StepsAre::kRows;
    const int64_t cols = rows ? matrix.cols : m, steps = rows ? m : matrix.cols;
    auto* out = buffers.take<float>(packed_bytes_of(kernels, cols, steps));
    packs.push_back({matrix.data, matrix.dtype, matrix.cols, rows, cols, steps, out});
    return out;
  };
  // Adds one gradient: the sum over tokens of values [m, ranks] times packed columns [m, features].
  const auto add_grad = [&](cpu::Term& term, const float* values, int64_t ranks, const float* columns, int64_t features,
                            bool r_is_major, const Tensor& out) {
    cpu::Operand operand;
    operand.dense = values;
    operand.ld = ranks;
    term = {operand, columns, m};
    cpu::GemmParams p = float_product(term, Operands::kTransposed, ranks, features, 1.0f, nullptr);
    p.out = out.mutable_data_ptr();
    p.out_dtype = float_dtype(out.scalar_type(), "lora");
    p.out_ld = r_is_major ? features : ranks;
    p.rows_are_major = r_is_major;
    products.push_back(p);
  };
  const float *x_columns = nullptr, *x_by_token = nullptr;
  if (needs_lora) {
    x_columns = packed(x, StepsAre::kColumns);
    x_by_token = packed(x, StepsAre::kRows);
  }
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i]) continue;
    const Layer& layer = layers.all[i];
    const Matrix& dy = *grads[i];
    const int64_t n = layer.w.n;
    Job& job = jobs[i];
    job.weight = view_of(layer.w);
    const float* dy_columns = by_column(layer) ? packed(dy, StepsAre::kColumns) : nullptr;
    if (needs.x) dx_terms.push_back({quantized(job.weight), dy_columns, n});
    float* dy_down = nullptr;
    if (needs.dy_down_of(layer)) {
      const Adapter& adapter = *layer.adapter;
      const int64_t r = adapter.a.rows;
      dy_down = buffers.take<float>(m * r * 4);
      job.dy_down = {dense(adapter.b), dy_columns, n};
      downs.push_back(float_product(job.dy_down, Operands::kTransposed, r, m, adapter.scaling, dy_down));
      if (needs.x) {
        auto* columns = buffers.take<float>(packed_bytes_of(kernels, m, r));
        down_packs.push_back({dy_down, DType::kFloat32, r, false, m, r, columns});
        dx_low_rank_terms.push_back({dense(adapter.a), columns, r});
      }
    }
    const float* dy_by_token = by_token(layer) ? packed(dy, StepsAre::kRows) : nullptr;
    if (needs.lora_of(layer)) {
      const Adapter& adapter = *layer.adapter;
      const int64_t r = adapter.a.rows;
      auto* x_down = buffers.take<float>(m * r * 4);
      job.x_down = {dense(adapter.a), x_columns, k};
      downs.push_back(float_product(job.x_down, Operands::kAsStored, r, m, adapter.scaling, x_down));
      add_grad(job.grad_a, dy_down, r, x_by_token, k, true, d.lora_a[i]);
      add_grad(job.grad_b, x_down, r, dy_by_token, n, false, d.lora_b[i]);
    }
    if (needs.bias) add_grad(job.grad_bias, ones.data(), 1, dy_by_token, n, true, d.bias[i]);
  }
  dx_terms.insert(dx_terms.end(), dx_low_rank_terms.begin(), dx_low_rank_terms.end());
  if (needs.x) {
    cpu::GemmParams p;
    p.terms = dx_terms.data();
    p.term_count = static_cast<int64_t>(dx_terms.size());
    p.transposed = true;
    p.rows = k;
    p.cols = m;
    p.out = d.x.mutable_data_ptr();
    p.out_dtype = x.dtype;
    p.out_ld = k;
    products.insert(products.begin(), p);  // its units are the largest, the others fill the threads up
  }
  run_packs(kernels, packs);
  run_gemms(kernels, downs);
  run_packs(kernels, down_packs);
  run_gemms(kernels, products);
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> backward_many(
    std::vector<Tensor> grad, Tensor x, std::vector<Tensor> packed, std::vector<Tensor> absmax,
    std::vector<Tensor> nested_absmax, std::vector<Tensor> nested_offset, std::vector<int64_t> out_features,
    std::string quant_type, int64_t block_size, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
    std::vector<double> scaling, bool needs_x, bool needs_lora, bool needs_bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const LayerLists lists{packed, absmax, nested_absmax, nested_offset, out_features, lora_a, lora_b, scaling};
  check_lists(lists, "grad", grad);
  const Layers layers = check_layers(x, lists, quant_type, block_size, nullptr);
  const Needs needs{needs_x, needs_lora, needs_bias};
  Grads grads(layers.all.size());
  Gradients d(layers.all.size());
  bool on_tiles = true;
  for_each_layer(layers.all.size(), [&](size_t i) {
    const Layer& layer = layers.all[i];
    if (!optional_of(grad[i])) return;
    grads[i] = grad_matrix(grad[i], layer.w.n, layers.tokens);
    on_tiles = on_tiles && tiles_for(kernels, *grads[i], x) != nullptr;
    if (needs.lora_of(layer)) {
      d.lora_a[i] = empty_of_shape(lora_a[i]);
      d.lora_b[i] = empty_of_shape(lora_b[i]);
    }
    if (needs.bias) d.bias[i] = empty_cpu({layer.w.n}, ScalarType::Float);
  });
  if (needs.x) d.x = on_huge_pages(empty_of_shape(x));
  const cpu::TileKernels* tiles = on_tiles ? tiles_for(kernels, layers.tokens, x) : nullptr;
  if (tiles != nullptr)
    backward_tiles(*tiles, layers, grads, needs, d);
  else
    backward_gemm(kernels, layers, grads, needs, d);
  return {d.x, d.lora_a, d.lora_b, d.bias};
}

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) { m.impl("backward.many", TORCH_BOX(&qlora::ops_cpu::backward_many)); }
