// Products for which the vendor's GEMM is faster than our kernels (dequantize_matmul_tokens in select.h). Each panel of
// W is dequantized by one launch, including nested scales, and multiplied by the GEMM that torch calls. Without an
// adapter, sums are rounded once. With an adapter, its term is rounded first and the GEMM adds the product to it.
#pragma once

#include "ops/cuda/low_rank.h"

namespace qlora::ops_cuda {

// Dequantizes rows [first_row, first_row + rows) and columns [first_col, first_col + cols) of W into `buffer`.
inline Tensor dequantize_panel(const WeightView& w, int64_t first_row, int64_t rows, int64_t first_col, int64_t cols,
                               const Tensor& buffer, cudaStream_t stream) {
  const bool whole_rows = cols == w.k;
  const cuda::DequantizeParams p{w,
                                 first_row * w.k + first_col,
                                 whole_rows ? 1 : rows,
                                 whole_rows ? rows * cols : cols,
                                 w.k,
                                 buffer.mutable_data_ptr(),
                                 float_dtype(buffer.scalar_type(), "x")};
  check(cuda::launch_dequantize(p, stream), "dequantize");
  return matrix_view(buffer, rows, cols, cols, 1);
}

template <class Params>
void set_bias(Params& p, const Matrix* bias) {
  if (bias == nullptr) return;
  p.bias = bias->data;
  p.bias_dtype = bias->dtype;
}

// Allocates the result [..., rows] of a tensor-core kernel, and sets the low-rank term and bias that it adds.
inline Tensor prepare_output(cuda::GemmOutput& out, int64_t m, const AdapterTerm* up, const Matrix* bias,
                             const Tensor& like, int64_t rows) {
  Tensor y = empty_with_last_dim(like, rows, like.scalar_type());
  out = {};
  out.y = y.mutable_data_ptr();
  out.m = m;
  out.rows = rows;
  if (up != nullptr) {
    out.up = up->factor;
    out.activations = static_cast<const float*>(up->activation->values.data);
    out.r = static_cast<int>(up->activation->values.cols);
    if (up->adapters != nullptr) {
      out.adapter_of_token = up->adapters->of_row;
      out.adapters = up->adapters->count;
    }
  }
  set_bias(out, bias);
  return y;
}

// Only the low-rank term plus bias, [..., rows], on the tensor cores.
inline Tensor low_rank_up_tiled(int64_t m, DType dtype, const AdapterTerm& up, const Matrix* bias, const Tensor& like,
                                int64_t rows, cudaStream_t stream) {
  cuda::LoraUpParams p{};
  const Tensor out = prepare_output(p.out, m, &up, bias, like, rows);
  p.dtype = dtype;
  if (out.numel() > 0) check(cuda::launch_lora_up(p, stream), "lora_up");
  return out;
}

// y += activation · up for float32 tokens, by torch's GEMM; for one adapter.
inline void add_low_rank_float(Tensor& y, const AdapterTerm& up, int64_t rows) {
  const Matrix& values = up.activation->values;
  const Tensor& factor = up.matrix->tensor;
  const Tensor exact =
      factor.scalar_type() == ScalarType::Float ? factor : torch::stable::to(factor, ScalarType::Float);
  addmm_out(y, y, values.tensor, matrix_view(exact, values.cols, rows, up.factor.rank_stride, up.factor.feature_stride),
            1.0, 1.0);
}

// y [..., n] = x Wᵀ + low-rank term + bias, one panel of rows of W at a time.
inline Tensor dequantize_matmul(const WeightView& w, const Matrix& tokens, const AdapterTerm* up, const Matrix* bias,
                                const Tensor& like, const GpuScope& scope) {
  const ScalarType dtype = like.scalar_type();
  const int64_t m = tokens.rows;
  const bool is_float = tokens.dtype == DType::kFloat32, adds_to_term = up != nullptr && !is_float;
  Tensor out = adds_to_term ? low_rank_up_tiled(m, tokens.dtype, *up, bias, like, w.n, scope.stream())
                            : empty_with_last_dim(like, w.n, dtype);
  Tensor y = matrix_view(out, m, w.n, w.n, 1);
  const Tensor x = matrix_view(tokens.tensor, m, w.k, w.k, 1);
  std::optional<Tensor> addend;  // [n]
  if (bias != nullptr && !adds_to_term)
    addend = bias->tensor.scalar_type() == dtype ? bias->tensor : torch::stable::to(bias->tensor, dtype);
  const int64_t panel = cuda::select_panel(w.n, w.k, tokens.dtype, scope.gpu());
  const Tensor buffer = empty_like_device(like, {panel * w.k}, dtype);
  for (int64_t first = 0; first < w.n; first += panel) {
    const int64_t rows = std::min(panel, w.n - first);
    Tensor weight = dequantize_panel(w, first, rows, 0, w.k, buffer, scope.stream());
    const Tensor part = matrix_view(y, m, rows, w.n, 1, first);
    addmm_out(part, addend ? vector_view(*addend, rows, first) : part, x, matrix_view(weight, w.k, rows, 1, w.k),
              addend || adds_to_term ? 1.0 : 0.0, 1.0);
  }
  if (up != nullptr && is_float) add_low_rank_float(y, *up, w.n);
  return out;
}

// dx [..., k] = dy W + low-rank term, one panel of columns of W at a time, so sums over rows of W are rounded once.
inline Tensor dequantize_matmul_dx(const WeightView& w, const Matrix& grad, const AdapterTerm* down, const Tensor& like,
                                   const GpuScope& scope) {
  const bool is_float = grad.dtype == DType::kFloat32, adds_to_term = down != nullptr && !is_float;
  Tensor out = adds_to_term ? low_rank_up_tiled(grad.rows, grad.dtype, *down, nullptr, like, w.k, scope.stream())
                            : empty_with_last_dim(like, w.k, like.scalar_type());
  Tensor dx = matrix_view(out, grad.rows, w.k, w.k, 1);
  const Tensor dy = matrix_view(grad.tensor, grad.rows, w.n, w.n, 1);
  const int64_t panel = cuda::select_panel(w.k, w.n, grad.dtype, scope.gpu());
  const Tensor buffer = empty_like_device(like, {panel * w.n}, like.scalar_type());
  for (int64_t first = 0; first < w.k; first += panel) {
    const int64_t cols = std::min(panel, w.k - first);
    const Tensor weight = dequantize_panel(w, 0, w.n, first, cols, buffer, scope.stream());
    const Tensor part = matrix_view(dx, grad.rows, cols, w.k, 1, first);
    addmm_out(part, part, dy, weight, adds_to_term ? 1.0 : 0.0, 1.0);
  }
  if (down != nullptr && is_float) add_low_rank_float(dx, *down, w.k);
  return out;
}

}  // namespace qlora::ops_cuda
