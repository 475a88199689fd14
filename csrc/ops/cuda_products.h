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
