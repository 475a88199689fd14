// The low-rank term on a GPU: activations, operands for the tensor cores, the down projection, gradients of the
// factors.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "ops/cuda_runtime.h"

namespace qlora::ops {

inline cuda::DenseMatrix rows_of(const Matrix& m) { return {m.data, m.dtype, m.cols, 1}; }
inline cuda::DenseMatrix columns_of(const Matrix& m) { return {m.data, m.dtype, 1, m.cols}; }

// A float32 matrix [rows, cols] on the device of `like`.
inline Matrix scratch_matrix(const Tensor& like, int64_t rows, int64_t cols) {
  Tensor t = empty_like_device(like, {rows, cols}, ScalarType::Float);
  const void* data = t.const_data_ptr();
  return {std::move(t), data, DType::kFloat32, rows, cols};
}

// Low-rank activations [m, r] as the down projection left them: sums of several parts, not yet scaled.
struct Activation {
  Tensor storage;
  cuda::DenseMatrix source;  // (token, r) of one part
  int64_t m, r;
  float scale = 1.0f;
  int parts = 1;
  int64_t part_stride = 0;                       // elements
  std::optional<Tensor> largest = std::nullopt;  // see LoraDownParams
  const Adapters* adapters = nullptr;            // a token's value has to be multiplied by its adapter's scale as well
};

// Tokens sorted by adapter, on the device.
struct TokenPlan {
  Tensor storage;
  cuda::AdapterPlan plan;
};

inline TokenPlan plan_tokens(const Adapters& adapters, int64_t m, const GpuScope& scope) {
  const int64_t tiles = cuda::most_adapter_tiles(m, adapters.count), positions = tiles * cuda::kAdapterTile;
  Tensor storage = empty_like_device(adapters.scaling, {positions + tiles + 2 * adapters.count + 1}, ScalarType::Int);
  int* order = storage.mutable_data_ptr<int>();
  cuda::AdapterPlanParams p{};
  p.adapter_of_token = adapters.of_row;
  p.m = m;
  p.adapters = adapters.count;
  p.tiles = tiles;
  p.order = order;
  p.adapter_of_tile = order + positions;
  p.first_tile = p.adapter_of_tile + tiles;
  p.counts = p.first_tile + adapters.count + 1;
  check(cuda::launch_adapter_plan(p, scope.stream()), "adapter_plan");
  return {std::move(storage), {order, p.adapter_of_tile, p.first_tile, adapters.scale, tiles, adapters.count}};
}

// A low-rank operand for the tensor cores: 16 bit, whole steps of 16 ranks.
struct Packed16 {
  Tensor storage;
  const void* data = nullptr;
  int r = 0;
};

// The low-rank term of a sum: up (row, r) times activation [tokens, r].
struct Up {
  cuda::DenseMatrix matrix;
  const Activation* activation;
  const Adapters* adapters = nullptr;  // then `matrix` is that of adapter 0
  int64_t adapter_stride = 0;
  // What was prepared for the tensor cores already, together with other packs.
  std::optional<Packed16> operand = std::nullopt, activation_operand = std::nullopt;
};

// Packs that wait for each other: as many as possible go into one launch. flush() before their results are read.
class PackQueue {
 public:
  explicit PackQueue(cudaStream_t stream) : stream_(stream) {}
  PackQueue(const PackQueue&) = delete;
  PackQueue& operator=(const PackQueue&) = delete;

  // `sources`: tensors that p reads and nobody else may keep alive.
  void add(cuda::LoraPackParams p, const Tensor& out, std::initializer_list<Tensor> sources = {}) {
    p.out = out.mutable_data_ptr();
    p.dtype = float_dtype(out.scalar_type(), "lora");
    if (jobs_.count == cuda::kMostPacks || (jobs_.count > 0 && jobs_.job[0].dtype != p.dtype)) flush();
    jobs_.job[jobs_.count++] = p;
    alive_.push_back(out);
    alive_.insert(alive_.end(), sources.begin(), sources.end());
  }

