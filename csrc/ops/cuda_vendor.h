// Many tokens on a GPU whose vendor's GEMM outruns mma.sync: W is dequantized in panels, nested scales and all in one
// launch each, and multiplied by the GEMM that torch calls. Sums are rounded once without an adapter; with one, its
// term is added to the rounded product, as torch does.
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
  return torch::stable::view(torch::stable::narrow(const_cast<Tensor&>(buffer), 0, 0, rows * cols), {rows, cols});
}

// y += activation upᵀ.
inline void add_low_rank(Tensor& y, const Up& up, int64_t rows, const Matrix& tokens, cudaStream_t stream) {
  const LowRank16 operands = low_rank_operands(up, rows, tokens, stream, /*may_borrow=*/false);
  addmm_out(y, y, operands.activation.storage, torch::stable::transpose(operands.up.storage, 0, 1), 1.0, 1.0);
}

// y [..., n] = x Wᵀ + …, a panel of rows of W at a time.
inline Tensor dequantize_matmul(const cuda::Weight& w, const Matrix& tokens, const Up* up, const OptionalTensor& bias,
                                const Tensor& like, const GpuScope& scope) {
  const ScalarType dtype = like.scalar_type();
  Tensor out = empty_with_last_dim(like, w.n, dtype);
  Tensor y = torch::stable::view(out, {tokens.rows, w.n});
  const Tensor x = torch::stable::view(tokens.tensor, {tokens.rows, w.k});
  std::optional<Tensor> addend;
  if (bias) addend = torch::stable::to(*bias, dtype);
  const int64_t panel = cuda::select_vendor_panel(tokens.rows, w.n, w.k, scope.gpu());
  const Tensor buffer = empty_like_device(like, {panel * w.k}, dtype);
  for (int64_t first = 0; first < w.n; first += panel) {
    const int64_t rows = std::min(panel, w.n - first);
    Tensor weight = dequantize_panel(w, first, rows, 0, w.k, buffer, scope.stream());
    const Tensor part = torch::stable::narrow(y, 1, first, rows);
    addmm_out(part, addend ? torch::stable::narrow(*addend, 0, first, rows) : part, x,
              torch::stable::transpose(weight, 0, 1), addend ? 1.0 : 0.0, 1.0);
  }
  if (up != nullptr) add_low_rank(y, *up, w.n, tokens, scope.stream());
  return out;
}

// dx [..., k] = dy W + …, a panel of columns of W at a time: the sum over its rows is rounded once.
inline Tensor dequantize_matmul_dx(const cuda::Weight& w, const Matrix& grad, const Up* down, const Tensor& like,
                                   const GpuScope& scope) {
  Tensor out = empty_with_last_dim(like, w.k, like.scalar_type());
  Tensor dx = torch::stable::view(out, {grad.rows, w.k});
  const Tensor dy = torch::stable::view(grad.tensor, {grad.rows, w.n});
  const int64_t panel = cuda::select_vendor_panel(grad.rows, w.k, w.n, scope.gpu());
  const Tensor buffer = empty_like_device(like, {panel * w.n}, like.scalar_type());
  for (int64_t first = 0; first < w.k; first += panel) {
    const int64_t cols = std::min(panel, w.k - first);
    const Tensor weight = dequantize_panel(w, 0, w.n, first, cols, buffer, scope.stream());
    const Tensor part = torch::stable::narrow(dx, 1, first, cols);
    addmm_out(part, part, dy, weight, 0.0, 1.0);
  }
  if (down != nullptr) add_low_rank(dx, *down, w.k, grad, scope.stream());
  return out;
}

}  // namespace qlora::ops
