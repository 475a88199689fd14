// The products that forward and backward are composed of on a GPU: each picks its kernel, allocates, and launches.
#pragma once

#include "ops/cuda_runtime.h"

namespace qlora::ops {

inline cuda::DenseMatrix rows_of(const Matrix& m) { return {m.data, m.dtype, m.cols, 1}; }
inline cuda::DenseMatrix columns_of(const Matrix& m) { return {m.data, m.dtype, 1, m.cols}; }

// A float32 matrix [rows, cols] on the device of `like`.
inline Matrix scratch_matrix(const Tensor& like, int64_t rows, int64_t cols) {
  Tensor t = empty_like_device(like, {rows, cols}, ScalarType::Float);
  const void* data = t.const_data_ptr();
  return {std::move(t), data, DType::kFloat32, rows, cols};
}

inline Tensor nothing(const Tensor& like) { return empty_like_device(like, {0}, ScalarType::Float); }

template <class Params>
void set_bias(Params& p, const Matrix* bias) {
  if (bias == nullptr) return;
  p.bias = bias->data;
  p.bias_dtype = bias->dtype;
}

// Low-rank activations [m, r] as the down projection left them: sums of several parts, not yet scaled.
struct Activation {
  Tensor storage;
  cuda::DenseMatrix source;  // (token, r) of one part
  int64_t m, r;
  float scale = 1.0f;
  int parts = 1;
  int64_t part_stride = 0, low_offset = 0;  // see LoraPackParams
};

// The low-rank term of a sum: up (row, r) times activation [tokens, r].
struct Up {
  cuda::DenseMatrix matrix;
  const Activation* activation;
  const Adapters* adapters = nullptr;  // then `matrix` is that of adapter 0
  int64_t adapter_stride = 0;
};

// A low-rank operand for the tensor cores: 16 bit, whole steps of 16 ranks.
struct Packed16 {
  Tensor storage;
  const void* data = nullptr;
  int r = 0;
};

inline void run_lora_pack(cuda::LoraPackParams p, const Tensor& out, cudaStream_t stream) {
  p.out = out.mutable_data_ptr();
  p.dtype = float_dtype(out.scalar_type(), "lora");
  check(cuda::launch_lora_pack(p, stream), "lora_pack");
}

inline cuda::LoraPackParams pack_params(const cuda::DenseMatrix& source, int64_t rows, int64_t r, int64_t padded_r,
                                        cuda::Split split) {
  cuda::LoraPackParams p{};
  p.source = source;
  p.rows = rows;
  p.r = r;
  p.padded_r = padded_r;
  p.split = split;
  return p;
}

inline cuda::LoraPackParams pack_params(const Activation& a, int64_t padded_r, cuda::Split split) {
  cuda::LoraPackParams p = pack_params(a.source, a.m, a.r, padded_r, split);
  p.scale = a.scale;
  p.parts = a.parts;
  p.part_stride = a.part_stride;
  p.low_offset = a.low_offset;
  return p;
}

// The activations in float32, [m, r].
inline Matrix as_float(const Activation& a, cudaStream_t stream) {
  if (a.parts == 1 && a.low_offset == 0 && a.scale == 1.0f)
    return {a.storage, a.source.data, DType::kFloat32, a.m, a.r};
  const Matrix out = scratch_matrix(a.storage, a.m, a.r);
  if (a.m > 0) run_lora_pack(pack_params(a, a.r, cuda::Split::kNone), out.tensor, stream);
  return out;
}

// y [..., rows] in the dtype of `like` = operand · columns + up + bias; p holds the operand, the columns and the steps.
inline Tensor general_product(cuda::GeneralParams p, const Up* up, const Matrix* bias, const Tensor& like, int64_t rows,
                              cudaStream_t stream) {
  Tensor out = empty_with_last_dim(like, rows, like.scalar_type());
  p.rows = rows;
  p.cols = 1;
  for (int64_t d = 0; d + 1 < like.dim(); ++d) p.cols *= like.size(d);
  std::optional<Matrix> activation;
  if (up != nullptr) {
    activation = as_float(*up->activation, stream);
    p.up = up->matrix;
    p.activation = rows_of(*activation);
    p.r = up->activation->r;
    if (up->adapters != nullptr) {
      p.adapter_of_col = up->adapters->of_row;
      p.adapters = up->adapters->count;
      p.up_adapter_stride = up->adapter_stride;
    }
  }
  set_bias(p, bias);
  p.out = out.mutable_data_ptr();
  p.out_dtype = float_dtype(like.scalar_type(), "x");
  p.out_row_stride = 1;
  p.out_col_stride = rows;
  check(cuda::launch_general(p, stream), "general");
  return out;
}

inline cuda::GeneralParams packed_operand(const cuda::Weight& w, bool transposed, const Matrix& columns) {
  cuda::GeneralParams p;
  p.kind = transposed ? cuda::OperandKind::kPackedTransposed : cuda::OperandKind::kPacked;
  p.weight = w;
  p.steps = transposed ? w.n : w.k;
  p.columns = rows_of(columns);
  return p;
}

// y [..., n] by the decode kernel; up->matrix holds rows of r neighbours.
inline Tensor decode(const cuda::Weight& w, const Matrix& tokens, const Up* up, const Matrix* bias, const Tensor& like,
                     const GpuScope& scope) {
  Tensor y = empty_with_last_dim(like, w.n, like.scalar_type());
  if (tokens.rows == 0 || w.n == 0) return y;
  const Tensor x = aligned(tokens.tensor);
  cuda::DecodeParams p{};
  p.weight = w;
  p.x = x.const_data_ptr();
  p.dtype = tokens.dtype;
  p.m = tokens.rows;
  p.adapters = 1;
  std::optional<Matrix> activation;
  if (up != nullptr) {
    activation = as_float(*up->activation, scope.stream());
    p.lora_t = static_cast<const float*>(activation->data);
    p.lora_b = up->matrix.data;
    p.lora_dtype = up->matrix.dtype;
    p.r = up->activation->r;
    p.b_is_vectorized = p.lora_dtype == p.dtype && p.r % 8 == 0 && is_aligned(p.lora_b);
    if (up->adapters != nullptr) {
      p.adapter_of_token = up->adapters->of_row;
      p.adapters = up->adapters->count;
      p.b_adapter_stride = up->adapter_stride;
    }
  }
  set_bias(p, bias);
  p.y = y.mutable_data_ptr();
  p.tile = cuda::select_decode_tile(p.m, w.n, w.k, scope.gpu());
  check(cuda::launch_decode(p, scope.stream()), "decode");
  return y;
}

// Both sides of the low-rank term of a gemm. Adapters of the tokens' dtype are taken as they are, as torch does; those
// in float32 are split into high and low halves.
struct LowRank16 {
  Packed16 up, activation;
};

inline LowRank16 low_rank_operands(const Up& up, int64_t rows, const Matrix& x, cudaStream_t stream) {
  const int64_t r = up.activation->r, padded = ceil_div(r, 16) * 16;
  const bool same = up.matrix.dtype == x.dtype;
  const bool as_it_is =
      same && up.matrix.col_stride == 1 && up.matrix.row_stride == r && r % 16 == 0 && is_aligned(up.matrix.data);
  const int64_t width = same ? padded : 3 * padded;
  const ScalarType dtype = x.tensor.scalar_type();
  LowRank16 operands;
  if (as_it_is) {
    operands.up = {x.tensor, up.matrix.data, static_cast<int>(r)};
  } else {
    const int64_t adapters = up.adapters != nullptr ? up.adapters->count : 1;
    operands.up.storage = empty_like_device(x.tensor, {adapters * rows, width}, dtype);
    cuda::LoraPackParams p = pack_params(up.matrix, rows, r, padded, same ? cuda::Split::kNone : cuda::Split::kOperand);
    p.adapters = adapters;
    p.adapter_stride = up.adapter_stride;
    run_lora_pack(p, operands.up.storage, stream);
    operands.up.data = operands.up.storage.const_data_ptr();
    operands.up.r = static_cast<int>(width);
  }
  operands.activation.storage = empty_like_device(x.tensor, {x.rows, width}, dtype);
  run_lora_pack(pack_params(*up.activation, padded, same ? cuda::Split::kNone : cuda::Split::kActivation),
                operands.activation.storage, stream);
  operands.activation.data = operands.activation.storage.const_data_ptr();
  return operands;
}

// The result of a gemm and what its kernel needs besides the product; `low_rank` keeps the operands alive.
inline Tensor prepare_output(cuda::GemmOutput& out, LowRank16& low_rank, const Matrix& tokens, const Up* up,
                             const Matrix* bias, const Tensor& like, int64_t rows, cudaStream_t stream) {
  Tensor y = empty_with_last_dim(like, rows, like.scalar_type());
  out = {};
  out.y = y.mutable_data_ptr();
  out.m = tokens.rows;
  out.rows = rows;
  if (up != nullptr && y.numel() > 0) {
    low_rank = low_rank_operands(*up, rows, tokens, stream);
    out.lora_up = low_rank.up.data;
    out.lora_t = low_rank.activation.data;
    out.r = low_rank.up.r;
    if (up->adapters != nullptr) {
      out.adapter_of_token = up->adapters->of_row;
      out.adapters = up->adapters->count;
    }
  }
  set_bias(out, bias);
  return y;
}

// y [..., n] = x Wᵀ + …, by the gemm kernel.
inline Tensor gemm(const cuda::Weight& w, const Matrix& tokens, const Up* up, const Matrix* bias, const Tensor& like,
                   const GpuScope& scope) {
  cuda::GemmParams p{};
  LowRank16 low_rank;
  const Tensor y = prepare_output(p.out, low_rank, tokens, up, bias, like, w.n, scope.stream());
  if (y.numel() == 0) return y;
  const Tensor x = aligned(tokens.tensor);
  p.weight = w;
  p.x = x.const_data_ptr();
  p.dtype = tokens.dtype;
  p.tile = cuda::select_gemm_tile(tokens.rows, w.n, scope.gpu());
  check(cuda::launch_gemm(p, scope.stream()), "gemm");
  return y;
}

// dx [..., k] = dy W + …, by the gemm_dx kernel.
inline Tensor gemm_dx(const cuda::Weight& w, const Matrix& grad, const Up* down, const Tensor& like,
                      const GpuScope& scope) {
  cuda::GemmDxParams p{};
  LowRank16 low_rank;
  const Tensor dx = prepare_output(p.out, low_rank, grad, down, nullptr, like, w.k, scope.stream());
  if (dx.numel() == 0) return dx;
  const Tensor dy = aligned(grad.tensor);
  p.weight = w;
  p.dy = dy.const_data_ptr();
  p.dtype = grad.dtype;
  p.tokens_per_block = cuda::select_dx_tokens(grad.rows, scope.gpu());
  check(cuda::launch_gemm_dx(p, scope.stream()), "gemm_dx");
  return dx;
}

// The gradient of the input by the kernel that takes it.
inline Tensor input_grad(CheckedWeight& checked, const Matrix& dy, const Up* down, const Tensor& like,
                         const GpuScope& scope) {
  const cuda::Weight w = device_view_of(checked);
  const cuda::Problem problem{dy.rows, w.n, w.k, dy.dtype, int64_t{1} << w.block_shift};
  const bool fits =
      like.scalar_type() == dy.tensor.scalar_type() && cuda::why_general_backward(problem, scope.gpu()) == nullptr;
  return fits ? gemm_dx(w, dy, down, like, scope)
              : general_product(packed_operand(w, true, dy), down, nullptr, like, w.k, scope.stream());
}

// scaling * x · operandᵀ on the CUDA cores, one adapter for each token if there are several.
inline Activation token_dot(const Matrix& x, const cuda::DenseMatrix& operand, int64_t rows, float scaling,
                            cudaStream_t stream, const Adapters* adapters = nullptr, int64_t adapter_stride = 0) {
  const Matrix out = scratch_matrix(x.tensor, x.rows, rows);
  cuda::TokenDotParams p;
  p.x = rows_of(x);
  p.operand = operand;
  p.scaling = scaling;
  if (adapters != nullptr) {
    p.adapter_stride = adapter_stride;
    p.adapter_of_token = adapters->of_row;
    p.adapters = adapters->count;
    p.scaling_of_adapter = adapters->scale;
  }
  p.tokens = x.rows;
  p.rows = rows;
  p.steps = x.cols;
  p.out = static_cast<float*>(out.tensor.mutable_data_ptr());
  check(cuda::launch_token_dot(p, stream), "token_dot");
  return {out.tensor, rows_of(out), x.rows, rows};
}

// The down projection scaling * x · operandᵀ, operand (r, features): on the tensor cores where they take it.
inline Activation low_rank_down(const Matrix& x, const cuda::DenseMatrix& operand, int64_t r, float scaling,
                                const GpuScope& scope) {
  if (cuda::why_general_low_rank({x.rows, r, x.cols, x.dtype, 0}, scope.gpu()) != nullptr || x.rows == 0)
    return token_dot(x, operand, r, scaling, scope.stream());
  // Factors in float32 become two 16-bit matrices, high and low parts, whose products with x are added.
  const bool same = operand.dtype == x.dtype;
  const bool as_it_is = same && operand.col_stride == 1 && operand.row_stride == x.cols && is_aligned(operand.data);
  const int64_t rows = same ? r : 2 * r;
  const Tensor tokens = aligned(x.tensor);
  cuda::LoraDownParams p{};
  p.operand = operand.data;
  Tensor packed;
  if (!as_it_is) {
    packed = empty_like_device(x.tensor, {rows, x.cols}, x.tensor.scalar_type());
    run_lora_pack(pack_params(operand, r, x.cols, x.cols, same ? cuda::Split::kNone : cuda::Split::kStacked), packed,
                  scope.stream());
    p.operand = packed.const_data_ptr();
  }
  p.x = tokens.const_data_ptr();
  p.dtype = x.dtype;
  p.m = x.rows;
  p.rows = rows;
  p.elems = x.cols;
  p.parts = cuda::select_lora_parts(p.m, p.rows, p.elems, scope.gpu());
  Tensor out = empty_like_device(x.tensor, {p.parts, p.m, p.rows}, ScalarType::Float);
  p.out = out.mutable_data_ptr<float>();
  check(cuda::launch_lora_down(p, scope.stream()), "lora_down");
  return {out, {p.out, DType::kFloat32, rows, 1}, p.m, r, scaling, p.parts, p.m * rows, same ? 0 : r};
}

// Gradient of a low-rank factor: sum over tokens of activation [tokens, r] and x [tokens, features], for each adapter.
// Written as [r, features] if r_is_major, else as [features, r].
inline void low_rank_grad(const Matrix& activation, const Matrix& x, bool r_is_major, const Tensor& out,
                          cudaStream_t stream, const Adapters* adapters = nullptr) {
  cuda::GeneralParams p;
  p.operand = columns_of(activation);
  p.columns = columns_of(x);
  p.rows = activation.cols;
  p.cols = x.cols;
  p.steps = x.rows;
  p.out = out.mutable_data_ptr();
  p.out_dtype = float_dtype(out.scalar_type(), "lora");
  p.out_row_stride = r_is_major ? x.cols : 1;
  p.out_col_stride = r_is_major ? 1 : activation.cols;
  if (adapters != nullptr) {
    p.adapters = adapters->count;
    p.adapter_of_step = adapters->of_row;
    p.out_adapter_stride = activation.cols * x.cols;
  }
  check(cuda::launch_general(p, stream), "general");
}

inline Tensor column_sum(const Matrix& m, cudaStream_t stream) {
  Tensor out = empty_like_device(m.tensor, {m.cols}, ScalarType::Float);
  check(cuda::launch_column_sum({m.data, m.dtype, m.rows, m.cols, out.mutable_data_ptr<float>()}, stream),
        "column_sum");
  return out;
}

}  // namespace qlora::ops
