// forward and backward for the CPU: each is a few products on the kernels' one loop nest, composed here.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/select.h"
#include "ops/checks.h"
#include "ops/cpu_common.h"

namespace qlora::ops {
namespace {

constexpr int64_t kWeightsPerTask = 1 << 15;  // decode: below this a second thread costs more than it saves

// A contiguous matrix [rows, cols] of the call: data, element type and extents.
struct Matrix {
  Tensor tensor;
  const void* data;
  cpu::DType dtype;
  int64_t rows, cols;
};

Matrix as_matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
  check_cpu(t, name);
  Tensor c = torch::stable::contiguous(t);
  const void* data = c.const_data_ptr();
  const cpu::DType dtype = float_dtype(c.scalar_type(), name);
  return {std::move(c), data, dtype, rows, cols};
}

Matrix tokens_matrix(const Tensor& t, const char* name, int64_t features, const char* rule) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) == features, name, " has shape ", text_of(t.sizes()),
                  ": its last dimension must be ", rule, "=", features);
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) tokens *= t.size(d);
  return as_matrix(t, name, tokens, features);
}

Matrix lora_matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols, const char* rule) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, " has shape ", text_of(t.sizes()),
                  ": it must be ", rule, " = [", rows, ", ", cols, "]");
  return as_matrix(t, name, rows, cols);
}

struct Lora {
  Matrix a, b;  // [r, k], [n, r]
  float scaling;
};

std::optional<Lora> check_lora(const OptionalTensor& a, const OptionalTensor& b, int64_t n, int64_t k, double scaling) {
  STD_TORCH_CHECK(a.has_value() == b.has_value(),
                  a.has_value() ? "lora_a was given without lora_b" : "lora_b was given without lora_a",
                  ": an adapter needs both");
  if (!a.has_value()) return std::nullopt;
  STD_TORCH_CHECK(a->dim() == 2, "lora_a has shape ", text_of(a->sizes()), ": it must be [rank, in_features]");
  const int64_t r = a->size(0);
  STD_TORCH_CHECK(r > 0, "rank=0: an adapter needs a rank of at least 1");
  STD_TORCH_CHECK(a->scalar_type() == b->scalar_type(), "lora_a and lora_b must have the same dtype");
  return Lora{lora_matrix(*a, "lora_a", r, k, "[rank, in_features]"),
              lora_matrix(*b, "lora_b", n, r, "[out_features, rank]"), static_cast<float>(scaling)};
}

// Columns for the gemm: `m` is cut into tiles along its rows (features are steps), or along its columns (tokens are).
struct Columns {
  Tensor storage;
  const float* data;
};
enum class StepsAre { kColumns, kRows };

Columns pack(const cpu::KernelTable& kernels, const Matrix& m, StepsAre steps_are) {
  const bool rows = steps_are == StepsAre::kRows;
  const int64_t cols = rows ? m.cols : m.rows, steps = rows ? m.rows : m.cols;
  Tensor storage = empty_cpu({kernels.packed_floats(cols, steps)}, ScalarType::Float);
  const cpu::PackParams p{m.data, m.dtype, m.cols, rows, cols, steps, storage.mutable_data_ptr<float>()};
  parallel(ceil_div(cols, kernels.tile_cols), 1, [&](int64_t begin, int64_t end) { kernels.pack(p, begin, end); });
  return {storage, p.out};
}

cpu::Operand dense(const Matrix& m) {
  cpu::Operand operand;
  operand.dense = m.data;
  operand.dtype = m.dtype;
  operand.ld = m.cols;
  return operand;
}

cpu::Operand quantized(const PackedWeight& w) {
  cpu::Operand operand;
  operand.packed = &w;
  return operand;
}

void run(const cpu::KernelTable& kernels, const cpu::GemmParams& p) {
  if (p.rows == 0 || p.cols == 0) return;
  parallel(kernels.gemm_items(p), 1,
           [&](int64_t begin, int64_t end) { kernels.gemm(p, begin, end, thread_scratch(kernels.gemm_scratch(p))); });
}

enum class Operands { kAsStored, kTransposed };

