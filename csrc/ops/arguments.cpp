// Checks of the arguments of forward and backward, shared by all devices.
#include "ops/arguments.h"

namespace qlora::ops {

Matrix as_matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols, const Tensor& like) {
  check_same_device(t, name, like, "x");
  Tensor c = as_contiguous(t);
  const void* data = c.const_data_ptr();
  const DType dtype = float_dtype(c.scalar_type(), name);
  return {std::move(c), data, dtype, rows, cols};
}

Matrix tokens_matrix(const Tensor& t, const char* name, int64_t features, const char* rule, const Tensor& like,
                     Reads reads) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) == features, name, " has shape ", text_of(t.sizes()),
                  ": its last dimension must be ", rule, "=", features);
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) tokens *= t.size(d);
  if (reads == Reads::kValues) return as_matrix(t, name, tokens, features, like);
  check_same_device(t, name, like, "x");
  return {t, nullptr, float_dtype(t.scalar_type(), name), tokens, features};
}

Matrix grad_matrix(const Tensor& grad, int64_t n, const Matrix& tokens) {
  Matrix dy = tokens_matrix(grad, "grad", n, "out_features", tokens.tensor);
  STD_TORCH_CHECK(dy.rows == tokens.rows, "grad has ", dy.rows, " rows: x has ", tokens.rows);
  return dy;
}

Matrix lora_matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols, const char* rule,
                   const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, " has shape ", text_of(t.sizes()),
                  ": it must be ", rule, " = [", rows, ", ", cols, "]");
  return as_matrix(t, name, rows, cols, like);
}

std::optional<Matrix> check_bias(const OptionalTensor& bias, int64_t n, const Tensor& like) {
  if (!bias.has_value()) return std::nullopt;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias has shape ", text_of(bias->sizes()),
                  ": it must be [out_features] = [", n, "]");
  return as_matrix(*bias, "bias", 1, n, like);
}

std::optional<Adapter> check_lora(const OptionalTensor& a, const OptionalTensor& b, int64_t n, int64_t k,
                                  double scaling, const Tensor& like) {
  STD_TORCH_CHECK(a.has_value() == b.has_value(),
                  a.has_value() ? "lora_a was given without lora_b" : "lora_b was given without lora_a",
                  ": an adapter needs both");
  if (!a.has_value()) return std::nullopt;
  STD_TORCH_CHECK(a->dim() == 2, "lora_a has shape ", text_of(a->sizes()), ": it must be [rank, in_features]");
  const int64_t r = a->size(0);
  STD_TORCH_CHECK(r > 0, "rank=0: an adapter needs a rank of at least 1");
  STD_TORCH_CHECK(a->scalar_type() == b->scalar_type(), "lora_a and lora_b must have the same dtype");
  return Adapter{lora_matrix(*a, "lora_a", r, k, "[rank, in_features]", like),
                 lora_matrix(*b, "lora_b", n, r, "[out_features, rank]", like), static_cast<float>(scaling)};
}

std::optional<Matrix> check_lora_x(const OptionalTensor& lora_x, const Tensor& x, const std::optional<Adapter>& lora,
                                   Reads reads) {
  if (!lora_x.has_value()) return std::nullopt;
  STD_TORCH_CHECK(lora.has_value(), "lora_x was given without lora_a and lora_b");
  STD_TORCH_CHECK(text_of(lora_x->sizes()) == text_of(x.sizes()) && lora_x->scalar_type() == x.scalar_type(),
                  "lora_x has shape ", text_of(lora_x->sizes()), ": it must have the shape and dtype of x, ",
                  text_of(x.sizes()));
  return tokens_matrix(*lora_x, "lora_x", x.size(x.dim() - 1), "in_features", x, reads);
}

Base check_base(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                const OptionalTensor& nested_offset, const std::vector<int64_t>& shape, const std::string& quant_type,
                int64_t block_size, Reads reads) {
  STD_TORCH_CHECK(shape.size() == 2, "shape has ", shape.size(),
                  " dimensions: a matmul weight is (out_features, in_features)");
  check_same_device(packed, "packed", x, "x");
  return {check_weight(packed, absmax, nested_absmax, nested_offset, shape[0], shape[1], quant_type, block_size),
          tokens_matrix(x, "x", shape[1], "in_features", x, reads)};
}

