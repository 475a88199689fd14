// The products that the general path is composed of.
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

// The low-rank term of a sum: up (row, r) times activation [tokens, r].
struct Up {
  cuda::DenseMatrix matrix;
  const Matrix* activation;
  const Adapters* adapters = nullptr;  // then `matrix` is that of adapter 0
  int64_t adapter_stride = 0;
};

// y [..., rows] in the dtype of `like` = operand · columns + up + bias; p holds the operand, the columns and the steps.
inline Tensor general_product(cuda::GeneralParams p, const Up* up, const Matrix* bias, const Tensor& like, int64_t rows,
                              cudaStream_t stream) {
  Tensor out = empty_with_last_dim(like, rows, like.scalar_type());
  p.rows = rows;
  p.cols = 1;
  for (int64_t d = 0; d + 1 < like.dim(); ++d) p.cols *= like.size(d);
  if (up != nullptr) {
    p.up = up->matrix;
    p.activation = rows_of(*up->activation);
    p.r = up->activation->cols;
    if (up->adapters != nullptr) {
      p.adapter_of_col = up->adapters->of_row;
      p.adapters = up->adapters->count;
      p.up_adapter_stride = up->adapter_stride;
    }
  }
  if (bias != nullptr) {
    p.bias = bias->data;
    p.bias_dtype = bias->dtype;
  }
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
  if (up != nullptr) {
    p.lora_t = static_cast<const float*>(up->activation->data);
    p.lora_b = up->matrix.data;
    p.lora_dtype = up->matrix.dtype;
    p.r = up->activation->cols;
    p.b_is_vectorized = p.lora_dtype == p.dtype && p.r % 8 == 0 && is_aligned(p.lora_b);
    if (up->adapters != nullptr) {
      p.adapter_of_token = up->adapters->of_row;
      p.adapters = up->adapters->count;
      p.b_adapter_stride = up->adapter_stride;
    }
  }
  if (bias != nullptr) {
    p.bias = bias->data;
    p.bias_dtype = bias->dtype;
  }
  p.y = y.mutable_data_ptr();
  p.rows_per_block = cuda::select_decode_rows(w.n, scope.gpu());
  check(cuda::launch_decode(p, scope.stream()), "decode");
  return y;
}

// A low-rank operand for the tensor cores: 16 bit, whole steps of 16 ranks.
struct Packed16 {
  Tensor storage;
  const void* data = nullptr;
  int r = 0;
};

inline Packed16 lora_pack(const cuda::DenseMatrix& source, int64_t rows, int64_t r, cuda::Split split, const Matrix& x,
                          cudaStream_t stream, int64_t adapters = 1, int64_t adapter_stride = 0) {
  const int padded = static_cast<int>(ceil_div(r, 16) * 16), total = split == cuda::Split::kNone ? padded : 3 * padded;
  Packed16 packed{empty_like_device(x.tensor, {adapters * rows, total}, x.tensor.scalar_type()), nullptr, total};
  packed.data = packed.storage.const_data_ptr();
  const cuda::LoraPackParams p{
      source, rows, adapters, adapter_stride, static_cast<int>(r), padded, split, packed.storage.mutable_data_ptr(),
      x.dtype};
  check(cuda::launch_lora_pack(p, stream), "lora_pack");
  return packed;
}

// Both sides of the low-rank term of a gemm. Adapters of the tokens' dtype are taken as they are, as torch does; those
// in float32 are split into high and low halves.
struct LowRank16 {
  Packed16 up, activation;
};

inline LowRank16 low_rank_operands(const Up& up, int64_t rows, const Matrix& x, cudaStream_t stream) {
  const int64_t r = up.activation->cols;
  const bool same = up.matrix.dtype == x.dtype;
  const bool as_it_is =
      same && up.matrix.col_stride == 1 && up.matrix.row_stride == r && r % 16 == 0 && is_aligned(up.matrix.data);
  LowRank16 operands;
  if (as_it_is)
    operands.up = {x.tensor, up.matrix.data, static_cast<int>(r)};
  else
    operands.up = lora_pack(up.matrix, rows, r, same ? cuda::Split::kNone : cuda::Split::kOperand, x, stream,
                            up.adapters != nullptr ? up.adapters->count : 1, up.adapter_stride);
  operands.activation =
      lora_pack(rows_of(*up.activation), x.rows, r, same ? cuda::Split::kNone : cuda::Split::kActivation, x, stream);
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
  if (bias != nullptr) {
    out.bias = bias->data;
    out.bias_dtype = bias->dtype;
  }
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
inline Tensor input_grad(const CheckedWeight& checked, const Matrix& dy, const Up* down, const Tensor& like,
                         const GpuScope& scope) {
  const cuda::Weight w = device_view_of(checked);
  const cuda::Problem problem{dy.rows, w.n, w.k, dy.dtype, int64_t{1} << w.block_shift};
  const bool fits =
      like.scalar_type() == dy.tensor.scalar_type() && cuda::why_general_backward(problem, scope.gpu()) == nullptr;
  return fits ? gemm_dx(w, dy, down, like, scope)
              : general_product(packed_operand(w, true, dy), down, nullptr, like, w.k, scope.stream());
}

// [tokens, rows] = scaling * x · operandᵀ in float32, one adapter for each token if there are several.
inline Matrix token_dot(const Matrix& x, const cuda::DenseMatrix& operand, int64_t rows, float scaling,
                        cudaStream_t stream, const Adapters* adapters = nullptr, int64_t adapter_stride = 0) {
  Matrix out = scratch_matrix(x.tensor, x.rows, rows);
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
  return out;
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
