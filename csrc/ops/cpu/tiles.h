// Products of bfloat16 tokens on instruction sets that have tiles (cpu/tiles/tiles.h): packing and parallel loops.
#pragma once

#include "ops/cpu/gemm.h"

namespace qlora::ops_cpu {

// The tile kernels for these tokens, or null if they cannot use tiles.
inline const cpu::TileKernels* tiles_for(const cpu::KernelTable& kernels, const Matrix& tokens, const Tensor& like) {
  const bool fits = like.scalar_type() == ScalarType::BFloat16 && tokens.rows > 0;
  return fits ? kernels.tiles_for(tokens.dtype) : nullptr;
}

inline Tensor tile_buffer(int64_t bytes) { return empty_cpu({bytes}, ScalarType::Byte); }

// The low-rank term of a product: the factor of the down projection, applied to the tokens, and that of the up
// projection, applied to its result.
struct TileAdapterTerm {
  cpu::TileFactor down;
  const void* up;
  int64_t up_stride;  // elements from one adapter to the next
  cpu::TileAdapters adapters;
};

// lora_a [r, k] or lora_b [n, r] as the factor of a down projection. The matrix holds one adapter or several.
inline cpu::TileFactor factor_of_a(const Matrix& a, int64_t r) {
  return {a.data, a.dtype, a.cols, 1, r, a.cols, r * a.cols};
}
inline cpu::TileFactor factor_of_b(const Matrix& b, int64_t n) {
  return {b.data, b.dtype, 1, b.cols, b.cols, n, n * b.cols};
}

inline TileAdapterTerm forward_term(const Adapter& lora) {
  TileAdapterTerm t{factor_of_a(lora.a, lora.a.rows), lora.b.data, 0, {}};
  t.adapters.scale = lora.scaling;
  return t;
}
inline TileAdapterTerm backward_term(const Adapter& lora) {
  TileAdapterTerm t{factor_of_b(lora.b, lora.b.rows), lora.a.data, 0, {}};
  t.adapters.scale = lora.scaling;
  return t;
}

inline Tensor pack_factor(const cpu::TileKernels& kernels, const cpu::TileFactor& factor,
                          const cpu::TileAdapters& adapters, bool as_rows, bool by_nibble) {
  Tensor packed = tile_buffer(adapters.count * factor.packed_bytes());
  const cpu::PackFactorParams p{factor, adapters, as_rows, by_nibble, packed.mutable_data_ptr<uint8_t>()};
  parallel(ceil_div(factor.features, cpu::kChunk), 8,
           [&](int64_t begin, int64_t end) { kernels.pack_factor(p, begin, end); });
  return packed;
}

// y [m, n] bfloat16 = tokens Wᵀ + low-rank term + bias + addend [m, n], which may be null.
inline void run_forward_tiles_into(const cpu::TileKernels& kernels, const WeightView& w, const Matrix& tokens,
                                   const std::optional<TileAdapterTerm>& lora, const std::optional<Matrix>& dropped,
                                   const std::optional<Matrix>& bias, const float* addend, void* y) {
  const bool by_nibble = cpu::unpacks_by_nibble(w);
  cpu::ForwardTokensParams t{};
  t.x = tokens.data;
  t.m = tokens.rows;
  t.k = w.k;
  t.by_nibble = by_nibble;
  cpu::ForwardTilesParams p{};
  Tensor factor = nothing();
  int64_t low_rank_down = 0;
  if (lora) {
    t.factor = lora->down;
    t.adapters = lora->adapters;
    factor = pack_factor(kernels, t.factor, t.adapters, true, by_nibble);
    t.factor_rows = factor.const_data_ptr<uint8_t>();
    t.lora_x = dropped ? dropped->data : nullptr;
    p.lora_b = lora->up;
    p.lora_dtype = t.factor.dtype;
    p.r = t.factor.r;
    p.adapter_stride = lora->up_stride;
    p.adapters = lora->adapters;
    low_rank_down = t.adapters.count * cpu::low_rank_steps(p.r, p.lora_dtype);
  }
  const int64_t tiles = cpu::tiles_of(tokens.rows);
  Tensor columns = tile_buffer(tiles * cpu::token_steps(w.k, low_rank_down) * cpu::kTileBytes);
  t.out = columns.mutable_data_ptr<uint8_t>();
  parallel(tiles, 1, [&](int64_t begin, int64_t end) {
    kernels.forward_tokens(t, begin, end, thread_scratch(kernels.forward_tokens_scratch(t)));
  });
  p.weight = w;
  p.m = tokens.rows;
  p.by_nibble = by_nibble;
  p.columns = t.out;
  if (bias) {
    p.bias = bias->data;
    p.bias_dtype = bias->dtype;
  }
  p.addend = addend;
  p.y = y;
  parallel(kernels.forward_items(p), 1, [&](int64_t begin, int64_t end) {
    kernels.forward(p, begin, end, thread_scratch(kernels.forward_scratch(p)));
  });
}

inline Tensor run_forward_tiles(const cpu::TileKernels& kernels, const WeightView& w, const Matrix& tokens,
                                const std::optional<TileAdapterTerm>& lora, const std::optional<Matrix>& dropped,
                                const std::optional<Matrix>& bias, const Tensor& like) {
  const Tensor y = on_huge_pages(empty_with_last_dim(like, w.n, like.scalar_type()));
  if (y.numel() != 0) run_forward_tiles_into(kernels, w, tokens, lora, dropped, bias, nullptr, y.mutable_data_ptr());
  return y;
}

// Sums over tokens the products of a float32 matrix [m, r] and a bfloat16 matrix [m, features]. `out` holds
// [r, features] if r_is_major, else [features, r].
inline void factor_grad_tiles(const cpu::TileKernels& kernels, const Matrix& factor, const Matrix& matrix,
                              bool r_is_major, const Tensor& out) {
  const int64_t m = factor.rows, ranks = factor.cols, steps = ceil_div(m, cpu::kStep);
  Tensor packed = tile_buffer(cpu::tiles_of(ranks) * 2 * steps * cpu::kTileBytes);
  const cpu::PackTokenFactorParams pack{static_cast<const float*>(factor.data), m, ranks,
                                        packed.mutable_data_ptr<uint8_t>(), ranks};
  parallel(steps, 4, [&](int64_t begin, int64_t end) { kernels.pack_token_factor(pack, begin, end); });
  cpu::FactorGradParams p{};
  p.factor = pack.out;
  p.m = m;
  p.r = ranks;
  p.features = matrix.cols;
  p.matrix = matrix.data;
  p.r_is_major = r_is_major;
  p.out = out.mutable_data_ptr();
  p.out_dtype = float_dtype(out.scalar_type(), "lora");
  parallel(ceil_div(matrix.cols, cpu::kGradFeatures), 1, [&](int64_t begin, int64_t end) {
    kernels.factor_grad(p, begin, end, thread_scratch(kernels.factor_grad_scratch(p)));
  });
}

inline Tensor bias_grad_tiles(const cpu::TileKernels& kernels, const Matrix& dy) {
  const std::vector<float> ones(static_cast<size_t>(dy.rows), 1.0f);
  const Tensor out = empty_cpu({dy.cols}, ScalarType::Float);
  factor_grad_tiles(kernels, {nothing(), ones.data(), DType::kFloat32, dy.rows, 1}, dy, true, out);
  return out;
}

// The packed tokens of a backward product, and the activation, scale * tokens · factor as float32.
struct BackwardTokens {
  Tensor storage;
  const uint8_t* rows = nullptr;
  int64_t steps = 0;                 // steps of a tile of tokens
  std::optional<Matrix> activation;  // [m, adapters * r]
};

inline BackwardTokens pack_backward_tokens(const cpu::TileKernels& kernels, const Matrix& tokens,
                                           const cpu::TileFactor* factor, const cpu::TileAdapters& adapters,
                                           bool keeps_rows) {
  BackwardTokens result{nothing()};
  cpu::BackwardTokensParams p{};
  p.dy = tokens.data;
  p.m = tokens.rows;
  p.n = tokens.cols;
  p.adapters = adapters;
  Tensor packed = nothing();
  if (factor != nullptr) {
    p.factor = *factor;
    packed = pack_factor(kernels, *factor, adapters, false, false);
    p.factor_columns = packed.const_data_ptr<uint8_t>();
    const int64_t ranks = adapters.count * factor->r;
    Tensor activation = empty_cpu({tokens.rows, ranks}, ScalarType::Float);
    p.dy_down = activation.mutable_data_ptr<float>();
    result.activation = Matrix{activation, p.dy_down, DType::kFloat32, tokens.rows, ranks};
  }
  const int64_t tiles = cpu::tiles_of(tokens.rows);
  if (keeps_rows) {
    const int64_t low_rank_down = adapters.count * cpu::low_rank_steps(p.factor.r, p.factor.dtype);
    result.steps = cpu::token_steps(tokens.cols, low_rank_down);
    result.storage = tile_buffer(tiles * result.steps * cpu::kTileBytes);
    p.out = result.storage.mutable_data_ptr<uint8_t>();
    result.rows = p.out;
  }
  parallel(tiles, 1, [&](int64_t begin, int64_t end) {
    kernels.backward_tokens(p, begin, end, thread_scratch(kernels.backward_tokens_scratch(p)));
  });
  return result;
}

// dx [..., k] = dy W + low-rank term, or only the low-rank term if w.packed is null.
inline Tensor run_backward_tiles(const cpu::TileKernels& kernels, const WeightView& w, const BackwardTokens& tokens,
                                 int64_t m, const TileAdapterTerm* lora, const Tensor& like) {
  const Tensor dx = on_huge_pages(empty_with_last_dim(like, w.k, like.scalar_type()));
  if (dx.numel() == 0) return dx;
  cpu::BackwardTilesParams p{};
  p.weight = w;
  p.m = m;
  p.by_nibble = w.packed != nullptr && cpu::unpacks_by_nibble(w);
  p.rows = tokens.rows;
  p.row_steps = tokens.steps;
  if (lora != nullptr) {
    p.lora_a = lora->up;
    p.lora_dtype = lora->down.dtype;
    p.r = lora->down.r;
    p.adapter_stride = lora->up_stride;
    p.adapters = lora->adapters;
  }
  p.dx = dx.mutable_data_ptr();
  parallel(kernels.backward_items(p), 1, [&](int64_t begin, int64_t end) {
    kernels.backward(p, begin, end, thread_scratch(kernels.backward_scratch(p)));
  });
  return dx;
}

}  // namespace qlora::ops_cpu