  void flush() {
    if (jobs_.count > 0) check(cuda::launch_lora_pack(jobs_, stream_), "lora_pack");
    jobs_.count = 0;
    alive_.clear();
  }

 private:
  cudaStream_t stream_;
  cuda::LoraPackJobs jobs_{};
  std::vector<Tensor> alive_;
};

inline cuda::LoraPackParams pack_params(const cuda::DenseMatrix& source, int64_t rows, int64_t r, int64_t padded_r,
                                        cuda::Split split) {
  cuda::LoraPackParams p{};
  p.source = source;
  p.rows = rows;
  p.r = r;
  p.padded_r = padded_r;
  p.split = split;
  return p;
}

inline cuda::LoraPackParams pack_params(const Activation& a, int64_t padded_r, cuda::Split split) {
  cuda::LoraPackParams p = pack_params(a.source, a.m, a.r, padded_r, split);
  p.scale = a.scale;
  p.parts = a.parts;
  p.part_stride = a.part_stride;
  if (a.adapters != nullptr) {
    p.adapter_of_token = a.adapters->of_row;
    p.scale_of_adapter = a.adapters->scale;
    p.adapter_count = a.adapters->count;
  }
  return p;
}

// The activations in float32, [m, r].
inline Matrix as_float(const Activation& a, cudaStream_t stream) {
  if (a.parts == 1 && a.scale == 1.0f && a.adapters == nullptr)
    return {a.storage, a.source.data, DType::kFloat32, a.m, a.r};
  const Matrix out = scratch_matrix(a.storage, a.m, a.r);
  PackQueue packs(stream);
  if (a.m > 0) packs.add(pack_params(a, a.r, cuda::Split::kNone), out.tensor);
  packs.flush();
  return out;
}

// Both sides of the low-rank term of a gemm, [rows, width] and [tokens, width]. Adapters of the tokens' dtype are taken
// as they are, as torch does, if may_borrow without a copy; for 16-bit tokens others are split into high and low
// halves.
struct LowRank16 {
  Packed16 up, activation;
};

inline bool splits_low_rank(const Up& up, const Matrix& x) {
  return up.matrix.dtype != x.dtype && x.dtype != DType::kFloat32;
}

inline Packed16 up_operand(const Up& up, int64_t r, int64_t rows, const Matrix& x, PackQueue& packs, bool may_borrow) {
  const int64_t padded = ceil_div(r, 16) * 16;
  const bool split = splits_low_rank(up, x);
  if (may_borrow && up.matrix.dtype == x.dtype && up.matrix.col_stride == 1 && up.matrix.row_stride == r &&
      r % 16 == 0 && is_aligned(up.matrix.data))
    return {x.tensor, up.matrix.data, static_cast<int>(r)};
  const int64_t width = split ? 3 * padded : padded, adapters = up.adapters != nullptr ? up.adapters->count : 1;
  Tensor storage = empty_like_device(x.tensor, {adapters * rows, width}, x.tensor.scalar_type());
  cuda::LoraPackParams p = pack_params(up.matrix, rows, r, padded, split ? cuda::Split::kOperand : cuda::Split::kNone);
  p.adapters = adapters;
  p.adapter_stride = up.adapter_stride;
  packs.add(p, storage);
  const void* data = storage.const_data_ptr();
  return {std::move(storage), data, static_cast<int>(width)};
}

inline Packed16 activation_operand(const Up& up, const Matrix& x, PackQueue& packs) {
  const int64_t padded = ceil_div(up.activation->r, 16) * 16;
  const bool split = splits_low_rank(up, x);
  const int64_t width = split ? 3 * padded : padded;
  Tensor storage = empty_like_device(x.tensor, {x.rows, width}, x.tensor.scalar_type());
  packs.add(pack_params(*up.activation, padded, split ? cuda::Split::kActivation : cuda::Split::kNone), storage);
  const void* data = storage.const_data_ptr();
  return {std::move(storage), data, static_cast<int>(width)};
}

inline LowRank16 low_rank_operands(const Up& up, int64_t rows, const Matrix& x, cudaStream_t stream,
                                   bool may_borrow = true) {
  PackQueue packs(stream);
  LowRank16 operands{up.operand ? *up.operand : up_operand(up, up.activation->r, rows, x, packs, may_borrow),
                     up.activation_operand ? *up.activation_operand : activation_operand(up, x, packs)};
  packs.flush();
  return operands;
}

// scaling * x · operandᵀ on the CUDA cores, one adapter for each token if there are several.
inline Activation token_dot(const Matrix& x, const cuda::DenseMatrix& operand, int64_t rows, float scaling,
                            cudaStream_t stream, const Adapters* adapters = nullptr, int64_t adapter_stride = 0) {
  const Matrix out = scratch_matrix(x.tensor, x.rows, rows);
  cuda::TokenDotParams p;
  p.x = rows_of(x);
  p.operand = operand;
  p.scaling = scaling;
  if (adapters != nullptr) {
    p.adapter_stride = adapter_stride;
    p.adapter_of_token = adapters->of_row;
    p.adapters = adapters->count;
    p.scaling_of_adapter = adapters->scale;
  }
  p.tokens = x.rows;
  p.rows = rows;
  p.steps = x.cols;
  const bool contiguous = operand.col_stride == 1 && operand.row_stride % 8 == 0 && adapter_stride % 8 == 0;
  const bool known_dtypes = operand.dtype == x.dtype || operand.dtype == DType::kFloat32;
  p.is_vectorized = contiguous && known_dtypes && x.cols % 8 == 0 && is_aligned(x.data) && is_aligned(operand.data);
  p.out = static_cast<float*>(out.tensor.mutable_data_ptr());
  check(cuda::launch_token_dot(p, stream), "token_dot");
  return {out.tensor, rows_of(out), x.rows, rows};
}

// The operand of a down projection in the dtype of x: the factors as they are, or two parts of each, high and low,
// where they have another dtype.
struct Factor {
  cuda::DenseMatrix matrix;  // (rank, feature), of adapter 0 if there are several
  int64_t adapters = 1;
  int64_t adapter_stride = 0;  // elements
};
struct DownOperand {
  Tensor storage;
  const void* data;
  int splits;
};

inline DownOperand down_operand(const Factor& factor, int64_t r, const Matrix& x, PackQueue& packs) {
  const cuda::DenseMatrix& operand = factor.matrix;
  const bool same = operand.dtype == x.dtype;
  const bool side_by_side = factor.adapters == 1 || factor.adapter_stride == r * x.cols;
  if (same && operand.col_stride == 1 && operand.row_stride == x.cols && side_by_side && is_aligned(operand.data))
    return {x.tensor, operand.data, 1};
  const int splits = same ? 1 : 2;
  Tensor packed = empty_like_device(x.tensor, {factor.adapters * splits * r, x.cols}, x.tensor.scalar_type());
  cuda::LoraPackParams p = pack_params(operand, r, x.cols, x.cols, same ? cuda::Split::kNone : cuda::Split::kStacked);
  p.adapters = factor.adapters;
  p.adapter_stride = factor.adapter_stride;
  packs.add(p, packed);
  const void* data = packed.const_data_ptr();
  return {std::move(packed), data, splits};
}

// Where a kernel notes the largest magnitude of its results; float16 alone needs it.
inline std::optional<Tensor> largest_of(const Matrix& x) {
  if (x.dtype != DType::kFloat16) return std::nullopt;
  return torch::stable::new_zeros(x.tensor, {1}, ScalarType::Long);
}
inline unsigned long long* pointer_to(const std::optional<Tensor>& largest) {
  return largest ? reinterpret_cast<unsigned long long*>(largest->mutable_data_ptr<int64_t>()) : nullptr;
}

// The down projection on the tensor cores: scaling * x · factorᵀ, or with a plan x · factorᵀ of each token's adapter,
// whose scale `adapters` holds.
inline Activation low_rank_down_tiled(const Matrix& x, const Factor& factor, int64_t r, float scaling,
                                      const GpuScope& scope, PackQueue& packs, bool note_largest,
                                      const TokenPlan* plan = nullptr, const Adapters* adapters = nullptr) {
  const DownOperand operand = down_operand(factor, r, x, packs);
  packs.flush();
  const Tensor tokens = aligned(x.tensor);
  cuda::LoraDownParams p{};
  p.x = tokens.const_data_ptr();
  p.operand = operand.data;
  p.dtype = x.dtype;
  p.m = x.rows;
  p.rows = r;
  p.elems = x.cols;
  p.splits = operand.splits;
  p.parts = cuda::select_lora_parts(p.m, p.rows, p.elems, scope.gpu());
  if (plan != nullptr) p.plan = plan->plan;
  Tensor out = empty_like_device(x.tensor, {p.parts, p.m, p.rows}, ScalarType::Float);
  std::optional<Tensor> largest = note_largest ? largest_of(x) : std::nullopt;
  p.out = out.mutable_data_ptr<float>();
  p.largest = pointer_to(largest);
  check(cuda::launch_lora_down(p, scope.stream()), "lora_down");
  return {out, {p.out, DType::kFloat32, r, 1}, p.m, r, scaling, p.parts, p.m * r, std::move(largest), adapters};
}

// Whether the tensor cores take a down projection of these tokens.
inline bool tensor_core_down(const Matrix& x, int64_t r, const GpuScope& scope) {
  return x.rows > 0 && cuda::why_general_low_rank({x.rows, r, x.cols, x.dtype, 0}, scope.gpu()) == nullptr;
}

// scaling * x · operandᵀ, operand (r, features).
inline Activation low_rank_down(const Matrix& x, const cuda::DenseMatrix& operand, int64_t r, float scaling,
                                const GpuScope& scope, PackQueue& packs, bool note_largest = false) {
  if (!tensor_core_down(x, r, scope) || (cuda::dots_win(x.rows, r) && !note_largest))
    return token_dot(x, operand, r, scaling, scope.stream());
  return low_rank_down_tiled(x, {operand}, r, scaling, scope, packs, note_largest);
}

// The same with an adapter for each token. A plan is given where sorting the tokens pays.
inline Activation low_rank_down_multi(const Matrix& x, const Factor& factor, const Adapters& adapters,
                                      const TokenPlan* plan, const GpuScope& scope, PackQueue& packs,
                                      bool note_largest = false) {
  if (plan == nullptr)
    return token_dot(x, factor.matrix, adapters.r, 1.0f, scope.stream(), &adapters, factor.adapter_stride);
  return low_rank_down_tiled(x, factor, adapters.r, 1.0f, scope, packs, note_largest, plan, &adapters);
}

// Gradient of a low-rank factor on the CUDA cores: sum over tokens of activation [tokens, r] and x [tokens, features],
// for each adapter. Written as [r, features] if r_is_major, else as [features, r].
inline void low_rank_grad_general(const Matrix& activation, const Matrix& x, bool r_is_major, const Tensor& out,
                                  cudaStream_t stream, const Adapters* adapters = nullptr) {
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

// Whether the tensor cores take the gradients of both low-rank factors.
inline bool tensor_core_grads(const Matrix& dy, const Matrix& x, const GpuScope& scope) {
  const cuda::Problem problem{x.rows, dy.cols, x.cols, x.dtype, 0};
  return x.rows > 0 && dy.dtype == x.dtype && cuda::why_general_factors(problem, scope.gpu()) == nullptr;
}

// out = activationᵀ x, [r, features] if r_is_major, else [features, r], on the tensor cores; of each adapter where the
// activations have several. With `down`, the same pass gives scaling * x · downᵀ. `results` has still to add up `out`.
inline std::optional<Activation> low_rank_grad(const Activation& activation, const Matrix& x, bool r_is_major,
                                               const Tensor& out, const GpuScope& scope, PackQueue& packs,
                                               PackQueue& results, const TokenPlan* plan,
                                               const DownOperand* down = nullptr, float scaling = 1.0f) {
  cuda::LoraGradParams p{};
  if (plan != nullptr) p.plan = plan->plan;
  const int64_t m = x.rows, r = activation.r, features = x.cols, adapters = p.plan.adapters;
  const int64_t padded_m = plan != nullptr ? p.plan.tiles * cuda::kAdapterTile : ceil_div(m, 8) * 8;
  const bool same = out.scalar_type() == x.tensor.scalar_type();
  p.splits = same ? 1 : 2;

  // The activations as [r, tokens], in the dtype of x.
  const Tensor factor = empty_like_device(x.tensor, {p.splits * r, padded_m}, x.tensor.scalar_type());
  cuda::LoraPackParams pack = pack_params(activation, padded_m, same ? cuda::Split::kNone : cuda::Split::kStacked);
  std::swap(pack.rows, pack.r);
  std::swap(pack.source.row_stride, pack.source.col_stride);
  pack.tokens_are_columns = true;
  if (plan != nullptr) {
    pack.r = padded_m;
    pack.token_order = p.plan.order;
  }
  if (activation.largest) {
    pack.half_range = cuda::HalfRange::kMultiply;
    pack.largest = pointer_to(activation.largest);
    pack.largest_factor = static_cast<float>(activation.parts) * std::abs(activation.scale);
  }
  packs.add(pack, factor);
  packs.flush();

  const cuda::LoraGradTile tile =
      cuda::select_lora_grad(m, features, r, adapters, p.splits, down != nullptr, scope.gpu());
  const Tensor tokens = aligned(x.tensor);
  const Tensor parts = empty_like_device(x.tensor, {tile.parts, adapters * r, features}, ScalarType::Float);
  p.x = tokens.const_data_ptr();
  p.factor = factor.const_data_ptr();
  p.dtype = x.dtype;
  p.m = m;
  p.ranks = r;
  p.padded_m = padded_m;
  p.features = features;
  p.ranks_per_block = tile.ranks;
  p.parts = tile.parts;
  p.out = parts.mutable_data_ptr<float>();
  std::optional<Activation> result;
  if (down != nullptr) {
    const int64_t stretches = ceil_div(features, cuda::lora_grad_features(tile.ranks));
    const Tensor down_out = empty_like_device(x.tensor, {stretches, m, r}, ScalarType::Float);
    std::optional<Tensor> largest = largest_of(x);
    p.down_operand = down->data;
    p.down_out = down_out.mutable_data_ptr<float>();
    p.largest = pointer_to(largest);
    result = Activation{down_out,
                        {p.down_out, DType::kFloat32, r, 1},
                        m,
                        r,
                        scaling,
                        static_cast<int>(stretches),
                        m * r,
                        std::move(largest),
                        activation.adapters};
  }
  check(cuda::launch_lora_grad(p, scope.stream()), "lora_grad");

  cuda::LoraPackParams sum{};
  sum.source = {p.out, DType::kFloat32, r_is_major ? features : 1, r_is_major ? 1 : features};
  sum.rows = r_is_major ? r : features;
  sum.r = sum.padded_r = r_is_major ? features : r;
  sum.adapters = adapters;
  sum.adapter_stride = r * features;
  sum.parts = p.parts;
  sum.part_stride = adapters * r * features;
  if (activation.largest) {
    sum.half_range = cuda::HalfRange::kDivide;
    sum.largest = pack.largest;
    sum.largest_factor = pack.largest_factor;
  }
  results.add(sum, out, {parts, activation.largest ? *activation.largest : parts});
  return result;
}

}  // namespace qlora::ops
