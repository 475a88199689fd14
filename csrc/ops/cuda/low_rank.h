// The low-rank term on a GPU: factors, activations, and the gradients of the factors.
#pragma once

#include <initializer_list>
#include <utility>
#include <vector>

#include "ops/cuda/runtime.h"

namespace qlora::ops_cuda {

inline cuda::DenseMatrix rows_of(const Matrix& m) { return {m.data, m.dtype, m.cols, 1}; }
inline cuda::DenseMatrix columns_of(const Matrix& m) { return {m.data, m.dtype, 1, m.cols}; }

// A float32 matrix [rows, cols] on the device of `like`.
inline Matrix scratch_matrix(const Tensor& like, int64_t rows, int64_t cols) {
  Tensor t = empty_like_device(like, {rows, cols}, ScalarType::Float);
  const void* data = t.const_data_ptr();
  return {std::move(t), data, DType::kFloat32, rows, cols};
}

// lora_a [r, k] or lora_b [n, r] as a factor; adapters are adapter_stride elements apart.
inline cuda::LowRankFactor a_factor(const Matrix& a, int64_t adapter_stride = 0) {
  const bool vectorized = is_aligned(a.data) && a.cols % 8 == 0 && adapter_stride % 8 == 0;
  return {a.data, a.dtype, a.cols, 1, adapter_stride, vectorized};
}
inline cuda::LowRankFactor b_factor(const Matrix& b, int64_t adapter_stride = 0) {
  const bool vectorized = is_aligned(b.data) && b.cols % 8 == 0 && adapter_stride % 8 == 0;
  return {b.data, b.dtype, 1, b.cols, adapter_stride, vectorized};
}
// The factor of adapter 0 as a matrix indexed (rank, feature) or (feature, rank).
inline cuda::DenseMatrix by_rank(const cuda::LowRankFactor& f) {
  return {f.data, f.dtype, f.rank_stride, f.feature_stride};
}
inline cuda::DenseMatrix by_feature(const cuda::LowRankFactor& f) {
  return {f.data, f.dtype, f.feature_stride, f.rank_stride};
}

// Scaled low-rank activations [m, r]. With a plan, rows without an adapter are uninitialised.
struct AdapterActivation {
  Matrix values;
  std::optional<Tensor> largest = std::nullopt;  // see LoraDownJob
};

// Tokens sorted by adapter, on the device.
struct TokenPlan {
  Tensor storage;
  cuda::AdapterPlan plan;
};

// For experts: token i reads row i / choices of x, and the plan lists pieces of `piece` positions.
struct ExpertsPlan {
  int64_t choices;
  int piece;
};
inline TokenPlan plan_tokens(const Adapters& adapters, int64_t m, const GpuScope& scope,
                             std::optional<ExpertsPlan> experts = std::nullopt) {
  const int64_t count = adapters.count, lists = experts ? count + 1 : count;  // the rows without an expert are a list
  const int64_t tiles = cuda::most_tiles(m, lists, cuda::kAdapterTile), positions = tiles * cuda::kAdapterTile;
  const int64_t pieces = experts ? cuda::most_tiles(m, lists, experts->piece) : 0;
  const bool shares_x = experts && experts->choices > 1;
  const int64_t elements = positions * (shares_x ? 2 : 1) + tiles + pieces + (count + 1) * (cuda::kPlanParts + 1);
  Tensor storage = empty_like_device(adapters.adapter_of_row, {elements}, ScalarType::Int);
  int* next = storage.mutable_data_ptr<int>();
  const auto take = [&](int64_t size) { return std::exchange(next, next + size); };
  cuda::AdapterPlanParams p{};
  p.adapter_of_token = adapters.of_row;
  p.m = m;
  p.adapters = count;
  p.tiles = tiles;
  p.order = take(positions);
  if (shares_x) p.x_row = take(positions);
  p.adapter_of_tile = take(tiles);
  if (experts) p.pieces = take(pieces);
  p.first_tile = take(count + 1);
  p.counts = take((count + 1) * cuda::kPlanParts);
  p.piece_count = pieces;
  p.piece = experts ? experts->piece : 0;
  p.choices = experts ? static_cast<int>(experts->choices) : 1;
  check(cuda::launch_adapter_plan(p, scope.stream()), "adapter_plan");
  const int* x_row = shares_x ? p.x_row : p.order;
  return {std::move(storage),
          {p.order, p.adapter_of_tile, p.first_tile, adapters.scale, tiles, count, x_row, p.pieces, pieces, p.piece}};
}

// The low-rank term of a sum: activation [tokens, r] times the up factor (rank, row); `matrix` is the same factor.
struct AdapterTerm {
  cuda::LowRankFactor factor;
  const Matrix* matrix = nullptr;
  const AdapterActivation* activation = nullptr;
  const Adapters* adapters = nullptr;
};

// scaling * x · factorᵀ on the CUDA cores. With `adapters`, each token uses its own adapter and scale.
inline AdapterActivation token_dot(const Matrix& x, const cuda::LowRankFactor& factor, int64_t r, float scaling,
                                   cudaStream_t stream, const Adapters* adapters = nullptr) {
  Matrix out = scratch_matrix(x.tensor, x.rows, r);
  cuda::TokenDotParams p;
  p.x = rows_of(x);
  p.operand = by_rank(factor);
  p.scaling = scaling;
  if (adapters != nullptr) {
    p.adapter_stride = factor.adapter_stride;
    p.adapter_of_token = adapters->of_row;
    p.adapters = adapters->count;
    p.scaling_of_adapter = adapters->scale;
  }
  p.tokens = x.rows;
  p.rows = r;
  p.steps = x.cols;
  const bool known_dtypes = factor.dtype == x.dtype || factor.dtype == DType::kFloat32;
  p.is_vectorized =
      factor.is_vectorized && factor.feature_stride == 1 && known_dtypes && x.cols % 8 == 0 && is_aligned(x.data);
  p.out = static_cast<float*>(out.tensor.mutable_data_ptr());
  check(cuda::launch_token_dot(p, stream), "token_dot");
  return {std::move(out)};
}

// One down projection of low_rank_down_tiled(), which computes scaling * x · factorᵀ for up to two pairs in one launch
// on the tensor cores. With a plan, each token uses its own adapter, with the scale that the plan holds.
struct DownPair {
  const Matrix& x;
  const cuda::LowRankFactor& factor;
  int64_t choices = 1;  // tokens for each row of x; more than one only in a plan for experts
};
inline std::vector<AdapterActivation> low_rank_down_tiled(std::initializer_list<DownPair> pairs, int64_t r,
                                                          float scaling, const GpuScope& scope, bool note_largest,
                                                          const TokenPlan* plan = nullptr) {
  const Matrix& first = pairs.begin()->x;
  cuda::LoraDownParams p{};
  p.dtype = first.dtype;
  p.m = first.rows * pairs.begin()->choices;
  p.r = r;
  p.scale = scaling;
  p.tokens_per_block = cuda::select_lora_down_tokens(p.m, r, scope.gpu());
  if (plan != nullptr) p.plan = plan->plan;
  std::optional<Tensor> largest;  // needed only for float16
  if (note_largest && first.dtype == DType::kFloat16)
    largest = torch::stable::new_zeros(first.tensor, {static_cast<int64_t>(pairs.size())}, ScalarType::Long);
  std::vector<Tensor> tokens;  // kept alive until the launch
  std::vector<AdapterActivation> results;
  for (const DownPair& pair : pairs) {
    const int64_t i = p.count++;
    tokens.push_back(aligned(pair.x.tensor));
    Matrix out = scratch_matrix(pair.x.tensor, p.m, r);
    cuda::LoraDownJob& job = p.job[i];
    job = {tokens.back().const_data_ptr(), pair.x.cols, pair.factor, out.tensor.mutable_data_ptr<float>(), nullptr};
    job.row = pair.choices > 1 ? p.plan.x_row : p.plan.order;
    results.push_back({std::move(out)});
    if (!largest) continue;
    results.back().largest = vector_view(*largest, 1, i);
    job.largest = reinterpret_cast<unsigned long long*>(results.back().largest->mutable_data_ptr<int64_t>());
  }
  check(cuda::launch_lora_down(p, scope.stream()), "lora_down");
  return results;
}

// Whether a down projection of these tokens can run on the tensor cores.
inline bool tensor_core_down(const Matrix& x, int64_t r, const GpuScope& scope) {
  return x.rows > 0 && cuda::why_general_low_rank({x.rows, r, x.cols, x.dtype, 0}, scope.gpu()) == nullptr;
}

// scaling * x · factorᵀ, on the tensor cores if they can run it and are faster.
inline AdapterActivation low_rank_down(const Matrix& x, const cuda::LowRankFactor& factor, int64_t r, float scaling,
                                       const GpuScope& scope) {
  if (!tensor_core_down(x, r, scope) || cuda::dots_win(x.rows, r))
    return token_dot(x, factor, r, scaling, scope.stream());
  return std::move(low_rank_down_tiled({{x, factor}}, r, scaling, scope, false).front());
}

// The same, with an adapter for each token. `plan` is null if sorting the tokens by adapter does not pay off.
inline AdapterActivation low_rank_down_multi(const Matrix& x, const cuda::LowRankFactor& factor,
                                             const Adapters& adapters, const TokenPlan* plan, const GpuScope& scope) {
  if (plan == nullptr) return token_dot(x, factor, adapters.r, 1.0f, scope.stream(), &adapters);
  return std::move(low_rank_down_tiled({{x, factor}}, adapters.r, 1.0f, scope, false, plan).front());
}

// Gradient of a low-rank factor on the CUDA cores: for each adapter, the sum over tokens of activation [tokens, r]
// times x [tokens, features]. The result is [r, features] if r_is_major, else [features, r].
inline void low_rank_grad_general(const Matrix& activation, const Matrix& x, bool r_is_major, const Tensor& out,
                                  cudaStream_t stream, const Adapters* adapters = nullptr) {
  if (x.rows == 0) {  // the address of an empty adapter_of_row is null, which would mean one adapter
    torch::stable::fill_(out, 0.0);
    return;
  }
  cuda::GeneralParams p;
  p.operand = columns_of(activation);
  p.columns = columns_of(x);
  p.rows = activation.cols;
  p.cols = x.cols;
  p.steps = x.rows;
  p.out = out.mutable_data_ptr();
  p.out_dtype = float_dtype(out.scalar_type(), "lora");
  p.out_row_stride = r_is_major ? x.cols : 1;
  p.out_col_stride = r_is_major ? 1 : activation.cols;
  if (adapters != nullptr) {
    p.adapters = adapters->count;
    p.adapter_of_step = adapters->of_row;
    p.out_adapter_stride = activation.cols * x.cols;
  }
  check(cuda::launch_general(p, stream), "general");
}

// Whether the gradients of both low-rank factors can run on the tensor cores.
inline bool tensor_core_grads(const Matrix& dy, const Matrix& x, const GpuScope& scope) {
  const cuda::Problem problem{x.rows, dy.cols, x.cols, x.dtype, 0};
  return x.rows > 0 && dy.dtype == x.dtype && cuda::why_general_factors(problem, scope.gpu()) == nullptr;
}

// d_lora_a [r, k] = dy_downᵀ x and d_lora_b [n, r] = dyᵀ x_down on the tensor cores, with a plan for each adapter. The
// rows of x are those of the plan.
inline void low_rank_grads(const AdapterActivation& x_down, const AdapterActivation& dy_down, const Matrix& x,
                           const Matrix& dy, const Tensor& d_lora_a, const Tensor& d_lora_b, const GpuScope& scope,
                           const TokenPlan* plan = nullptr) {
  cuda::LoraGradParams p{};
  cuda::LoraSumJobs sums{};
  p.dtype = x.dtype;
  p.m = dy.rows;
  p.ranks = x_down.values.cols;
  p.splits = d_lora_a.scalar_type() != x.tensor.scalar_type();
  p.ranks_per_block = cuda::select_lora_grad_ranks(p.ranks);
  if (plan != nullptr) p.plan = plan->plan;
  std::vector<Tensor> alive;  // tensors kept alive until the launches
  const auto add = [&](const Matrix& tokens, const AdapterActivation& activation, const Tensor& out, bool r_is_major) {
    const int64_t features = tokens.cols, count = p.plan.adapters * p.ranks * features;
    cuda::LoraGradJob& job = p.job[p.count++];
    alive.push_back(aligned(tokens.tensor));
    job.x = alive.back().const_data_ptr();
    job.features = features;
    job.row = r_is_major && dy.rows > x.rows ? p.plan.x_row : p.plan.order;
    job.activations = static_cast<const float*>(activation.values.data);
    if (activation.largest)
      job.largest = reinterpret_cast<const unsigned long long*>(activation.largest->const_data_ptr<int64_t>());
    job.parts = cuda::select_lora_grad_parts(p.m, features, p.ranks, p.plan.adapters, scope.gpu());
    job.rank_stride = r_is_major ? features : 1;
    job.feature_stride = r_is_major ? 1 : p.ranks;
    const DType dtype = float_dtype(out.scalar_type(), "lora");
    if (job.parts == 1 && dtype == DType::kFloat32) {
      job.out = out.mutable_data_ptr<float>();
      return;
    }
    alive.push_back(empty_like_device(out, {job.parts, count}, ScalarType::Float));
    job.out = alive.back().mutable_data_ptr<float>();
    sums.job[sums.count++] = {job.out, job.parts, count, out.mutable_data_ptr(), dtype};
  };
  add(x, dy_down, d_lora_a, true);
  add(dy, x_down, d_lora_b, false);
  check(cuda::launch_lora_grad(p, scope.stream()), "lora_grad");
  if (sums.count > 0) check(cuda::launch_lora_sum(sums, scope.stream()), "lora_sum");
}

}  // namespace qlora::ops_cuda
