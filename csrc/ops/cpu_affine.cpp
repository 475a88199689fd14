// forward.affine and its backward for the CPU: the textbook form with integer weights, scale and zero point.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/checks.h"
#include "ops/cpu_common.h"
#include "ops/cpu_products.h"

namespace qlora::ops {
namespace {

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
  return sum_of_terms(kernels, Operands::kTransposed, affine.out, affine.operand, columns, affine.in, {{&affine.a, &t}},
                      x);
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
    d_x = sum_of_terms(kernels, Operands::kAsStored, affine.in, affine.operand, dy_columns, affine.out,
                       {{&affine.b, &u}}, x);
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
  m.impl("forward.affine", TORCH_BOX(&qlora::ops::forward_affine));
  m.impl("forward.affine_grid", TORCH_BOX(&qlora::ops::forward_affine_grid));
  m.impl("backward.affine_grid", TORCH_BOX(&qlora::ops::backward_affine_grid));
}