Adapters check_adapters(const Tensor& lora_a, const Tensor& lora_b, const Tensor& scaling, const Tensor& adapter_of_row,
                        const Base& base) {
  const int64_t tokens = base.tokens.rows, n = base.w.n, k = base.w.k;
  const Tensor& x = base.tokens.tensor;
  STD_TORCH_CHECK(lora_a.dim() == 3 && lora_a.size(2) == k, "lora_a has shape ", text_of(lora_a.sizes()),
                  ": it must be [adapters, rank, in_features=", k, "]");
  const int64_t count = lora_a.size(0), r = lora_a.size(1);
  STD_TORCH_CHECK(r > 0, "rank=0: an adapter needs a rank of at least 1");
  STD_TORCH_CHECK(lora_b.dim() == 3 && lora_b.size(0) == count && lora_b.size(1) == n && lora_b.size(2) == r,
                  "lora_b has shape ", text_of(lora_b.sizes()), ": it must be [adapters, out_features, rank] = [",
                  count, ", ", n, ", ", r, "]");
  STD_TORCH_CHECK(lora_a.scalar_type() == lora_b.scalar_type(), "lora_a and lora_b must have the same dtype");
  check_same_device(scaling, "scaling", x, "x");
  check_same_device(adapter_of_row, "adapter_of_row", x, "x");
  check_dtype(scaling, ScalarType::Float, "scaling", "it must be float32");
  check_dtype(adapter_of_row, ScalarType::Long, "adapter_of_row", "it must be int64");
  STD_TORCH_CHECK(scaling.numel() == count, "scaling has ", scaling.numel(), " values: there are ", count, " adapters");
  STD_TORCH_CHECK(adapter_of_row.numel() == tokens, "adapter_of_row has ", adapter_of_row.numel(), " values: x has ",
                  tokens, " rows");
  Adapters adapters{as_matrix(lora_a, "lora_a", count * r, k, x),
                    as_matrix(lora_b, "lora_b", count * n, r, x),
                    as_contiguous(scaling),
                    as_contiguous(adapter_of_row),
                    nullptr,
                    nullptr,
                    count,
                    r,
                    n,
                    lora_a.element_size()};
  adapters.scale = adapters.scaling.const_data_ptr<float>();
  adapters.of_row = adapters.adapter_of_row.const_data_ptr<int64_t>();
  return adapters;
}

Experts check_experts(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                      const OptionalTensor& nested_offset, const std::vector<int64_t>& shape,
                      const std::string& quant_type, int64_t block_size, const Tensor& expert_of_row,
                      const OptionalTensor& lora_a, const OptionalTensor& lora_b, double scaling,
                      const OptionalTensor& bias, Reads reads) {
  STD_TORCH_CHECK(shape.size() == 3, "shape has ", shape.size(),
                  " dimensions: the weights of experts are (experts, out_features, in_features)");
  const int64_t count = shape[0], n = shape[1], k = shape[2];
  check_same_device(packed, "packed", x, "x");
  check_same_device(expert_of_row, "expert_of_row", x, "x");
  check_dtype(expert_of_row, ScalarType::Long, "expert_of_row", "it must be int64");
  Experts e{check_weight(packed, absmax, nested_absmax, nested_offset, n, k, quant_type, block_size, count),
            count,
            tokens_matrix(x, "x", k, "in_features", x, reads),
            as_contiguous(expert_of_row),
            1,
            std::nullopt,
            0,
            std::nullopt};
  const int64_t rows = e.rows(), tokens = e.tokens.rows;
  STD_TORCH_CHECK(tokens == 0 ? rows == 0 : rows % tokens == 0, "expert_of_row has ", rows, " values: x has ", tokens,
                  " rows, and every row needs equally many experts");
  if (tokens > 0 && rows > 0) e.choices = rows / tokens;
  STD_TORCH_CHECK(lora_a.has_value() == lora_b.has_value(),
                  lora_a.has_value() ? "lora_a was given without lora_b" : "lora_b was given without lora_a",
                  ": an adapter needs both");
  if (lora_a.has_value()) {
    STD_TORCH_CHECK(lora_a->dim() == 3 && lora_a->size(0) == count && lora_a->size(2) == k, "lora_a has shape ",
                    text_of(lora_a->sizes()), ": it must be [experts, rank, in_features] with experts=", count,
                    " and in_features=", k);
    e.r = lora_a->size(1);
    STD_TORCH_CHECK(e.r > 0, "rank=0: an adapter needs a rank of at least 1");
    STD_TORCH_CHECK(lora_b->dim() == 3 && lora_b->size(0) == count && lora_b->size(1) == n && lora_b->size(2) == e.r,
                    "lora_b has shape ", text_of(lora_b->sizes()), ": it must be [experts, out_features, rank] = [",
                    count, ", ", n, ", ", e.r, "]");
    STD_TORCH_CHECK(lora_a->scalar_type() == lora_b->scalar_type(), "lora_a and lora_b must have the same dtype");
    e.adapter = Adapter{as_matrix(*lora_a, "lora_a", count * e.r, k, x),
                        as_matrix(*lora_b, "lora_b", count * n, e.r, x), static_cast<float>(scaling)};
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == count && bias->size(1) == n, "bias has shape ",
                    text_of(bias->sizes()), ": it must be [experts, out_features] = [", count, ", ", n, "]");
    e.bias = as_matrix(*bias, "bias", count, n, x);
  }
  return e;
}