// [cols, rows] = scale * (operand (rows x steps) * columns)ᵀ, as float32: token-major low-rank activations.
Matrix low_rank(const cpu::KernelTable& kernels, const Matrix& m, Operands form, const Columns& columns, int64_t tokens,
                float scale) {
  cpu::GemmParams p;
  p.transposed = form == Operands::kTransposed;
  p.rows = p.transposed ? m.cols : m.rows;
  p.cols = tokens;
  p.terms[0] = {dense(m), columns.data, p.transposed ? m.rows : m.cols};
  p.scale = scale;
  Tensor out = empty_cpu({tokens, p.rows}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.out_ld = p.rows;
  run(kernels, p);
  return {out, p.out, cpu::DType::kFloat32, tokens, p.rows};
}

// Gradient of one low-rank factor: sum over tokens of activation [tokens, r] and columns [tokens, features].
// Written as [r, features] if r_is_major, else as [features, r].
Tensor low_rank_grad(const cpu::KernelTable& kernels, const Matrix& activation, const Columns& columns,
                     int64_t features, ScalarType dtype, bool r_is_major) {
  cpu::GemmParams p;
  p.transposed = true;
  p.rows = activation.cols;
  p.cols = features;
  p.terms[0] = {dense(activation), columns.data, activation.rows};
  Tensor out = r_is_major ? empty_cpu({p.rows, features}, dtype) : empty_cpu({features, p.rows}, dtype);
  p.out = out.mutable_data_ptr();
  p.out_dtype = float_dtype(dtype, "lora");
  p.out_ld = r_is_major ? features : p.rows;
  p.rows_are_major = r_is_major;
  run(kernels, p);
  return out;
}

Tensor empty_with_last_dim(const Tensor& like, int64_t last, ScalarType dtype) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = last;
  return torch::stable::empty({sizes.data(), sizes.size()}, dtype);
}

Tensor nothing() { return empty_cpu({0}, ScalarType::Float); }

// out [tokens, rows] = base · x + low · t, both in one accumulator.
Tensor two_terms(const cpu::KernelTable& kernels, Operands form, int64_t rows, cpu::Operand base, const Columns& x,
                 int64_t steps, const Matrix* low, const Matrix* t, const Tensor& like, const Matrix* bias) {
  cpu::GemmParams p;
  p.transposed = form == Operands::kTransposed;
  p.rows = rows;
  p.terms[0] = {base, x.data, steps};
  Columns t_columns;
  if (low != nullptr) {
    t_columns = pack(kernels, *t, StepsAre::kColumns);
    p.terms[1] = {dense(*low), t_columns.data, t->cols};
    p.term_count = 2;
  }
  Tensor out = empty_with_last_dim(like, rows, like.scalar_type());
  p.cols = 1;
  for (int64_t d = 0; d + 1 < like.dim(); ++d) p.cols *= like.size(d);
  p.out = out.mutable_data_ptr();
  p.out_dtype = float_dtype(like.scalar_type(), "x");
  p.out_ld = rows;
  if (bias != nullptr) {
    p.bias = bias->data;
    p.bias_dtype = bias->dtype;
  }
  run(kernels, p);
  return out;
}

Tensor decode(const cpu::KernelTable& kernels, const PackedWeight& w, const Matrix& x, const Matrix* lora_x,
              const std::optional<Lora>& lora, const Matrix* bias, const Tensor& like, bool words) {
  const auto token_floats = [&](const Matrix& m, bool with_words) {
    Tensor storage =
        empty_cpu({m.rows * (m.cols + (with_words ? kernels.words_floats(m.cols) : 0))}, ScalarType::Float);
    float* plain = storage.mutable_data_ptr<float>();
    const cpu::PackWordsParams p{m.data, m.dtype, m.cols, plain, with_words ? plain + m.rows * m.cols : nullptr};
    kernels.pack_words(p, 0, m.rows);
    return storage;
  };
  const Tensor x_floats = token_floats(x, words);
  cpu::DecodeParams p{};
  p.weight = w;
  p.m = x.rows;
  p.x_plain = x_floats.const_data_ptr<float>();
  p.x_words = words ? p.x_plain + x.rows * x.cols : nullptr;
  if (bias != nullptr) {
    p.bias = bias->data;
    p.bias_dtype = bias->dtype;
  }
  Tensor lora_floats, t;
  if (lora) {
    if (lora_x != nullptr) lora_floats = token_floats(*lora_x, false);
    t = empty_cpu({x.rows, lora->a.rows}, ScalarType::Float);
    const cpu::DotParams down{lora->a.data,
                              lora->a.dtype,
                              lora->a.rows,
                              x.cols,
                              lora_x != nullptr ? lora_floats.const_data_ptr<float>() : p.x_plain,
                              x.rows,
                              lora->scaling,
                              t.mutable_data_ptr<float>()};
    parallel(down.rows, std::max<int64_t>(1, kWeightsPerTask / std::max<int64_t>(1, x.cols)),
             [&](int64_t begin, int64_t end) { kernels.dot(down, begin, end); });
    p.lora_t = down.out;
    p.lora_b = lora->b.data;
    p.lora_dtype = lora->b.dtype;
    p.r = lora->b.cols;
  }
  Tensor y = empty_with_last_dim(like, w.n, like.scalar_type());
  p.y = y.mutable_data_ptr();
  p.dtype = x.dtype;
  parallel(w.n, std::max<int64_t>(1, kWeightsPerTask / std::max<int64_t>(1, w.k)), [&](int64_t begin, int64_t end) {
    kernels.decode(p, begin, end, thread_scratch(kernels.decode_scratch(p)));
  });
  return y;
}

