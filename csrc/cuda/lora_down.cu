// The low-rank down projection on the tensor cores: activations [m, r] = scale * x · factorᵀ, with few columns and a
// long reduction. In the product, rows are 16 ranks and columns are tokens. The warps of a block share the reduction,
// and their sums are added in order. Tokens and factors are loaded directly into registers; a block reads each element
// once.
#include "cuda/device/half_range.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/low_rank.cuh"

namespace qlora::cuda {
namespace lora_down {

// Warps of a block: 16 if there are few blocks, 8 if blocks of 32 tokens fill the GPU and share SMs.
template <int kTokens>
inline constexpr int kWarpsOf = kTokens == 16 ? 16 : 8;
constexpr int kRanks = 16;     // ranks of a block
constexpr int kFeatures = 32;  // features of a warp at a time; lane (g, t) takes features 8t … 8t + 7

// The address of a warp's sum for a token and a rank. Two tokens share 128 bytes, rotated from pair to pair, so that
// neither stores (four pairs, eight ranks) nor loads (one pair) have bank conflicts.
QLORA_DEVICE SharedAddress sum_at(int token_of_all, int rank) {
  const int pair = token_of_all / 2, inside = token_of_all % 2 * kRanks + rank;
  return ptx::shared_base() + (pair * 32 + (inside + 8 * pair) % 32) * 4;
}

// Adds the warp's share of the products of 16 ranks with 8 kGroups tokens. x[j] is the row of the lane's token in group
// j, or null.
template <class T, int kWarps, int kGroups, FactorPath kPath>
QLORA_DEVICE void add_products(const LoraDownJob& job, const T* const (&x)[kGroups], int64_t adapter,
                               int64_t first_rank, int64_t ranks, float (&sum)[kGroups][4]) {
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  const LowRankFactor& factor = job.factor;
  const bool splits = kPath != FactorPath::kVectors16 && factor.dtype != kDTypeOf<T>;
#pragma unroll 2
  for (int64_t first = ptx::warp() * kFeatures; first < job.features; first += kWarps * kFeatures) {
    const int64_t feature = first + 8 * t;
    const bool inside = feature < job.features;
    Words4 tokens[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
      tokens[j] =
          inside && x[j] != nullptr ? ptx::load(reinterpret_cast<const Words4*>(x[j] + feature)) : Words4{0, 0, 0, 0};
    uint32_t high[2][4], low[2][4];  // ranks g and g + 8
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t rank = first_rank + g + 8 * i;
      const int64_t at = adapter * factor.adapter_stride + rank * factor.rank_stride + feature * factor.feature_stride;
      float values[8];
      load_along_features<T, kPath>(factor, at, inside && rank < ranks, values);
#pragma unroll
      for (int w = 0; w < 4; ++w) split_pair<T>(values[2 * w], values[2 * w + 1], high[i][w], low[i][w]);
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t a[4] = {high[0][2 * step], high[1][2 * step], high[0][2 * step + 1], high[1][2 * step + 1]};
      const uint32_t rest[4] = {low[0][2 * step], low[1][2 * step], low[0][2 * step + 1], low[1][2 * step + 1]};
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const uint32_t b0 = step == 0 ? tokens[j].x : tokens[j].z, b1 = step == 0 ? tokens[j].y : tokens[j].w;
        ptx::mma<T>(sum[j], a, b0, b1, sum[j]);
        if (splits) ptx::mma<T>(sum[j], rest, b0, b1, sum[j]);
      }
    }
  }
}

template <class T, int kTokens>
QLORA_KERNEL void QLORA_BOUNDS(32 * kWarpsOf<kTokens>, 1) kernel(QLORA_PARAMS LoraDownParams p) {
  if (!ptx::can_run<T>(0)) return;
  constexpr int kGroups = kTokens / 8, kWarps = kWarpsOf<kTokens>;
  const LoraDownJob& job = p.job[ptx::block_z()];
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  const int64_t first_position = int64_t{ptx::block_x()} * kTokens, first_rank = int64_t{ptx::block_y()} * kRanks;
  const int* order = p.plan.order;
  int64_t adapter = 0;
  float scale = p.scale;
  if (order != nullptr) {
    adapter = ptx::load(p.plan.adapter_of_tile + first_position / kAdapterTile);
    if (adapter < 0) return;
    if (ptx::load(order + first_position) < 0) return;  // tokens come first in a tile, so the block has none
    if (p.plan.scale_of_adapter != nullptr) scale *= ptx::load(p.plan.scale_of_adapter + adapter);
  }
  const auto at = [&](const int* of_position, int64_t position) -> int64_t {
    if (order != nullptr) return ptx::load(of_position + position);
    return position < p.m ? position : -1;
  };
  const T* x[kGroups];
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int64_t row = at(job.row, first_position + 8 * j + g);
    x[j] = row < 0 ? nullptr : static_cast<const T*>(job.x) + row * job.features;
  }
  float sum[kGroups][4] = {};
  switch (path_along_features<T>(job.factor)) {
    case FactorPath::kVectors32:
      add_products<T, kWarps, kGroups, FactorPath::kVectors32>(job, x, adapter, first_rank, p.r, sum);
      break;
    case FactorPath::kVectors16:
      add_products<T, kWarps, kGroups, FactorPath::kVectors16>(job, x, adapter, first_rank, p.r, sum);
      break;
    case FactorPath::kStrided32:
      add_products<T, kWarps, kGroups, FactorPath::kStrided32>(job, x, adapter, first_rank, p.r, sum);
      break;
    default:
      add_products<T, kWarps, kGroups, FactorPath::kAny>(job, x, adapter, first_rank, p.r, sum);
  }

#pragma unroll
  for (int j = 0; j < kGroups; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      ptx::store_shared(sum_at(ptx::warp() * kTokens + 8 * j + 2 * t + i % 2, g + i / 2 * 8), sum[j][i]);
  ptx::sync_threads();
  uint32_t largest = 0;
  for (int item = ptx::thread(); item < kTokens * kRanks; item += 32 * kWarps) {
    const int position = item / kRanks, rank = item % kRanks;
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += ptx::load_shared<float>(sum_at(warp * kTokens + position, rank));
    const int64_t token = at(order, first_position + position);
    if (token < 0 || first_rank + rank >= p.r) continue;
    ptx::store(job.out + token * p.r + first_rank + rank, total * scale);
    largest = larger_magnitude(largest, total * scale);
  }
  if (job.largest != nullptr) note_largest(job.largest, largest);
}

template <class T, int kTokens>
Status launch_tile(const LoraDownParams& p, cudaStream_t stream) {
  constexpr int kWarps = kWarpsOf<kTokens>;
  const int64_t positions = p.plan.order != nullptr ? p.plan.tiles * kAdapterTile : p.m;
  const Grid grid{ceil_div(positions, kTokens), ceil_div(p.r, kRanks), p.count};
  return start(kernel<T, kTokens>, grid, 32 * kWarps, kWarps * kTokens * kRanks * 4, stream, p);
}

template <class T>
Status launch_typed(const LoraDownParams& p, cudaStream_t stream) {
  return p.tokens_per_block == 16 ? launch_tile<T, 16>(p, stream) : launch_tile<T, 32>(p, stream);
}

}  // namespace lora_down

Status launch_lora_down(const LoraDownParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? lora_down::launch_typed<bf16>(p, stream)
                                     : lora_down::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
