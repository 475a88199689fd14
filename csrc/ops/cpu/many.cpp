// The op forward.many for the CPU: layers that share their tokens, which are packed once; each step is one parallel
// loop over all layers. A layer is multiplied by the kernel that `forward` chooses, with the same result.
#include <torch/csrc/stable/library.h>

#include "cpu/select.h"
#include "ops/cpu/steps.h"

namespace qlora::ops_cpu {
namespace {

// The bias of a layer, if it has one. Every kind of product takes it alike.
template <class Params>
void set_bias(Params& p, const Layer& layer) {
  if (!layer.bias) return;
  p.bias = layer.bias->data;
  p.bias_dtype = layer.bias->dtype;
}

using Results = std::vector<Tensor>;

void forward_gemv(const cpu::KernelTable& kernels, const Layers& layers, bool with_words, const Results& y) {
  const Matrix& x = layers.tokens;
  const TokenFloats floats(kernels, x, with_words);
  int64_t ranks = 0;
  for (const Layer& layer : layers.all) ranks += layer.adapter ? layer.adapter->a.rows : 0;
  const Tensor storage = empty_cpu({x.rows * ranks}, ScalarType::Float);
  float* x_down = storage.mutable_data_ptr<float>();
  std::vector<cpu::DotParams> downs;
  std::vector<cpu::GemvParams> products;
  for (size_t i = 0; i < y.size(); ++i) {
    const Layer& layer = layers.all[i];
    cpu::GemvParams p{};
    p.weight = view_of(layer.w);
    p.m = x.rows;
    p.x_plain = floats.plain;
    p.x_words = floats.words;
    set_bias(p, layer);
    if (layer.adapter) {
      const Adapter& adapter = *layer.adapter;
      p.r = adapter.a.rows;
      downs.push_back({adapter.a.data, adapter.a.dtype, p.r, x.cols, floats.plain, x.rows, adapter.scaling, x_down});
      p.x_down = x_down;
      p.lora_b = adapter.b.data;
      p.lora_dtype = adapter.b.dtype;
      x_down += x.rows * p.r;
    }
    p.y = y[i].mutable_data_ptr();
    p.dtype = x.dtype;
    products.push_back(p);
  }
  run_dots(kernels, downs);
  run_gemvs(kernels, products);
}

void forward_gemm(const cpu::KernelTable& kernels, const Layers& layers, const Results& y) {
  const Matrix& x = layers.tokens;
  const int64_t m = x.rows;
  const Columns columns = pack(kernels, x, StepsAre::kColumns);
  struct Job {
    WeightView weight;
    cpu::Term down, terms[2];  // of the down projection, and of the product
  };
  std::vector<Job> jobs(layers.all.size());
  Buffers buffers;
  for (const Layer& layer : layers.all) {
    if (!layer.adapter) continue;
    buffers.ask(m * layer.adapter->a.rows * 4);
    buffers.ask(packed_bytes_of(kernels, m, layer.adapter->a.rows));
  }
  buffers.allocate();
  std::vector<cpu::PackParams> down_packs;
  std::vector<cpu::GemmParams> downs, products;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const Layer& layer = layers.all[i];
    Job& job = jobs[i];
    job.weight = view_of(layer.w);
    job.terms[0] = {quantized(job.weight), columns.data, x.cols};
    cpu::GemmParams p;
    p.terms = job.terms;
    if (layer.adapter) {
      const Adapter& adapter = *layer.adapter;
      const int64_t r = adapter.a.rows;
      auto* x_down = buffers.take<float>(m * r * 4);
      auto* down_columns = buffers.take<float>(packed_bytes_of(kernels, m, r));
      job.down = {dense(adapter.a), columns.data, x.cols};
      downs.push_back(float_product(job.down, Operands::kAsStored, r, m, adapter.scaling, x_down));
      down_packs.push_back({x_down, DType::kFloat32, r, false, m, r, down_columns});
      job.terms[1] = {dense(adapter.b), down_columns, r};
      p.term_count = 2;
    }
    p.rows = layer.w.n;
    p.cols = m;
    set_bias(p, layer);
    p.out = y[i].mutable_data_ptr();
    p.out_dtype = x.dtype;
    p.out_ld = layer.w.n;
    products.push_back(p);
  }
  run_gemms(kernels, downs);
  run_packs(kernels, down_packs);
  run_gemms(kernels, products);
}

void forward_tiles(const cpu::TileKernels& tiles, const Layers& layers, const Results& y) {
  const Matrix& x = layers.tokens;
  const int64_t x_bytes = cpu::tiles_of(x.rows) * cpu::token_steps(x.cols, 0) * cpu::kTileBytes;
  const auto low_rank_bytes = [&](const Adapter& adapter) {
    return cpu::tiles_of(x.rows) * cpu::low_rank_steps(adapter.a.rows, adapter.a.dtype) * cpu::kTileBytes;
  };
  Buffers buffers;
  buffers.ask(x_bytes);
  for (const Layer& layer : layers.all) {
    if (!layer.adapter) continue;
    buffers.ask(low_rank_bytes(*layer.adapter));
    buffers.ask(forward_term(*layer.adapter).down.packed_bytes());
  }
  buffers.allocate();
  cpu::ForwardTokensParams tokens{};
  tokens.x = x.data;
  tokens.m = x.rows;
  tokens.k = x.cols;
  tokens.by_nibble = cpu::unpacks_by_nibble(view_of(layers.all.front().w));  // depends on what all layers share
  tokens.out = buffers.take<uint8_t>(x_bytes);
  std::vector<cpu::PackFactorParams> factors;
  std::vector<cpu::ForwardTokensParams> downs;
  std::vector<cpu::ForwardTilesParams> products;
  for (size_t i = 0; i < y.size(); ++i) {
    const Layer& layer = layers.all[i];
    cpu::ForwardTilesParams p{};
    p.weight = view_of(layer.w);
    p.m = x.rows;
    p.by_nibble = tokens.by_nibble;
    p.columns = tokens.out;
    if (layer.adapter) {
      const TileAdapterTerm term = forward_term(*layer.adapter);
      cpu::ForwardTokensParams down = tokens;
      down.columns = tokens.out;
      down.out = buffers.take<uint8_t>(low_rank_bytes(*layer.adapter));
      auto* packed = buffers.take<uint8_t>(term.down.packed_bytes());
      down.factor = term.down;
      down.adapters = p.adapters = term.adapters;
      down.factor_rows = packed;
      factors.push_back({down.factor, down.adapters, true, tokens.by_nibble, packed});
      downs.push_back(down);
      p.low_rank = down.out;
      p.lora_b = term.up;
      p.lora_dtype = term.down.dtype;
      p.r = term.down.r;
    }
    set_bias(p, layer);
    p.y = y[i].mutable_data_ptr();
    if (layer.w.n > 0) products.push_back(p);
  }
  run_factor_packs(tiles, factors);
  run_forward_tokens(tiles, {tokens});
  run_forward_tokens(tiles, downs);
  run_forward_products(tiles, products);
}

Results forward_many(Tensor x, std::vector<Tensor> packed, std::vector<Tensor> absmax,
                     std::vector<Tensor> nested_absmax, std::vector<Tensor> nested_offset,
                     std::vector<int64_t> out_features, std::string quant_type, int64_t block_size,
                     std::vector<Tensor> lora_a, std::vector<Tensor> lora_b, std::vector<double> scaling,
                     std::vector<Tensor> bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const LayerLists lists{packed, absmax, nested_absmax, nested_offset, out_features, lora_a, lora_b, scaling};
  check_lists(lists, "bias", bias);
  const Layers layers = check_layers(x, lists, quant_type, block_size, &bias);
  Results y;
  for (const Layer& layer : layers.all) y.push_back(on_huge_pages(empty_with_last_dim(x, layer.w.n, x.scalar_type())));
  if (y.empty()) return y;
  const Matrix& tokens = layers.tokens;
  const cpu::TileKernels* tiles = tiles_for(kernels, tokens, x);
  switch (cpu::select_forward(tokens.rows, tokens.cols, tiles)) {
    case cpu::ForwardKernel::kTiles:
      forward_tiles(*tiles, layers, y);
      break;
    case cpu::ForwardKernel::kGemvWords:
      forward_gemv(kernels, layers, /*with_words=*/true, y);
      break;
    case cpu::ForwardKernel::kGemvElements:
      forward_gemv(kernels, layers, /*with_words=*/false, y);
      break;
    default:
      forward_gemm(kernels, layers, y);
  }
  return y;
}

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) { m.impl("forward.many", TORCH_BOX(&qlora::ops_cpu::forward_many)); }