std::optional<Matrix> check_lora_x(const OptionalTensor& lora_x, const Tensor& x, const std::optional<Lora>& lora) {
  if (!lora_x.has_value()) return std::nullopt;
  STD_TORCH_CHECK(lora.has_value(), "lora_x was given without lora_a and lora_b");
  STD_TORCH_CHECK(text_of(lora_x->sizes()) == text_of(x.sizes()) && lora_x->scalar_type() == x.scalar_type(),
                  "lora_x has shape ", text_of(lora_x->sizes()), ": it must have the shape and dtype of x, ",
                  text_of(x.sizes()));
  return tokens_matrix(*lora_x, "lora_x", x.size(x.dim() - 1), "in_features");
}

Tensor forward(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
               std::vector<int64_t> shape, std::string quant_type, int64_t block_size, OptionalTensor lora_a,
               OptionalTensor lora_b, double scaling, OptionalTensor bias, OptionalTensor lora_x) {
  const cpu::KernelTable& kernels = active_kernels();
  check_matrix_shape(shape);
  const int64_t n = shape[0], k = shape[1];
  const CheckedWeight w = check_weight(packed, absmax, nested_absmax, nested_offset, n, k, quant_type, block_size);
  const Matrix tokens = tokens_matrix(x, "x", k, "in_features");
  const std::optional<Lora> lora = check_lora(lora_a, lora_b, n, k, scaling);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, lora);
  std::optional<Matrix> bias_row;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias has shape ", text_of(bias->sizes()),
                    ": it must be [out_features] = [", n, "]");
    bias_row = as_matrix(*bias, "bias", 1, n);
  }
  const Matrix* bias_or_null = bias_row ? &*bias_row : nullptr;
  const cpu::ForwardKernel kernel = cpu::select_forward(tokens.rows, k);
  if (kernel != cpu::ForwardKernel::kGemm)
    return decode(kernels, w.view, tokens, dropped ? &*dropped : nullptr, lora, bias_or_null, x,
                  kernel == cpu::ForwardKernel::kDecodeWords);

  const Columns columns = pack(kernels, tokens, StepsAre::kColumns);
  std::optional<Matrix> t;
  if (lora) {
    const Columns lora_columns = dropped ? pack(kernels, *dropped, StepsAre::kColumns) : columns;
    t = low_rank(kernels, lora->a, Operands::kAsStored, lora_columns, tokens.rows, lora->scaling);
  }
  return two_terms(kernels, Operands::kAsStored, n, quantized(w.view), columns, k, lora ? &lora->b : nullptr,
                   t ? &*t : nullptr, x, bias_or_null);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor packed, Tensor absmax,
                                                            OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                                            std::vector<int64_t> shape, std::string quant_type,
                                                            int64_t block_size, OptionalTensor lora_a,
                                                            OptionalTensor lora_b, double scaling,
                                                            OptionalTensor lora_x, bool needs_x, bool needs_lora,
                                                            bool needs_lora_x, bool needs_bias) {
  const cpu::KernelTable& kernels = active_kernels();
  check_matrix_shape(shape);
  const int64_t n = shape[0], k = shape[1];
  const CheckedWeight w = check_weight(packed, absmax, nested_absmax, nested_offset, n, k, quant_type, block_size);
  const Matrix tokens = tokens_matrix(x, "x", k, "in_features");
  const Matrix dy = tokens_matrix(grad, "grad", n, "out_features");
  STD_TORCH_CHECK(dy.rows == tokens.rows, "grad has ", dy.rows, " rows: x has ", tokens.rows);
  const std::optional<Lora> lora = check_lora(lora_a, lora_b, n, k, scaling);
  const std::optional<Matrix> dropped = check_lora_x(lora_x, x, lora);

  Tensor d_x = nothing(), d_lora_a = nothing(), d_lora_b = nothing(), d_lora_x = nothing(), d_bias = nothing();
  const bool low_rank_to_x = needs_x && lora && !dropped;
  Columns dy_columns;
  if (needs_x || (lora && (needs_lora || needs_lora_x))) dy_columns = pack(kernels, dy, StepsAre::kColumns);
  std::optional<Matrix> u;  // scaling * dy B, [m, r]
  if (lora && (low_rank_to_x || needs_lora || needs_lora_x))
    u = low_rank(kernels, lora->b, Operands::kTransposed, dy_columns, dy.rows, lora->scaling);
  if (needs_x)
    d_x = two_terms(kernels, Operands::kTransposed, k, quantized(w.view), dy_columns, n,
                    low_rank_to_x ? &lora->a : nullptr, low_rank_to_x ? &*u : nullptr, x, nullptr);
  if (needs_lora_x && dropped)
    d_lora_x = two_terms(kernels, Operands::kTransposed, k, dense(lora->a), pack(kernels, *u, StepsAre::kColumns),
                         u->cols, nullptr, nullptr, x, nullptr);
  Columns dy_by_token;
  if (needs_bias || (lora && needs_lora)) dy_by_token = pack(kernels, dy, StepsAre::kRows);
  if (lora && needs_lora) {
    const Matrix& lora_tokens = dropped ? *dropped : tokens;
    const ScalarType dtype = lora_a->scalar_type();
    const Matrix t = low_rank(kernels, lora->a, Operands::kAsStored, pack(kernels, lora_tokens, StepsAre::kColumns),
                              tokens.rows, lora->scaling);
    d_lora_a = low_rank_grad(kernels, *u, pack(kernels, lora_tokens, StepsAre::kRows), k, dtype, true);
    d_lora_b = low_rank_grad(kernels, t, dy_by_token, n, dtype, false);
  }
  if (needs_bias) {
    const std::vector<float> ones(static_cast<size_t>(dy.rows), 1.0f);
    const Matrix ones_column{grad, ones.data(), cpu::DType::kFloat32, dy.rows, 1};
    d_bias = torch::stable::view(low_rank_grad(kernels, ones_column, dy_by_token, n, ScalarType::Float, true), {n});
  }
  return {d_x, d_lora_a, d_lora_b, d_lora_x, d_bias};
}

