// The products that forward and backward are composed of on a GPU: each picks its kernel, allocates, and launches.
#pragma once

#include "ops/cuda_vendor.h"

namespace qlora::ops {

inline Tensor nothing(const Tensor& like) { return empty_like_device(like, {0}, ScalarType::Float); }

template <class Params>
void set_bias(Params& p, const Matrix* bias) {
  if (bias == nullptr) return;
  p.bias = bias->data;
  p.bias_dtype = bias->dtype;
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

// y [..., n] by the decode kernel, kDecodeTokens tokens at a time; up->matrix holds rows of r neighbours.
inline Tensor decode(const cuda::Weight& w, const Matrix& tokens, const Up* up, const Matrix* bias, const Tensor& like,
                     const GpuScope& scope) {
  Tensor y = empty_with_last_dim(like, w.n, like.scalar_type());
  if (tokens.rows == 0 || w.n == 0) return y;
  const Tensor x = aligned(tokens.tensor);
  cuda::DecodeParams p{};
  p.weight = w;
  p.dtype = tokens.dtype;
  p.adapters = 1;
  std::optional<Matrix> activation;
  if (up != nullptr) {
    activation = as_float(*up->activation, scope.stream());
    p.lora_b = up->matrix.data;
    p.lora_dtype = up->matrix.dtype;
    p.r = up->activation->r;
    p.b_is_vectorized = p.lora_dtype == p.dtype && p.r % 8 == 0 && is_aligned(p.lora_b);
    if (up->adapters != nullptr) {
      p.adapters = up->adapters->count;
      p.b_adapter_stride = up->adapter_stride;
    }
  }
  set_bias(p, bias);
  constexpr int64_t kBytes = 2;  // of a token's element
  for (int64_t first = 0; first < tokens.rows; first += cuda::kDecodeTokens) {
    p.m = std::min<int64_t>(cuda::kDecodeTokens, tokens.rows - first);
    p.x = static_cast<const char*>(x.const_data_ptr()) + first * w.k * kBytes;
    p.y = static_cast<char*>(y.mutable_data_ptr()) + first * w.n * kBytes;
    if (activation) p.lora_t = static_cast<const float*>(activation->data) + first * p.r;
    if (up != nullptr && up->adapters != nullptr) p.adapter_of_token = up->adapters->of_row + first;
    p.tile = cuda::select_decode_tile(p.m, w.n, w.k, scope.gpu());
    check(cuda::launch_decode(p, scope.stream()), "decode");
  }
  return y;
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
  p.tile = cuda::select_gemm_tile(grad.rows, w.k, scope.gpu());
  check(cuda::launch_gemm_dx(p, scope.stream()), "gemm_dx");
  return dx;
}

// The kernel of the gradient of the input.
inline cuda::BackwardKernel input_grad_kernel(const CheckedWeight& w, const Matrix& dy, bool many_adapters,
                                              const Tensor& like, const GpuScope& scope) {
  const cuda::Problem problem{dy.rows, w.n, w.k, dy.dtype, int64_t{1} << w.block_shift, many_adapters};
  return like.scalar_type() == dy.tensor.scalar_type() ? cuda::select_backward(problem, scope.gpu())
                                                       : cuda::BackwardKernel::kGeneral;
}

inline Tensor input_grad(CheckedWeight& checked, cuda::BackwardKernel kernel, const Matrix& dy, const Up* down,
                         const Tensor& like, const GpuScope& scope) {
  const cuda::Weight w = device_view_of(checked);
  if (kernel == cuda::BackwardKernel::kGemmDx) return gemm_dx(w, dy, down, like, scope);
  if (kernel == cuda::BackwardKernel::kVendor) return dequantize_matmul_dx(w, dy, down, like, scope);
  return general_product(packed_operand(w, true, dy), down, nullptr, like, w.k, scope.stream());
}

// Gradient of lora_x [..., k]: the low-rank term alone, by the lora_up kernel or on the CUDA cores.
inline Tensor low_rank_up(const Matrix& dy, const Up& down, const Tensor& like, int64_t k, const GpuScope& scope) {
  const cuda::Problem problem{dy.rows, down.activation->r, k, dy.dtype, 0};
  if (like.scalar_type() != dy.tensor.scalar_type() || cuda::why_general_low_rank(problem, scope.gpu()) != nullptr)
    return general_product({}, &down, nullptr, like, k, scope.stream());
  cuda::LoraUpParams p{};
  LowRank16 low_rank;
  const Tensor out = prepare_output(p.out, low_rank, dy, &down, nullptr, like, k, scope.stream());
  p.dtype = dy.dtype;
  if (out.numel() > 0) check(cuda::launch_lora_up(p, scope.stream()), "lora_up");
  return out;
}

inline Tensor column_sum(const Matrix& m, cudaStream_t stream) {
  Tensor out = empty_like_device(m.tensor, {m.cols}, ScalarType::Float);
  check(cuda::launch_column_sum({m.data, m.dtype, m.rows, m.cols, out.mutable_data_ptr<float>()}, stream),
        "column_sum");
  return out;
}

}  // namespace qlora::ops