void check_lists(const LayerLists& lists, const char* more_name, const std::vector<Tensor>& more) {
  const auto check = [&](const char* name, size_t count) {
    STD_TORCH_CHECK(count == lists.count(), name, " has ", count, " entries: there are ", lists.count(),
                    " weights in packed");
  };
  check("absmax", lists.absmax.size());
  check("nested_absmax", lists.nested_absmax.size());
  check("nested_offset", lists.nested_offset.size());
  check("out_features", lists.out_features.size());
  check("lora_a", lists.lora_a.size());
  check("lora_b", lists.lora_b.size());
  check("scaling", lists.scaling.size());
  check(more_name, more.size());
}

Layers check_layers(const Tensor& x, const LayerLists& lists, const std::string& quant_type, int64_t block_size,
                    const std::vector<Tensor>* bias, Reads reads) {
  STD_TORCH_CHECK(x.dim() >= 1, "x has no dimensions: its last one must be in_features");
  const int64_t k = x.size(x.dim() - 1);
  Layers layers{tokens_matrix(x, "x", k, "in_features", x, reads), {}};
  layers.all.reserve(lists.count());
  for_each_layer(lists.count(), [&](size_t i) {
    const int64_t n = lists.out_features[i];
    check_same_device(lists.packed[i], "packed", x, "x");
    CheckedWeight w = check_weight(lists.packed[i], lists.absmax[i], lists.nested_absmax[i], lists.nested_offset[i], n,
                                   k, quant_type, block_size);
    std::optional<Adapter> adapter =
        check_lora(optional_of(lists.lora_a[i]), optional_of(lists.lora_b[i]), n, k, lists.scaling[i], x);
    std::optional<Matrix> bias_row;
    if (bias != nullptr) bias_row = check_bias(optional_of((*bias)[i]), n, x);
    layers.all.push_back({std::move(w), std::move(adapter), std::move(bias_row)});
  });
  return layers;
}

AffineGrid check_grid(const Tensor& scale, const Tensor& zero_point, int64_t in, int64_t out) {
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
  AffineGrid grid;
  grid.scale = scale.const_data_ptr<float>();
  grid.zero_point = zero_point.const_data_ptr<float>();
  grid.group = in / groups > 0 ? in / groups : 1;
  grid.group_stride = channels;
  grid.channel_stride = channels == 1 ? 0 : 1;
  return grid;
}

Affine check_affine(const Tensor& x, const Tensor& quantized_w, const Tensor& scale, const Tensor& zero_point,
                    const Tensor& b, const Tensor& a, double alpha, Reads reads) {
  STD_TORCH_CHECK(quantized_w.dim() == 2, "quantized_W has shape ", text_of(quantized_w.sizes()),
                  ": it must be [in_features, out_features]");
  check_same_device(quantized_w, "quantized_W", x, "x");
  check_same_device(scale, "scale", x, "x");
  check_same_device(zero_point, "zero_point", x, "x");
  STD_TORCH_CHECK(b.dim() == 2, "B has shape ", text_of(b.sizes()), ": it must be [in_features, rank]");
  const int64_t in = quantized_w.size(0), out = quantized_w.size(1), r = b.size(1);
  STD_TORCH_CHECK(r > 0, "rank=0: an adapter needs a rank of at least 1");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "A and B must have the same dtype");
  Affine affine{tokens_matrix(x, "x", in, "in_features", x, reads),
                as_contiguous(quantized_w),
                as_contiguous(scale),
                as_contiguous(zero_point),
                integer_dtype(quantized_w.scalar_type(), "quantized_W"),
                {},
                in,
                out,
                r,
                lora_matrix(b, "B", in, r, "[in_features, rank]", x),
                lora_matrix(a, "A", r, out, "[rank, out_features]", x),
                static_cast<float>(alpha / static_cast<double>(r))};
  affine.grid = check_grid(affine.scale, affine.zero_point, in, out);
  return affine;
}

}  // namespace qlora::ops