// The textbook form. scale and zero_point: one value, one per output channel, or one row per group of input rows.
struct Affine {
  Tensor quantized, scale, zero_point;
  cpu::Operand operand;
  int64_t in, out, r;
  Matrix b, a;  // [in, r], [r, out]
  float scaling;
};

cpu::AffineGrid check_grid(const Tensor& scale, const Tensor& zero_point, int64_t in, int64_t out) {
  check_dtype(scale, ScalarType::Float, "scale", "it must be float32");
  check_dtype(zero_point, ScalarType::Float, "zero_point", "it must be float32");
  STD_TORCH_CHECK(text_of(scale.sizes()) == text_of(zero_point.sizes()), "scale has shape ", text_of(scale.sizes()),
                  " and zero_point ", text_of(zero_point.sizes()), ": they must agree");
  const int64_t dims = scale.dim();
  const int64_t channels = dims == 0 ? 1 : scale.size(dims - 1), groups = dims == 2 ? scale.size(0) : 1;
  STD_TORCH_CHECK(dims <= 2 && (channels == 1 || channels == out) && groups > 0 && in % groups == 0, "scale has shape ",
                  text_of(scale.sizes()),
                  ": it must be [], [out_features] or [groups, out_features or 1] with out_features=", out,
                  " and in_features=", in, " a multiple of groups");
  cpu::AffineGrid grid;
  grid.scale = scale.const_data_ptr<float>();
  grid.zero_point = zero_point.const_data_ptr<float>();
  grid.group = std::max<int64_t>(1, in / groups);
  grid.group_stride = channels;
  grid.channel_stride = channels == 1 ? 0 : 1;
  return grid;
}

