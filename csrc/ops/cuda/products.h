// The products that compose forward and backward on a GPU: each allocates its result and launches its kernel.
#pragma once

#include "ops/cuda/dequantize_matmul.h"

namespace qlora::ops_cuda {

inline Tensor nothing(const Tensor& like) { return empty_like_device(like, {0}, ScalarType::Float); }

// y [..., rows] in the dtype of `like` = operand · columns + up + bias; p holds the operand, the columns and the steps.
inline Tensor general_product(cuda::GeneralParams p, const AdapterTerm* up, const Matrix* bias, const Tensor& like,
                              int64_t rows, cudaStream_t stream) {
  Tensor out = empty_with_last_dim(like, rows, like.scalar_type());
  p.rows = rows;
  p.cols = 1;
  for (int64_t d = 0; d + 1 < like.dim(); ++d) p.cols *= like.size(d);
  if (up != nullptr) {
    p.up = by_feature(up->factor);
    p.activation = rows_of(up->activation->values);
    p.r = up->activation->values.cols;
    if (up->adapters != nullptr) {
      p.adapter_of_col = up->adapters->of_row;
      p.adapters = up->adapters->count;
      p.up_adapter_stride = up->factor.adapter_stride;
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

inline cuda::GeneralParams packed_operand(const WeightView& w, bool transposed, const Matrix& columns) {
  cuda::GeneralParams p;
  p.kind = transposed ? cuda::OperandKind::kPackedTransposed : cuda::OperandKind::kPacked;
  p.weight = w;
  p.steps = transposed ? w.n : w.k;
  p.columns = rows_of(columns);
  return p;
}

// y [..., n] by the `gemv` kernel, kGemvTokens tokens per launch; up->factor is lora_b.
inline Tensor run_gemv(const WeightView& w, const Matrix& tokens, const AdapterTerm* up, const Matrix* bias,
                       const Tensor& like, const GpuScope& scope) {
  Tensor y = empty_with_last_dim(like, w.n, like.scalar_type());
  if (tokens.rows == 0 || w.n == 0) return y;
  const Tensor x = aligned(tokens.tensor);
  cuda::GemvParams p{};
  p.weight = w;
  p.dtype = tokens.dtype;
  p.adapters = 1;
  if (up != nullptr) {
    p.lora_b = up->factor.data;
    p.lora_dtype = up->factor.dtype;
    p.r = up->activation->values.cols;
    p.b_is_vectorized = p.lora_dtype == p.dtype && up->factor.is_vectorized;
    if (up->adapters != nullptr) {
      p.adapters = up->adapters->count;
      p.b_adapter_stride = up->factor.adapter_stride;
    }
  }
  set_bias(p, bias);
  constexpr int64_t kBytes = 2;  // bytes of one element of x and y
  for (int64_t first = 0; first < tokens.rows; first += cuda::kGemvTokens) {
    p.m = std::min<int64_t>(cuda::kGemvTokens, tokens.rows - first);
    p.x = static_cast<const char*>(x.const_data_ptr()) + first * w.k * kBytes;
    p.y = static_cast<char*>(y.mutable_data_ptr()) + first * w.n * kBytes;
    if (up != nullptr) p.x_down = static_cast<const float*>(up->activation->values.data) + first * p.r;
    if (up != nullptr && up->adapters != nullptr) p.adapter_of_token = up->adapters->of_row + first;
    p.tile = cuda::select_gemv_tile(p.m, w.n, w.k, scope.gpu());
    check(cuda::launch_gemv(p, scope.stream()), "gemv");
  }
  return y;
}

// y [..., n] = x Wᵀ + …, by the gemm kernel.
inline Tensor run_gemm(const WeightView& w, const Matrix& tokens, const AdapterTerm* up, const Matrix* bias,
                       const Tensor& like, const GpuScope& scope) {
  cuda::GemmParams p{};
  const Tensor y = prepare_output(p.out, tokens.rows, up, bias, like, w.n);
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
inline Tensor run_gemm_dx(const WeightView& w, const Matrix& grad, const AdapterTerm* down, const Tensor& like,
                          const GpuScope& scope) {
  cuda::GemmDxParams p{};
  const Tensor dx = prepare_output(p.out, grad.rows, down, nullptr, like, w.k);
  if (dx.numel() == 0) return dx;
  const Tensor dy = aligned(grad.tensor);
  p.weight = w;
  p.dy = dy.const_data_ptr();
  p.dtype = grad.dtype;
  p.tile = cuda::select_gemm_tile(grad.rows, w.k, scope.gpu());
  check(cuda::launch_gemm_dx(p, scope.stream()), "gemm_dx");
  return dx;
}

// Selects the kernel for the gradient of x.
inline cuda::BackwardKernel input_grad_kernel(const CheckedWeight& w, const Matrix& dy, bool many_adapters,
                                              const Tensor& like, const GpuScope& scope) {
  const cuda::Problem problem{dy.rows, w.n, w.k, dy.dtype, int64_t{1} << w.block_shift, many_adapters};
  return like.scalar_type() == dy.tensor.scalar_type() ? cuda::select_backward(problem, scope.gpu())
                                                       : cuda::BackwardKernel::kGeneral;
}

inline Tensor input_grad(CheckedWeight& checked, cuda::BackwardKernel kernel, const Matrix& dy, const AdapterTerm* down,
                         const Tensor& like, const GpuScope& scope) {
  const WeightView w = device_view_of(checked);
  if (kernel == cuda::BackwardKernel::kGemmDx) return run_gemm_dx(w, dy, down, like, scope);
  if (kernel == cuda::BackwardKernel::kDequantizeMatmul) return dequantize_matmul_dx(w, dy, down, like, scope);
  return general_product(packed_operand(w, true, dy), down, nullptr, like, w.k, scope.stream());
}

// Gradient of lora_x [..., k]: only the low-rank term, by the lora_up kernel or on the CUDA cores.
inline Tensor low_rank_up(const Matrix& dy, const AdapterTerm& down, const Tensor& like, int64_t k,
                          const GpuScope& scope) {
  const cuda::Problem problem{dy.rows, down.activation->values.cols, k, dy.dtype, 0};
  if (like.scalar_type() != dy.tensor.scalar_type() || cuda::why_general_low_rank(problem, scope.gpu()) != nullptr)
    return general_product({}, &down, nullptr, like, k, scope.stream());
  return low_rank_up_tiled(dy.rows, dy.dtype, down, nullptr, like, k, scope.stream());
}

inline Tensor column_sum(const Matrix& m, cudaStream_t stream) {
  Tensor out = empty_like_device(m.tensor, {m.cols}, ScalarType::Float);
  check(cuda::launch_column_sum({m.data, m.dtype, m.rows, m.cols, out.mutable_data_ptr<float>(), {}}, stream),
        "column_sum");
  return out;
}

}  // namespace qlora::ops_cuda
