// Products for which the vendor's GEMM outruns our tensor-core and float32 kernels (vendor_tokens in select.h): W is
// dequantized in panels, nested scales and all in one launch each, and multiplied by the GEMM that torch calls. Sums
// are rounded once without an adapter; with one, its term is added to the rounded product, as torch does.
#pragma once

#include "ops/cuda_low_rank.h"

namespace qlora::ops {

// Rows [first_row, first_row + rows) and columns [first_col, first_col + cols) of W, in the first elements of `buffer`.
inline Tensor dequantize_panel(const cuda::Weight& w, int64_t first_row, int64_t rows, int64_t first_col, int64_t cols,
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

// y += activation upᵀ.
inline void add_low_rank(Tensor& y, const Up& up, int64_t rows, const Matrix& tokens, cudaStream_t stream) {
  const LowRank16 operands = low_rank_operands(up, rows, tokens, stream, /*may_borrow=*/false);
  addmm_out(y, y, operands.activation.storage, matrix_view(operands.up.storage, operands.up.r, rows, 1, operands.up.r),
            1.0, 1.0);
}

// y [..., n] = x Wᵀ + …, a panel of rows of W at a time.
inline Tensor dequantize_matmul(const cuda::Weight& w, const Matrix& tokens, const Up* up, const OptionalTensor& bias,
                                const Tensor& like, const GpuScope& scope) {
  const ScalarType dtype = like.scalar_type();
  const int64_t m = tokens.rows;
  Tensor out = empty_with_last_dim(like, w.n, dtype);
  Tensor y = matrix_view(out, m, w.n, w.n, 1);
  const Tensor x = matrix_view(tokens.tensor, m, w.k, w.k, 1);
  std::optional<Tensor> addend;
  if (bias) addend = as_contiguous(bias->scalar_type() == dtype ? *bias : torch::stable::to(*bias, dtype));
  const int64_t panel = cuda::select_vendor_panel(w.n, w.k, tokens.dtype, scope.gpu());
  const Tensor buffer = empty_like_device(like, {panel * w.k}, dtype);
  for (int64_t first = 0; first < w.n; first += panel) {
    const int64_t rows = std::min(panel, w.n - first);
    Tensor weight = dequantize_panel(w, first, rows, 0, w.k, buffer, scope.stream());
    const Tensor part = matrix_view(y, m, rows, w.n, 1, first);
    addmm_out(part, addend ? vector_view(*addend, rows, first) : part, x, matrix_view(weight, w.k, rows, 1, w.k),
              addend ? 1.0 : 0.0, 1.0);
  }
  if (up != nullptr) add_low_rank(y, *up, w.n, tokens, scope.stream());
  return out;
}

// dx [..., k] = dy W + …, a panel of columns of W at a time: the sum over its rows is rounded once.
inline Tensor dequantize_matmul_dx(const cuda::Weight& w, const Matrix& grad, const Up* down, const Tensor& like,
                                   const GpuScope& scope) {
  Tensor out = empty_with_last_dim(like, w.k, like.scalar_type());
  Tensor dx = matrix_view(out, grad.rows, w.k, w.k, 1);
  const Tensor dy = matrix_view(grad.tensor, grad.rows, w.n, w.n, 1);
  const int64_t panel = cuda::select_vendor_panel(w.k, w.n, grad.dtype, scope.gpu());
  const Tensor buffer = empty_like_device(like, {panel * w.n}, like.scalar_type());
  for (int64_t first = 0; first < w.k; first += panel) {
    const int64_t cols = std::min(panel, w.k - first);
    const Tensor weight = dequantize_panel(w, 0, w.n, first, cols, buffer, scope.stream());
    const Tensor part = matrix_view(dx, grad.rows, cols, w.k, 1, first);
    addmm_out(part, part, dy, weight, 0.0, 1.0);
  }
  if (down != nullptr) add_low_rank(dx, *down, w.k, grad, scope.stream());
  return out;
}

}  // namespace qlora::ops