Affine check_affine(const Tensor& quantized_w, const Tensor& scale, const Tensor& zero_point, const Tensor& b,
                    const Tensor& a, double alpha) {
  STD_TORCH_CHECK(quantized_w.dim() == 2, "quantized_W has shape ", text_of(quantized_w.sizes()),
                  ": it must be [in_features, out_features]");
  check_cpu(quantized_w, "quantized_W");
  check_cpu(scale, "scale");
  check_cpu(zero_point, "zero_point");
  STD_TORCH_CHECK(b.dim() == 2, "B has shape ", text_of(b.sizes()), ": it must be [in_features, rank]");
  const int64_t in = quantized_w.size(0), out = quantized_w.size(1), r = b.size(1);
  STD_TORCH_CHECK(r > 0, "rank=0: an adapter needs a rank of at least 1");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "A and B must have the same dtype");
  Affine affine{torch::stable::contiguous(quantized_w),
                torch::stable::contiguous(scale),
                torch::stable::contiguous(zero_point),
                {},
                in,
                out,
                r,
                lora_matrix(b, "B", in, r, "[in_features, rank]"),
                lora_matrix(a, "A", r, out, "[rank, out_features]"),
                static_cast<float>(alpha / static_cast<double>(r))};
  affine.operand.dense = affine.quantized.const_data_ptr();
  affine.operand.dtype = integer_dtype(quantized_w.scalar_type(), "quantized_W");
  affine.operand.ld = out;
  affine.operand.affine = check_grid(affine.scale, affine.zero_point, in, out);
  return affine;
}

Tensor forward_affine_grid(Tensor x, Tensor quantized_w, Tensor scale, Tensor zero_point, Tensor b, Tensor a,
                           double alpha) {
  const cpu::KernelTable& kernels = active_kernels();
  const Affine affine = check_affine(quantized_w, scale, zero_point, b, a, alpha);
  const Matrix tokens = tokens_matrix(x, "x", affine.in, "in_features");
  const Columns columns = pack(kernels, tokens, StepsAre::kColumns);
  const Matrix t = low_rank(kernels, affine.b, Operands::kTransposed, columns, tokens.rows, affine.scaling);
  return two_terms(kernels, Operands::kTransposed, affine.out, affine.operand, columns, affine.in, &affine.a, &t, x,
                   nullptr);
}

Tensor forward_affine(Tensor x, Tensor quantized_w, double scale, double zero_point, Tensor b, Tensor a, double alpha) {
  Tensor scale_tensor = empty_cpu({1}, ScalarType::Float), zero_tensor = empty_cpu({1}, ScalarType::Float);
  *scale_tensor.mutable_data_ptr<float>() = static_cast<float>(scale);
  *zero_tensor.mutable_data_ptr<float>() = static_cast<float>(zero_point);
  return forward_affine_grid(x, quantized_w, scale_tensor, zero_tensor, b, a, alpha);
}

std::tuple<Tensor, Tensor, Tensor> backward_affine_grid(Tensor grad, Tensor x, Tensor quantized_w, Tensor scale,
                                                        Tensor zero_point, Tensor b, Tensor a, double alpha,
                                                        bool needs_x, bool needs_lora) {
  const cpu::KernelTable& kernels = active_kernels();
  const Affine affine = check_affine(quantized_w, scale, zero_point, b, a, alpha);
  const Matrix tokens = tokens_matrix(x, "x", affine.in, "in_features");
  const Matrix dy = tokens_matrix(grad, "grad", affine.out, "out_features");
  STD_TORCH_CHECK(dy.rows == tokens.rows, "grad has ", dy.rows, " rows: x has ", tokens.rows);
  Tensor d_x = nothing(), d_b = nothing(), d_a = nothing();
  const Columns dy_columns = pack(kernels, dy, StepsAre::kColumns);
  const Matrix u = low_rank(kernels, affine.a, Operands::kAsStored, dy_columns, dy.rows, affine.scaling);
  if (needs_x)
    d_x = two_terms(kernels, Operands::kAsStored, affine.in, affine.operand, dy_columns, affine.out, &affine.b, &u, x,
                    nullptr);
  if (needs_lora) {
    const Matrix t = low_rank(kernels, affine.b, Operands::kTransposed, pack(kernels, tokens, StepsAre::kColumns),
                              tokens.rows, affine.scaling);
    d_b = low_rank_grad(kernels, u, pack(kernels, tokens, StepsAre::kRows), affine.in, b.scalar_type(), false);
    d_a = low_rank_grad(kernels, t, pack(kernels, dy, StepsAre::kRows), affine.out, a.scalar_type(), true);
  }
  return {d_x, d_b, d_a};
}

}  // namespace
}  // namespace qlora::ops

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("forward", TORCH_BOX(&qlora::ops::forward));
  m.impl("backward", TORCH_BOX(&qlora::ops::backward));
  m.impl("forward.affine", TORCH_BOX(&qlora::ops::forward_affine));
  m.impl("forward.affine_grid", TORCH_BOX(&qlora::ops::forward_affine_grid));
  m.impl("backward.affine_grid", TORCH_BOX(&qlora::ops::backward_affine_grid));
}
