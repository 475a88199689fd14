// The op forward.experts for the CPU: the products of all experts of a mixture in a few parallel loops. Every expert is
// multiplied by the kernel that `forward` would choose for its rows, with the same result.
#include "ops/cpu/experts.h"

#include <torch/csrc/stable/library.h>

namespace qlora::ops_cpu {
namespace {

void forward_gemv(const ExpertCall& c, const ExpertGroups& groups, void* y) {
  const int64_t k = c.stack.k, r = c.e.r;
  if (groups.empty()) return;
  const bool with_words = k % kMinBlockSize == 0;
  const int64_t words = with_words ? c.kernels.words_floats(k) : 0;
  int64_t count = 0;
  for (const ExpertGroup& g : groups) count += g.count;
  const Tensor storage = empty_cpu({count * (k + words + r)}, ScalarType::Float);
  float *plain = storage.mutable_data_ptr<float>(), *by_word = plain + count * k, *x_down = by_word + count * words;
  std::vector<std::pair<cpu::PackWordsParams, int64_t>> packs;  // with the number of tokens
  std::vector<cpu::DotParams> downs;
  std::vector<cpu::GemvParams> products;
  const Matrix& x = c.e.tokens;
  for (const ExpertGroup& g : groups) {
    packs.push_back({{x.data, x.dtype, k, plain, with_words ? by_word : nullptr, c.rows.tokens(g)}, g.count});
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
  run_balanced(
      packs, [](const auto& p) { return p.second; }, [&](const auto&) { return 8 * k; },
      [&](const auto& p, int64_t begin, int64_t end) { c.kernels.pack_words(p.first, begin, end); });
  run_dots(c.kernels, downs);
  run_gemvs(c.kernels, products);
}

void forward_gemm(const ExpertCall& c, const ExpertGroups& groups, void* y) {
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

void forward_tiles(const ExpertCall& c, const cpu::TileKernels& tiles, const ExpertGroups& groups, void* y) {
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

Tensor forward_experts(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                       OptionalTensor nested_offset, std::vector<int64_t> shape, std::string quant_type,
                       int64_t block_size, Tensor expert_of_row, OptionalTensor lora_a, OptionalTensor lora_b,
                       double scaling, OptionalTensor bias) {
  const cpu::KernelTable& kernels = active_kernels();
  const Experts e = check_experts(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size,
                                  expert_of_row, lora_a, with_ranks_side_by_side(lora_b, expert_of_row), scaling, bias);
  const ExpertRows rows(e);
  const ExpertCall call{kernels, e, rows, view_of(e.w)};
  const Tensor y = empty_cpu({e.rows(), e.w.n}, x.scalar_type());
  clear_rows(rows.without_expert(), e.w.n, y);
  const cpu::TileKernels* tiles = tiles_for(kernels, e.tokens, x);
  for (const ExpertGroups& slice : rows.slices()) {
    ExpertGroups by_gemv, by_gemm, by_tiles;
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

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) { m.impl("forward.experts", TORCH_BOX(&qlora::ops_cpu::forward_experts)); }
