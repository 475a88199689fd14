// forward and backward of bfloat16 tokens on an instruction set that has tiles (cpu/matmul16.h): packing, phases, the
// parallel loops.
#pragma once

#include "ops/cpu_products.h"

namespace qlora::ops {

// Whether the kernels in use take these tokens.
inline bool takes_tiles(const cpu::KernelTable& kernels, const Matrix& tokens, const Tensor& like) {
  return kernels.matmul16 != nullptr && tokens.dtype == DType::kBFloat16 &&
         like.scalar_type() == ScalarType::BFloat16 && tokens.rows > 0;
}

inline Tensor tile_buffer(int64_t bytes) { return empty_cpu({bytes}, ScalarType::Byte); }

// lora_a [r, k] or lora_b [n, r] as the factor of a down projection.
inline cpu::Factor16 factor_of_a(const Matrix& a) { return {a.data, a.dtype, a.cols, 1, a.rows, a.cols}; }
inline cpu::Factor16 factor_of_b(const Matrix& b) { return {b.data, b.dtype, 1, b.cols, b.cols, b.rows}; }

inline Tensor pack_factor16(const cpu::Matmul16& kernels, const cpu::Factor16& factor, bool as_rows, bool by_nibble) {
  Tensor packed = tile_buffer(factor.packed_bytes());
  const cpu::PackFactor16Params p{factor, as_rows, by_nibble, packed.mutable_data_ptr<uint8_t>()};
  parallel(ceil_div(factor.features, cpu::kChunk), 8,
           [&](int64_t begin, int64_t end) { kernels.pack_factor(p, begin, end); });
  return packed;
}

inline Tensor forward16(const cpu::Matmul16& kernels, const PackedWeight& w, const Matrix& tokens,
                        const std::optional<Lora>& lora, const std::optional<Matrix>& dropped,
                        const std::optional<Matrix>& bias, const Tensor& like) {
  const Tensor y = on_huge_pages(empty_with_last_dim(like, w.n, like.scalar_type()));
  if (y.numel() == 0) return y;
  const bool by_nibble = cpu::decodes_by_nibble(w);
  cpu::ForwardTokens16Params t{};
  t.x = tokens.data;
  t.m = tokens.rows;
  t.k = w.k;
  t.by_nibble = by_nibble;
  Tensor factor = nothing();
  if (lora) {
    t.factor = factor_of_a(lora->a);
    factor = pack_factor16(kernels, t.factor, true, by_nibble);
    t.factor_rows = factor.const_data_ptr<uint8_t>();
    t.lora_x = dropped ? dropped->data : nullptr;
    t.scale = lora->scaling;
  }
  const int64_t tiles = cpu::tiles_of(tokens.rows);
  Tensor columns = tile_buffer(tiles * cpu::token_steps(w.k, t.factor.r, t.factor.dtype) * cpu::kTileBytes);
  t.out = columns.mutable_data_ptr<uint8_t>();
  parallel(tiles, 1, [&](int64_t begin, int64_t end) {
    kernels.forward_tokens(t, begin, end, thread_scratch(kernels.forward_tokens_scratch(t)));
  });
  cpu::Forward16Params p{};
  p.weight = w;
  p.m = tokens.rows;
  p.by_nibble = by_nibble;
  p.columns = t.out;
  if (lora) {
    p.lora_b = lora->b.data;
    p.lora_dtype = lora->b.dtype;
    p.r = lora->b.cols;
  }
  if (bias) {
    p.bias = bias->data;
    p.bias_dtype = bias->dtype;
  }
  p.y = y.mutable_data_ptr();
  parallel(kernels.forward_items(p), 1, [&](int64_t begin, int64_t end) {
    kernels.forward(p, begin, end, thread_scratch(kernels.forward_scratch(p)));
  });
  return y;
}

// Sums over tokens of a float32 matrix [m, r] and a bfloat16 one [m, features].
inline Tensor factor_grad16(const cpu::Matmul16& kernels, const Matrix& factor, const Matrix& matrix, ScalarType dtype,
                            bool r_is_major) {
  const int64_t m = factor.rows, r = factor.cols, steps = ceil_div(m, cpu::kStep);
  Tensor packed = tile_buffer(cpu::tiles_of(r) * 2 * steps * cpu::kTileBytes);
  const cpu::PackTokenFactor16Params pack{static_cast<const float*>(factor.data), m, r,
                                          packed.mutable_data_ptr<uint8_t>()};
  parallel(steps, 4, [&](int64_t begin, int64_t end) { kernels.pack_token_factor(pack, begin, end); });
  Tensor out = r_is_major ? empty_cpu({r, matrix.cols}, dtype) : empty_cpu({matrix.cols, r}, dtype);
  cpu::FactorGrad16Params p{};
  p.factor = pack.out;
  p.m = m;
  p.r = r;
  p.features = matrix.cols;
  p.matrix = matrix.data;
  p.r_is_major = r_is_major;
  p.out = out.mutable_data_ptr();
  p.out_dtype = float_dtype(dtype, "lora");
  parallel(ceil_div(matrix.cols, cpu::kGradFeatures), 1, [&](int64_t begin, int64_t end) {
    kernels.factor_grad(p, begin, end, thread_scratch(kernels.factor_grad_scratch(p)));
  });
  return out;
}

// The tokens of a backward product, and scale * tokens · factor as float32.
struct BackwardTokens {
  Tensor storage;
  const uint8_t* rows = nullptr;
  int64_t steps = 0;        // of a tile of tokens
  std::optional<Matrix> v;  // [m, r]
};

inline BackwardTokens backward_tokens16(const cpu::Matmul16& kernels, const Matrix& tokens,
                                        const std::optional<cpu::Factor16>& factor, float scale, bool keeps_rows) {
  BackwardTokens result{nothing()};
  cpu::BackwardTokens16Params p{};
  p.dy = tokens.data;
  p.m = tokens.rows;
  p.n = tokens.cols;
  Tensor packed = nothing();
  if (factor) {
    p.factor = *factor;
    packed = pack_factor16(kernels, *factor, false, false);
    p.factor_columns = packed.const_data_ptr<uint8_t>();
    p.scale = scale;
    Tensor v = empty_cpu({tokens.rows, factor->r}, ScalarType::Float);
    p.v = v.mutable_data_ptr<float>();
    result.v = Matrix{v, p.v, DType::kFloat32, tokens.rows, factor->r};
  }
  const int64_t tiles = cpu::tiles_of(tokens.rows);
  if (keeps_rows) {
    result.steps = cpu::token_steps(tokens.cols, p.factor.r, p.factor.dtype);
    result.storage = tile_buffer(tiles * result.steps * cpu::kTileBytes);
    p.out = result.storage.mutable_data_ptr<uint8_t>();
    result.rows = p.out;
  }
  parallel(tiles, 1, [&](int64_t begin, int64_t end) {
    kernels.backward_tokens(p, begin, end, thread_scratch(kernels.backward_tokens_scratch(p)));
  });
  return result;
}

// dx [..., k] = tokens · W + low-rank term; without W (weight.packed null) the low-rank term alone.
inline Tensor backward16(const cpu::Matmul16& kernels, const PackedWeight& w, const BackwardTokens& tokens, int64_t m,
                         const Matrix* lora_a, const Tensor& like) {
  const Tensor dx = on_huge_pages(empty_with_last_dim(like, w.k, like.scalar_type()));
  if (dx.numel() == 0) return dx;
  cpu::Backward16Params p{};
  p.weight = w;
  p.m = m;
  p.by_nibble = w.packed != nullptr && cpu::decodes_by_nibble(w);
  p.rows = tokens.rows;
  p.row_steps = tokens.steps;
  if (lora_a != nullptr) {
    p.lora_a = lora_a->data;
    p.lora_dtype = lora_a->dtype;
    p.r = lora_a->rows;
  }
  p.dx = dx.mutable_data_ptr();
  parallel(kernels.backward_items(p), 1, [&](int64_t begin, int64_t end) {
    kernels.backward(p, begin, end, thread_scratch(kernels.backward_scratch(p)));
  });
  return dx;
}

}  // namespace qlora::ops
