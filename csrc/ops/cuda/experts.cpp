// The ops forward.experts and its backward for CUDA: the products of all experts of a mixture in one launch.
//
// expert_of_row stays on the device, because reading it on the host would wait for the stream. So a plan, made on the
// device, tells each thread block its expert and its rows (adapter_plan.cu). The number of launches depends on the
// shapes only, and the number of blocks is an upper bound: a block without rows returns at once.
#include "ops/cuda/ops.h"
#include "ops/cuda/products.h"

namespace qlora::ops_cuda {
namespace {

// Experts are adapters to the kernels of the low-rank term: a factor for each, one scaling for all.
Adapters adapters_of(const Experts& e) {
  const Matrix none{Tensor(), nullptr, DType::kFloat32, 0, 0};
  const Matrix &a = e.adapter ? e.adapter->a : none, &b = e.adapter ? e.adapter->b : none;
  const size_t element_size = float_bytes(a.dtype);
  return {a, b, Tensor(), e.of_row, nullptr, e.of_row.const_data_ptr<int64_t>(), e.count, e.r, e.w.n, element_size};
}

// x [rows, k] with the token of each row, for kernels that cannot read rows by a plan.
Matrix repeated(const Matrix& x, int64_t choices) {
  if (choices == 1) return x;
  Tensor t = as_contiguous(view_of(x.tensor, {x.rows, choices, x.cols}, {x.cols, 0, 1}, 0));
  const void* data = t.const_data_ptr();
  return {std::move(t), data, x.dtype, x.rows * choices, x.cols};
}

struct ExpertTerm {
  cuda::LowRankFactor up;
  const AdapterActivation& activation;
};

// out [rows, features] = columns · W of each row's expert + low-rank term + bias, on the CUDA cores. `column_row`: the
// row of `columns` at each position of the plan.
Tensor general_experts(const WeightView& w, bool transposed, const Matrix& columns, const int* column_row,
                       const cuda::AdapterPlan& plan, const ExpertTerm* term, const Matrix* bias, const Tensor& like,
                       int64_t rows, cudaStream_t stream) {
  cuda::GeneralParams p = packed_operand(w, transposed, columns);
  p.rows = transposed ? w.k : w.n;
  p.cols = rows;
  p.plan = plan;
  p.column_row = column_row;
  p.adapters = plan.adapters;
  if (term != nullptr) {
    p.up = by_feature(term->up);
    p.up_adapter_stride = term->up.adapter_stride;
    p.activation = rows_of(term->activation.values);
    p.r = term->activation.values.cols;
  }
  set_bias(p, bias);
  Tensor out = empty_like_device(like, {rows, p.rows}, like.scalar_type());
  p.out = out.mutable_data_ptr();
  p.out_dtype = float_dtype(like.scalar_type(), "x");
  p.out_row_stride = 1;
  p.out_col_stride = p.rows;
  check(cuda::launch_general(p, stream), "general");
  return out;
}

// What both tensor-core products store.
Tensor expert_output(cuda::GemmOutput& out, int64_t rows, int64_t features, const cuda::AdapterPlan& plan,
                     const ExpertTerm* term, const Matrix* bias, const Tensor& like) {
  Tensor y = empty_like_device(like, {rows, features}, like.scalar_type());
  out = {};
  out.y = y.mutable_data_ptr();
  out.m = rows;
  out.rows = features;
  out.plan = plan;
  if (term != nullptr) {
    out.up = term->up;
    out.activations = static_cast<const float*>(term->activation.values.data);
    out.r = static_cast<int>(term->activation.values.cols);
  }
  set_bias(out, bias);
  return y;
}

// y [rows, n] for few rows of each expert.
Tensor gemv_experts(const WeightView& w, const Tensor& x, const Experts& e, const cuda::AdapterPlan& plan,
                    const ExpertTerm* term, const Matrix* bias, const GpuScope& scope) {
  Tensor y = empty_like_device(x, {e.rows(), w.n}, x.scalar_type());
  cuda::GemvParams p{};
  p.weight = w;
  p.x = x.const_data_ptr();
  p.dtype = e.tokens.dtype;
  p.m = cuda::kGemvExpertsPiece;
  p.adapters = e.count;
  if (term != nullptr) {
    p.x_down = static_cast<const float*>(term->activation.values.data);
    p.lora_b = term->up.data;
    p.lora_dtype = term->up.dtype;
    p.r = term->activation.values.cols;
    p.b_adapter_stride = term->up.adapter_stride;
    p.b_is_vectorized = p.lora_dtype == p.dtype && term->up.is_vectorized;
  }
  set_bias(p, bias);
  p.y = y.mutable_data_ptr();
  p.tile = cuda::select_gemv_tile(p.m, w.n, w.k, scope.gpu());
  p.plan = plan;
  p.row_blocks = cuda::select_gemv_row_blocks(e.rows(), e.count, w.n, scope.gpu());
  check(cuda::launch_gemv(p, scope.stream()), "gemv");
  return y;
}

// The sum over a token's choices of [rows, k], in the shape of x.
Tensor sum_of_choices(const Tensor& rows, const Experts& e, const Tensor& x) {
  if (e.rows() == 0) return torch::stable::new_zeros(x, x.sizes());
  const int64_t tokens = e.tokens.rows, k = e.w.k;
  std::vector<int64_t> choices_dim{1};
  const Tensor sum = e.choices == 1
                         ? rows
                         : torch::stable::sum(view_of(rows, {tokens, e.choices, k}, {e.choices * k, k, 1}, 0),
                                              torch::headeronly::IntHeaderOnlyArrayRef(choices_dim));
  return torch::stable::view(sum, x.sizes());
}

}  // namespace

Tensor forward_experts(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                       OptionalTensor nested_offset, std::vector<int64_t> shape, std::string quant_type,
                       int64_t block_size, Tensor expert_of_row, OptionalTensor lora_a, OptionalTensor lora_b,
                       double scaling, OptionalTensor bias) {
  Experts e = check_experts(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size,
                            expert_of_row, lora_a, lora_b, scaling, bias);
  const int64_t rows = e.rows(), n = e.w.n, k = e.w.k;
  const GpuScope scope(x, "forward.experts", {rows, n, k, e.r});
  if (rows == 0 || n == 0) return empty_like_device(x, {rows, n}, x.scalar_type());
  const WeightView w = device_view_of(e.w);
  const Adapters adapters = adapters_of(e);
  const bool general = cuda::why_general_forward({rows, n, k, e.tokens.dtype, block_size}, scope.gpu()) != nullptr;
  const cuda::GemmTile tile = cuda::select_experts_tile(rows, e.count, n, scope.gpu());
  const bool gemv = !general && cuda::experts_take_gemv(rows, e.count);
  const int piece = gemv ? cuda::kGemvExpertsPiece : cuda::tile_tokens(tile);
  const TokenPlan plan = plan_tokens(adapters, rows, scope, ExpertsPlan{e.choices, piece});
  std::optional<AdapterActivation> x_down;
  std::optional<ExpertTerm> term;
  if (e.adapter) {
    const cuda::LowRankFactor a = a_factor(e.adapter->a, e.r * k);
    if (tensor_core_down(e.tokens, e.r, scope))
      x_down = std::move(
          low_rank_down_tiled({{e.tokens, a, e.choices}}, e.r, e.adapter->scaling, scope, false, &plan).front());
    else
      x_down = token_dot(repeated(e.tokens, e.choices), a, e.r, e.adapter->scaling, scope.stream(), &adapters);
    term.emplace(ExpertTerm{b_factor(e.adapter->b, n * e.r), *x_down});
  }
  const ExpertTerm* up = term ? &*term : nullptr;
  const Matrix* bias_rows = e.bias ? &*e.bias : nullptr;
  if (general)
    return general_experts(w, false, e.tokens, plan.plan.x_row, plan.plan, up, bias_rows, x, rows, scope.stream());
  const Tensor tokens = aligned(e.tokens.tensor);
  if (gemv) return gemv_experts(w, tokens, e, plan.plan, up, bias_rows, scope);
  cuda::GemmParams p{};
  const Tensor y = expert_output(p.out, rows, n, plan.plan, up, bias_rows, x);
  p.weight = w;
  p.x = tokens.const_data_ptr();
  p.dtype = e.tokens.dtype;
  p.tile = tile;
  check(cuda::launch_gemm(p, scope.stream()), "gemm");
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_experts(
    Tensor grad, Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
    std::vector<int64_t> shape, std::string quant_type, int64_t block_size, Tensor expert_of_row, OptionalTensor lora_a,
    OptionalTensor lora_b, double scaling, bool needs_x, bool needs_lora, bool needs_bias) {
  Experts e = check_experts(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size,
                            expert_of_row, lora_a, lora_b, scaling, std::nullopt, values_if(needs_lora));
  const int64_t rows = e.rows(), n = e.w.n, k = e.w.k;
  const Matrix dy = tokens_matrix(grad, "grad", n, "out_features", x);
  STD_TORCH_CHECK(dy.rows == rows, "grad has ", dy.rows, " rows: expert_of_row has ", rows);
  const GpuScope scope(x, "backward.experts", {rows, n, k, e.r});
  const cudaStream_t stream = scope.stream();
  const Adapters adapters = adapters_of(e);
  const cuda::GemmTile tile = cuda::select_experts_tile(rows, e.count, k, scope.gpu());  // of dx
  const TokenPlan plan = plan_tokens(adapters, rows, scope, ExpertsPlan{e.choices, cuda::tile_tokens(tile)});

  OptionalTensor d_x, d_lora_a, d_lora_b, d_bias;
  std::optional<AdapterActivation> dy_down;  // scaling * dy · lora_b of the row's expert, [rows, r]
  std::optional<ExpertTerm> term;
  if (e.adapter && (needs_x || needs_lora)) {
    const cuda::LowRankFactor a = a_factor(e.adapter->a, e.r * k), b = b_factor(e.adapter->b, n * e.r);
    const float scale = e.adapter->scaling;
    const cuda::Problem problem{rows, n, k, e.tokens.dtype, 0};
    const bool on_tensor_cores = needs_lora && rows > 0 && e.count > 0 && dy.dtype == e.tokens.dtype &&
                                 cuda::why_general_factors(problem, scope.gpu()) == nullptr;
    if (needs_lora) {
      d_lora_a = empty_of_shape(*lora_a);
      d_lora_b = empty_of_shape(*lora_b);
    }
    if (on_tensor_cores) {
      std::vector<AdapterActivation> both = low_rank_down_tiled({{e.tokens, a, e.choices}, {dy, b}}, e.r, scale, scope,
                                                                /*note_largest=*/true, &plan);
      low_rank_grads(both[0], both[1], e.tokens, dy, *d_lora_a, *d_lora_b, scope, &plan);
      dy_down = std::move(both[1]);
    } else if (tensor_core_down(dy, e.r, scope)) {
      dy_down = std::move(low_rank_down_tiled({{dy, b}}, e.r, scale, scope, false, &plan).front());
    } else {
      dy_down = token_dot(dy, b, e.r, scale, stream, &adapters);
    }
    if (needs_lora && !on_tensor_cores) {
      const Matrix row_tokens = repeated(e.tokens, e.choices);
      const AdapterActivation x_down = token_dot(row_tokens, a, e.r, scale, stream, &adapters);
      low_rank_grad_general(dy_down->values, row_tokens, true, *d_lora_a, stream, &adapters);
      low_rank_grad_general(x_down.values, dy, false, *d_lora_b, stream, &adapters);
    }
    term.emplace(ExpertTerm{a, *dy_down});
  }
  if (needs_x) {
    const ExpertTerm* down = term ? &*term : nullptr;
    const WeightView w = device_view_of(e.w);
    const bool general = x.scalar_type() != dy.tensor.scalar_type() ||
                         cuda::why_general_backward({rows, n, k, dy.dtype, block_size}, scope.gpu()) != nullptr;
    if (rows == 0 || k == 0) {
      d_x = sum_of_choices(x, e, x);
    } else if (general) {
      d_x = sum_of_choices(general_experts(w, true, dy, plan.plan.order, plan.plan, down, nullptr, x, rows, stream), e,
                           x);
    } else {
      cuda::GemmDxParams p{};
      const Tensor dx = expert_output(p.out, rows, k, plan.plan, down, nullptr, x);
      const Tensor tokens = aligned(dy.tensor);
      p.weight = w;
      p.dy = tokens.const_data_ptr();
      p.dtype = dy.dtype;
      p.tile = tile;
      check(cuda::launch_gemm_dx(p, stream), "gemm_dx");
      d_x = sum_of_choices(dx, e, x);
    }
  }
  if (needs_bias) {
    d_bias = empty_like_device(x, {e.count, n}, ScalarType::Float);
    check(cuda::launch_column_sum({dy.data, dy.dtype, rows, n, d_bias->mutable_data_ptr<float>(), plan.plan}, stream),
          "column_sum");
  }
  const auto given = [&](const OptionalTensor& t) { return t ? *t : nothing(x); };
  return {given(d_x), given(d_lora_a), given(d_lora_b), given(d_bias)};
}

}  // namespace qlora::ops_cuda
