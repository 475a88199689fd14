// The op backward.many for the CPU: the gradient of the tokens that several layers share, as one sum over all layers,
// and the gradients of each layer's adapter and bias.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/cpu/steps.h"

namespace qlora::ops_cpu {
namespace {

// The gradient of the tokens is computed for so many at a time, because the packed gradients of all layers together may
// be large. W is unpacked again for each slice, as it is for each block of tokens anyway.
constexpr int64_t kSliceTokens = 1024;

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
};

// A layer whose result was used.
struct UsedLayer {
  const Layer* layer;
  const Tensor *d_lora_a, *d_lora_b, *d_bias;
  WeightView weight;
  Matrix dy;      // [m, n]
  int64_t r = 0;  // 0: no adapter, or no gradient needs it
  Tensor dy_down = {},
         x_down = {};  // float32 [m, r]: scaling * dy · lora_b, and scaling * x lora_aᵀ for the gradient of lora_b

  const Matrix& a() const { return layer->adapter->a; }
  const Matrix& b() const { return layer->adapter->b; }
  float scaling() const { return layer->adapter->scaling; }
};
using UsedLayers = std::vector<UsedLayer>;

float* row_of(const Tensor& t, int64_t row, int64_t cols) { return t.mutable_data_ptr<float>() + row * cols; }

const void* row_of(const Matrix& m, int64_t row) {
  return static_cast<const char*>(m.data) + row * m.cols * float_bytes(m.dtype);
}

// ---- on tiles ----

// dx, and dy_down of every layer.
void token_grads_tiles(const cpu::TileKernels& tiles, const UsedLayers& layers, const Matrix& x, bool needs_dx,
                       const Tensor& d_x) {
  const auto row_steps = [](const UsedLayer& l) {
    return cpu::token_steps(l.dy.cols, l.r > 0 ? cpu::low_rank_steps(l.r, l.a().dtype) : 0);
  };
  const int64_t most = std::min(x.rows, kSliceTokens);
  const auto row_bytes = [&](const UsedLayer& l) {
    return needs_dx ? cpu::tiles_of(most) * row_steps(l) * cpu::kTileBytes : 0;
  };
  Buffers buffers;
  for (const UsedLayer& l : layers) {
    buffers.ask(row_bytes(l));
    if (l.r > 0) buffers.ask(backward_term(*l.layer->adapter).down.packed_bytes());
  }
  buffers.allocate();
  std::vector<cpu::PackFactorParams> factors;
  std::vector<cpu::BackwardTokensParams> tokens;
  std::vector<cpu::BackwardTilesParams> products;  // the terms of dx
  for (const UsedLayer& l : layers) {
    cpu::BackwardTokensParams t{};
    cpu::BackwardTilesParams p{};
    t.n = l.dy.cols;
    auto* rows = buffers.take<uint8_t>(row_bytes(l));
    t.out = needs_dx ? rows : nullptr;
    p.weight = l.weight;
    p.by_nibble = cpu::unpacks_by_nibble(p.weight);
    p.rows = rows;
    p.row_steps = row_steps(l);
    if (l.r > 0) {
      const TileAdapterTerm term = backward_term(*l.layer->adapter);
      auto* packed = buffers.take<uint8_t>(term.down.packed_bytes());
      t.factor = term.down;
      t.adapters = p.adapters = term.adapters;
      t.factor_columns = packed;
      factors.push_back({t.factor, t.adapters, false, false, packed});
      p.lora_a = term.up;
      p.lora_dtype = term.down.dtype;
      p.r = l.r;
    }
    tokens.push_back(t);
    products.push_back(p);
  }
  for (size_t i = 0; i + 1 < products.size(); ++i) products[i].next = &products[i + 1];
  run_factor_packs(tiles, factors);
  auto* dx = static_cast<uint16_t*>(d_x.mutable_data_ptr());
  for (int64_t first = 0; first < x.rows; first += kSliceTokens) {
    const int64_t count = std::min(kSliceTokens, x.rows - first);
    for (size_t i = 0; i < layers.size(); ++i) {
      tokens[i].m = products[i].m = count;
      tokens[i].dy = row_of(layers[i].dy, first);
      if (layers[i].r > 0) tokens[i].dy_down = row_of(layers[i].dy_down, first, layers[i].r);
    }
    run_backward_tokens(tiles, tokens);
    if (!needs_dx) continue;
    cpu::BackwardTilesParams& sum = products.front();
    sum.dx = dx + first * x.cols;
    parallel(tiles.backward_items(sum), 1, [&](int64_t begin, int64_t end) {
      tiles.backward(sum, begin, end, thread_scratch(tiles.backward_scratch(sum)));
    });
  }
}

void parameter_grads_tiles(const cpu::TileKernels& tiles, const UsedLayers& layers, const Matrix& x,
                           const Needs& needs) {
  const int64_t m = x.rows;
  const auto token_factor_bytes = [&](int64_t ranks) {
    return cpu::tiles_of(ranks) * 2 * ceil_div(m, cpu::kStep) * cpu::kTileBytes;
  };
  const auto has_factors = [&](const UsedLayer& l) { return needs.lora && l.r > 0; };
  Buffers buffers;
  for (const UsedLayer& l : layers) {
    if (has_factors(l)) {
      buffers.ask(forward_term(*l.layer->adapter).down.packed_bytes());
      buffers.ask(token_factor_bytes(l.r));
      buffers.ask(token_factor_bytes(l.r));
    }
    if (needs.bias) buffers.ask(token_factor_bytes(1));
  }
  buffers.allocate();
  const std::vector<float> ones(static_cast<size_t>(needs.bias ? m : 0), 1.0f);
  std::vector<cpu::PackFactorParams> factors;
  std::vector<cpu::BackwardTokensParams> downs;
  std::vector<cpu::PackTokenFactorParams> token_factors;
  std::vector<cpu::FactorGradParams> grads;
  // Adds one gradient, the sum over tokens of values [m, ranks] times `matrix`.
  const auto add_grad = [&](const float* values, int64_t ranks, const Matrix& matrix, bool r_is_major,
                            const Tensor& out) {
    auto* packed = buffers.take<uint8_t>(token_factor_bytes(ranks));
    token_factors.push_back({values, m, ranks, packed, ranks});
    cpu::FactorGradParams p{};
    p.factor = packed;
    p.m = m;
    p.r = ranks;
    p.features = matrix.cols;
    p.matrix = matrix.data;
    p.r_is_major = r_is_major;
    p.out = out.mutable_data_ptr();
    p.out_dtype = float_dtype(out.scalar_type(), "lora");
    grads.push_back(p);
  };
  for (const UsedLayer& l : layers) {
    if (has_factors(l)) {
      const TileAdapterTerm term = forward_term(*l.layer->adapter);
      auto* packed = buffers.take<uint8_t>(term.down.packed_bytes());
      cpu::BackwardTokensParams down{};
      down.dy = x.data;
      down.m = m;
      down.n = x.cols;
      down.factor = term.down;
      down.adapters = term.adapters;
      down.factor_columns = packed;
      down.dy_down = row_of(l.x_down, 0, l.r);
      factors.push_back({down.factor, down.adapters, false, false, packed});
      downs.push_back(down);
      add_grad(row_of(l.dy_down, 0, l.r), l.r, x, true, *l.d_lora_a);
      add_grad(row_of(l.x_down, 0, l.r), l.r, l.dy, false, *l.d_lora_b);
    }
    if (needs.bias) add_grad(ones.data(), 1, l.dy, true, *l.d_bias);
  }
  run_factor_packs(tiles, factors);
  run_backward_tokens(tiles, downs);
  run_token_factor_packs(tiles, token_factors);
  run_factor_grads(tiles, grads);
}

// ---- on the gemm kernel ----

// dx, and dy_down and x_down of every layer. x and dy are packed for dx only; the low-rank products read them as they
// are.
void token_grads_gemm(const cpu::KernelTable& kernels, const UsedLayers& layers, const Matrix& x, const Needs& needs,
                      const Tensor& d_x) {
  const int64_t k = x.cols, most = std::min(x.rows, kSliceTokens);
  struct Factors {
    const float *a, *b;  // packed columns [steps, r]
  };
  Buffers factor_buffers;
  for (const UsedLayer& l : layers) {
    factor_buffers.ask(packed_bytes_of(kernels, l.r, k));
    factor_buffers.ask(packed_bytes_of(kernels, l.r, l.dy.cols));
  }
  factor_buffers.allocate();
  std::vector<Factors> factors;
  std::vector<cpu::PackParams> factor_packs;
  for (const UsedLayer& l : layers) {
    auto* a = factor_buffers.take<float>(packed_bytes_of(kernels, l.r, k));
    auto* b = factor_buffers.take<float>(packed_bytes_of(kernels, l.r, l.dy.cols));
    factors.push_back({a, b});
    if (l.r == 0) continue;
    if (needs.lora) factor_packs.push_back({l.a().data, l.a().dtype, k, false, l.r, k, a});
    factor_packs.push_back({l.b().data, l.b().dtype, l.r, true, l.r, l.dy.cols, b});
  }
  run_packs(kernels, factor_packs);
  for (int64_t first = 0; first < x.rows; first += kSliceTokens) {
    const int64_t count = std::min(kSliceTokens, x.rows - first);
    Buffers buffers;
    for (const UsedLayer& l : layers) {
      if (!needs.x) continue;
      buffers.ask(packed_bytes_of(kernels, most, l.dy.cols));
      buffers.ask(packed_bytes_of(kernels, most, l.r));
    }
    buffers.allocate();
    std::vector<cpu::PackParams> packs, down_packs;
    std::vector<cpu::Term> down_terms, terms, low_rank_terms;
    down_terms.reserve(2 * layers.size());  // products point to them
    std::vector<cpu::GemmParams> downs;
    const auto add_down = [&](const Matrix& tokens, const float* columns, const UsedLayer& l, const Tensor& out) {
      Matrix rows = tokens;
      rows.data = row_of(tokens, first);
      down_terms.push_back({dense(rows), columns, tokens.cols});
      downs.push_back(row_product(down_terms.back(), Operands::kAsStored, count, l.r, l.scaling()));
      downs.back().out = row_of(out, first, l.r);
    };
    for (size_t i = 0; i < layers.size(); ++i) {
      const UsedLayer& l = layers[i];
      const int64_t n = l.dy.cols;
      if (l.r > 0) add_down(l.dy, factors[i].b, l, l.dy_down);
      if (l.r > 0 && needs.lora) add_down(x, factors[i].a, l, l.x_down);
      if (!needs.x) continue;
      auto* columns = buffers.take<float>(packed_bytes_of(kernels, most, n));
      auto* down_columns = buffers.take<float>(packed_bytes_of(kernels, most, l.r));
      packs.push_back({row_of(l.dy, first), l.dy.dtype, n, false, count, n, columns});
      terms.push_back({quantized(l.weight), columns, n});
      if (l.r == 0) continue;
      down_packs.push_back({row_of(l.dy_down, first, l.r), DType::kFloat32, l.r, false, count, l.r, down_columns});
      low_rank_terms.push_back({dense(l.a()), down_columns, l.r});
    }
    run_packs(kernels, packs);
    run_gemms(kernels, downs);
    if (!needs.x) continue;
    run_packs(kernels, down_packs);
    terms.insert(terms.end(), low_rank_terms.begin(), low_rank_terms.end());
    cpu::GemmParams p;
    p.terms = terms.data();
    p.term_count = static_cast<int64_t>(terms.size());
    p.transposed = true;
    p.rows = k;
    p.cols = count;
    p.out = static_cast<char*>(d_x.mutable_data_ptr()) + first * k * d_x.element_size();
    p.out_dtype = x.dtype;
    p.out_ld = k;
    run(kernels, p);
  }
}

void parameter_grads_gemm(const cpu::KernelTable& kernels, const UsedLayers& layers, const Matrix& x,
                          const Needs& needs) {
  const int64_t m = x.rows;
  const auto has_factors = [&](const UsedLayer& l) { return needs.lora && l.r > 0; };
  const std::vector<float> ones(static_cast<size_t>(needs.bias ? m : 0), 1.0f);
  Buffers buffers;
  for (const UsedLayer& l : layers) {
    for (int i = 0; i < 2 && has_factors(l); ++i) buffers.ask(packed_bytes_of(kernels, l.r, m));
    if (needs.bias) buffers.ask(packed_bytes_of(kernels, 1, m));
  }
  buffers.allocate();
  std::vector<cpu::PackParams> packs;
  std::vector<cpu::Term> terms;
  terms.reserve(3 * layers.size());  // products point to them
  std::vector<cpu::GemmParams> products;
  // Adds one gradient: the sum over tokens of matrix [m, features] times values [m, ranks].
  const auto add_grad = [&](const float* values, int64_t ranks, const Matrix& matrix, bool r_is_major,
                            const Tensor& out) {
    auto* columns = buffers.take<float>(packed_bytes_of(kernels, ranks, m));
    packs.push_back({values, DType::kFloat32, ranks, true, ranks, m, columns});
    terms.push_back({dense(matrix), columns, m});
    cpu::GemmParams p = row_product(terms.back(), Operands::kTransposed, matrix.cols, ranks, 1.0f);
    p.out = out.mutable_data_ptr();
    p.out_dtype = float_dtype(out.scalar_type(), "lora");
    if (r_is_major) {
      p.rows_are_major = false;
      p.out_ld = matrix.cols;
    }
    products.push_back(p);
  };
  for (const UsedLayer& l : layers) {
    if (has_factors(l)) {
      add_grad(row_of(l.dy_down, 0, l.r), l.r, x, true, *l.d_lora_a);
      add_grad(row_of(l.x_down, 0, l.r), l.r, l.dy, false, *l.d_lora_b);
    }
    if (needs.bias) add_grad(ones.data(), 1, l.dy, true, *l.d_bias);
  }
  run_packs(kernels, packs);
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
  const Layers layers = check_layers(x, lists, quant_type, block_size, nullptr, values_if(needs_lora));
  const Matrix& tokens = layers.tokens;
  const Needs needs{needs_x, needs_lora, needs_bias};
  Gradients d(layers.all.size());
  UsedLayers used;
  bool on_tiles = tiles_for(kernels, tokens, x) != nullptr;
  for_each_layer(layers.all.size(), [&](size_t i) {
    if (!optional_of(grad[i])) return;
    const Layer& layer = layers.all[i];
    UsedLayer l{&layer,     &d.lora_a[i],     &d.lora_b[i],
                &d.bias[i], view_of(layer.w), grad_matrix(grad[i], layer.w.n, tokens)};
    on_tiles = on_tiles && l.dy.dtype == tokens.dtype;
    if (layer.adapter && (needs.x || needs.lora)) {
      l.r = layer.adapter->a.rows;
      l.dy_down = empty_cpu({tokens.rows, l.r}, ScalarType::Float);
      if (needs.lora) {
        l.x_down = empty_cpu({tokens.rows, l.r}, ScalarType::Float);
        d.lora_a[i] = empty_of_shape(lora_a[i]);
        d.lora_b[i] = empty_of_shape(lora_b[i]);
      }
    }
    if (needs.bias) d.bias[i] = empty_cpu({layer.w.n}, ScalarType::Float);
    used.push_back(std::move(l));
  });
  if (needs.x) d.x = on_huge_pages(empty_of_shape(x));
  if (used.empty()) {
    if (needs.x) torch::stable::zero_(d.x);
  } else if (on_tiles) {
    const cpu::TileKernels& tiles = *kernels.tiles;
    token_grads_tiles(tiles, used, tokens, needs.x && tokens.cols > 0, d.x);
    parameter_grads_tiles(tiles, used, tokens, needs);
  } else {
    token_grads_gemm(kernels, used, tokens, needs, d.x);
    parameter_grads_gemm(kernels, used, tokens, needs);
  }
  return {d.x, d.lora_a, d.lora_b, d.bias};
}

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) { m.impl("backward.many", TORCH_BOX(&qlora::ops_cpu::backward_many)); }
