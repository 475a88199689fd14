// The products on the CPU's gemm kernel that compose forward and backward: token-major matrices and packed columns.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "ops/arguments.h"
#include "ops/cpu/common.h"

namespace qlora::ops_cpu {

// Packed columns of a gemm. The steps of its reduction are the columns of a matrix (features) or its rows (tokens).
struct Columns {
  Tensor storage;
  const float* data = nullptr;
};
enum class StepsAre { kColumns, kRows };

// Some rows of a matrix, in an order of their own: `numbers[0 .. count)`.
struct RowList {
  const int64_t* numbers;
  int64_t count;
};

// With a list, only its rows are packed, in its order.
inline Columns pack(const cpu::KernelTable& kernels, const Matrix& m, StepsAre steps_are,
                    const RowList* list = nullptr) {
  const bool rows = steps_are == StepsAre::kRows;
  const int64_t count = list != nullptr ? list->count : m.rows;
  const int64_t cols = rows ? m.cols : count, steps = rows ? count : m.cols;
  Tensor storage = empty_cpu({kernels.packed_floats(cols, steps)}, ScalarType::Float);
  const cpu::PackParams p{m.data,
                          m.dtype,
                          m.cols,
                          rows,
                          cols,
                          steps,
                          storage.mutable_data_ptr<float>(),
                          list != nullptr ? list->numbers : nullptr};
  parallel(ceil_div(cols, kernels.tile_cols), 1, [&](int64_t begin, int64_t end) { kernels.pack(p, begin, end); });
  return {storage, p.out};
}

inline cpu::Operand dense(const Matrix& m) {
  cpu::Operand operand;
  operand.dense = m.data;
  operand.dtype = m.dtype;
  operand.ld = m.cols;
  return operand;
}

inline cpu::Operand quantized(const WeightView& w) {
  cpu::Operand operand;
  operand.packed = &w;
  return operand;
}

inline void run(const cpu::KernelTable& kernels, cpu::GemmParams p) {
  if (p.rows == 0 || p.cols == 0) return;
  p.threads = torch::stable::get_num_threads();
  parallel(kernels.gemm_items(p), 1,
           [&](int64_t begin, int64_t end) { kernels.gemm(p, begin, end, thread_scratch(kernels.gemm_scratch(p))); });
}

enum class Operands { kAsStored, kTransposed };

// Low-rank activations [tokens, r] = scale * tokens · m or, if `form` says so, · mᵀ in float32, without packing tokens.
inline Matrix low_rank_down(const cpu::KernelTable& kernels, const Matrix& m, Operands form, const Matrix& tokens,
                            float scale) {
  const Columns columns = pack(kernels, m, form == Operands::kTransposed ? StepsAre::kColumns : StepsAre::kRows);
  const int64_t r = form == Operands::kTransposed ? m.rows : m.cols;
  cpu::GemmParams p;
  const cpu::Term term{dense(tokens), columns.data, tokens.cols};
  p.terms = &term;
  p.rows = tokens.rows;
  p.cols = r;
  p.scale = scale;
  p.rows_are_major = true;
  Tensor out = empty_cpu({tokens.rows, r}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.out_ld = r;
  run(kernels, p);
  return {out, p.out, DType::kFloat32, tokens.rows, r};
}

// Low-rank activations [tokens, r] = scale * (m · columns)ᵀ in float32, where m is used as stored or transposed. They
// are those of tokens [begin, begin + tokens) of `columns`, after rows of zeros from the beginning of their tile.
inline Matrix low_rank_down(const cpu::KernelTable& kernels, const Matrix& m, Operands form, const Columns& columns,
                            int64_t tokens, float scale, int64_t begin = 0) {
  const int64_t zeros = begin % kernels.tile_cols;
  cpu::GemmParams p;
  p.transposed = form == Operands::kTransposed;
  p.rows = p.transposed ? m.cols : m.rows;
  p.cols = zeros + tokens;
  const int64_t steps = p.transposed ? m.rows : m.cols;
  cpu::Term term{dense(m), columns.data + (begin - zeros) * steps, steps};
  term.begin = zeros;
  p.terms = &term;
  p.scale = scale;
  Tensor out = empty_cpu({p.cols, p.rows}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.out_ld = p.rows;
  run(kernels, p);
  std::fill_n(out.mutable_data_ptr<float>(), zeros * p.rows, 0.0f);  // tokens that share a vector with the first
  return {out, p.out, DType::kFloat32, p.cols, p.rows};
}

// Gradient of one low-rank factor: the sum over tokens of tokens [m, features] times activation [m, r], without packing
// tokens. The result is [r, features] if r_is_major, else [features, r].
inline Tensor low_rank_grad(const cpu::KernelTable& kernels, const Matrix& activation, const Matrix& tokens,
                            ScalarType dtype, bool r_is_major) {
  const int64_t r = activation.cols, features = tokens.cols;
  const Columns columns = pack(kernels, activation, StepsAre::kRows);
  cpu::GemmParams p;
  const cpu::Term term{dense(tokens), columns.data, tokens.rows};
  p.terms = &term;
  p.transposed = true;
  p.rows = features;
  p.cols = r;
  Tensor out = r_is_major ? empty_cpu({r, features}, dtype) : empty_cpu({features, r}, dtype);
  p.out = out.mutable_data_ptr();
  p.out_dtype = float_dtype(dtype, "lora");
  p.out_ld = r_is_major ? features : r;
  p.rows_are_major = !r_is_major;
  run(kernels, p);
  return out;
}

// Writes the gradient of one low-rank factor: the sum over tokens of activation [tokens, r] times columns [tokens,
// features]. It is [r, features] if r_is_major, else [features, r]. It fills memory of the caller because a thread of
// a parallel loop, which does not inherit torch's inference mode, may not copy to a tensor made in that mode.
inline void write_low_rank_grad(const cpu::KernelTable& kernels, const Matrix& activation, const Columns& columns,
                                int64_t features, bool r_is_major, DType dtype, void* out) {
  cpu::GemmParams p;
  p.transposed = true;
  p.rows = activation.cols;
  p.cols = features;
  const cpu::Term term{dense(activation), columns.data, activation.rows};
  p.terms = &term;
  p.out = out;
  p.out_dtype = dtype;
  p.out_ld = r_is_major ? features : p.rows;
  p.rows_are_major = r_is_major;
  run(kernels, p);
}

inline Tensor nothing() { return empty_cpu({0}, ScalarType::Float); }

// One low-rank term of a sum: `matrix` [rows, r] (or [r, rows] if transposed) times activations [tokens, r], for the
// tokens from `begin` on. Rows of zeros in `activation` begin it at a multiple of the tile width.
struct GemmAdapterTerm {
  const Matrix* matrix;
  const Matrix* activation;
  Columns packed = {};  // the activation, if it is packed already
  int64_t begin = 0;
};

// out [tokens, rows] = the first term, if any, + sum of the low-rank terms + bias, all in one accumulator. With
// `order`, column i of the terms is token order[i].
inline void sum_into(const cpu::KernelTable& kernels, Operands form, int64_t rows, int64_t tokens,
                     const cpu::Term* first_term, const std::vector<GemmAdapterTerm>& adapter_terms, const Matrix* bias,
                     const int64_t* order, void* out, DType out_dtype, const float* addend = nullptr) {
  std::vector<cpu::Term> terms;
  if (first_term != nullptr) terms.push_back(*first_term);
  std::vector<Columns> packed;  // keeps the columns alive
  for (const GemmAdapterTerm& t : adapter_terms) {
    packed.push_back(t.packed.data != nullptr ? t.packed : pack(kernels, *t.activation, StepsAre::kColumns));
    const int64_t first = t.begin / kernels.tile_cols * kernels.tile_cols;
    terms.push_back(
        {dense(*t.matrix), packed.back().data, t.activation->cols, t.begin, first + t.activation->rows, first});
  }
  cpu::GemmParams p;
  p.terms = terms.data();
  p.term_count = static_cast<int64_t>(terms.size());
  p.transposed = form == Operands::kTransposed;
  p.rows = rows;
  p.cols = tokens;
  p.out = out;
  p.out_dtype = out_dtype;
  p.out_ld = rows;
  p.out_col_of = order;
  p.addend = addend;
  if (bias != nullptr) {
    p.bias = bias->data;
    p.bias_dtype = bias->dtype;
  }
  run(kernels, p);
}

// The same for a base product base · x, as a new tensor with the leading dimensions and dtype of `like`.
inline Tensor sum_of_terms(const cpu::KernelTable& kernels, Operands form, int64_t rows, const cpu::Operand& base,
                           const Columns& x, int64_t steps, const std::vector<GemmAdapterTerm>& adapter_terms,
                           const Tensor& like, const Matrix* bias = nullptr, const int64_t* order = nullptr,
                           const float* addend = nullptr) {
  const Tensor out = on_huge_pages(empty_with_last_dim(like, rows, like.scalar_type()));
  const cpu::Term first{base, x.data, steps};
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < like.dim(); ++d) tokens *= like.size(d);
  sum_into(kernels, form, rows, tokens, &first, adapter_terms, bias, order, out.mutable_data_ptr(),
           float_dtype(like.scalar_type(), "x"), addend);
  return out;
}

// Sum over tokens, float32 [n], as a product with ones, so the order of summation is that of the other gradients.
inline Tensor bias_grad(const cpu::KernelTable& kernels, const Matrix& dy) {
  const std::vector<float> ones(static_cast<size_t>(dy.rows), 1.0f);
  const Matrix ones_column{nothing(), ones.data(), DType::kFloat32, dy.rows, 1};
  return torch::stable::view(low_rank_grad(kernels, ones_column, dy, ScalarType::Float, true), {dy.cols});
}

}  // namespace qlora::ops_cpu
