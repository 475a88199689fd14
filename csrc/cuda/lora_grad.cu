// Gradients of the low-rank factors on the tensor cores: sums over tokens, d_lora_a = Vᵀ x and d_lora_b = dyᵀ U. The
// pass over dy gives V = dy lora_b as well, so that dy is read once for both.
//
// A block owns features of x (or dy) and walks over tokens, 64 x 64 elements at a time. x is the B operand of both
// products: as it lies where features are summed, transposed by ldmatrix where tokens are.
#include "cuda/device/half_range.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/token_tile.cuh"

namespace qlora::cuda {
namespace lora_grad {

constexpr int kThreads = 128;
constexpr int kStages = 3;
constexpr int kChunk = 64;

// Shared memory: stages of x, two chunks of the factor, and with kDown the block's part of the down operand.
template <int kRanks>
constexpr int kTileBytes = kRanks * 128;  // 64 elements of each rank
template <int kRanks>
constexpr int kColumns = lora_grad_features(kRanks) / kChunk;  // chunks of features of a block

template <class T, int kRanks, bool kDown>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 2) kernel(QLORA_PARAMS LoraGradParams p) {
  if (!ptx::can_run<T>(0)) return;
  constexpr int kGroups = kRanks / 16;
  constexpr int kStageBytes = kChunk * 128;
  const int64_t first_feature = int64_t{ptx::block_x()} * kColumns<kRanks> * kChunk;
  const int64_t rank_blocks = ceil_div(p.ranks, kRanks);
  const int64_t first_rank = ptx::block_z() % rank_blocks * kRanks, adapter = ptx::block_z() / rank_blocks;
  const int* order = p.plan.order;
  const int64_t first_chunk = order != nullptr ? ptx::load(p.plan.first_tile + adapter) : 0;
  const int64_t chunks =
      order != nullptr ? ptx::load(p.plan.first_tile + adapter + 1) - first_chunk : ceil_div(p.m, kChunk);
  const int64_t begin = (first_chunk + chunks * ptx::block_y() / p.parts) * kChunk;
  const int64_t end = (first_chunk + chunks * (ptx::block_y() + 1) / p.parts) * kChunk;
  const T* x = static_cast<const T*>(p.x);
  const T* factor = static_cast<const T*>(p.factor);
  const SharedAddress stages = ptx::shared_base();
  const SharedAddress factors = stages + kStages * kStageBytes;
  const SharedAddress downs = factors + 2 * p.splits * kTileBytes<kRanks>;

  SharedAddress stage = stages;  // filled next; behind fetch(), the one to be read
  int64_t next_token = begin;
  int next_column = 0;
  TokenRows<kChunk, kThreads> rows;
  const auto fetch = [&] {
    if (next_token < end) {
      if (next_column == 0) rows.set(order, p.m, next_token);
      rows.fetch(stage, x, p.features, first_feature + next_column * kChunk);
      if (next_column == 0)
        for (int s = 0; s < p.splits; ++s) {
          const int buffer = static_cast<int>((next_token - begin) / kChunk % 2) * p.splits + s;
          fetch_rows<kRanks, kThreads>(factors + buffer * kTileBytes<kRanks>, factor + s * p.ranks * p.padded_m,
                                       p.ranks, p.padded_m, first_rank, next_token);
        }
    }
    stage = stage + kStageBytes == factors ? stages : stage + kStageBytes;
    if (++next_column == kColumns<kRanks>) {
      next_column = 0;
      next_token += kChunk;
    }
  };
  if constexpr (kDown)
    for (int s = 0; s < p.splits; ++s)
      for (int c = 0; c < kColumns<kRanks>; ++c)
        fetch_rows<kRanks, kThreads>(
            downs + (s * kColumns<kRanks> + c) * kTileBytes<kRanks>,
            static_cast<const T*>(p.down_operand) + (adapter * p.splits + s) * p.ranks * p.features, p.ranks,
            p.features, first_rank, first_feature + c * kChunk);
  start_pipeline<kStages>(fetch);

  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  // What ldmatrix asks a lane for: row lane % 16 of a tile, the piece lane / 16 or its neighbour's.
  const int matrix_row = ptx::lane() % 16, matrix_piece = ptx::lane() / 16;
  float grad[kColumns<kRanks>][kGroups][2][4] = {};  // ranks 16 group + …, 16 features of this warp
  uint32_t largest = 0;
  // Only to know how large the scaled result of the down projection is.
  const float scale = order != nullptr ? ptx::load(p.plan.scale_of_adapter + adapter) : 1.0f;

  for (int64_t token = begin; token < end; token += kChunk) {
    const SharedAddress factor_tile = factors +
                                      static_cast<int>((token - begin) / kChunk % 2) * p.splits * kTileBytes<kRanks> +
                                      swizzled(matrix_row, matrix_piece);
    float down[kGroups][2][4] = {};  // ranks, 16 tokens of this warp
    unroll<kColumns<kRanks>>([&](auto column) {
      constexpr int c = decltype(column)::value;
      advance_pipeline<kStages>(fetch);
      if constexpr (kDown) {
        uint32_t words[2][8];
        const Place tokens = place_in(stage + ptx::warp() * 2048);
        load_fragment<0>(tokens, words[0]);
        load_fragment<1>(tokens, words[1]);
#pragma unroll 1
        for (int s = 0; s < p.splits; ++s) {
          const Place ranks = place_in(downs + (s * kColumns<kRanks> + c) * kTileBytes<kRanks>);
          unroll<kGroups>([&](auto group) {
            constexpr int i = decltype(group)::value;
            uint32_t a[8], b[8];  // ranks g and g + 8
            load_fragment<2 * i>(ranks, a);
            load_fragment<2 * i + 1>(ranks, b);
#pragma unroll
            for (int step = 0; step < 4; ++step) {
              const uint32_t fragment[4] = {a[2 * step], b[2 * step], a[2 * step + 1], b[2 * step + 1]};
#pragma unroll
              for (int j = 0; j < 2; ++j)
                ptx::mma<T>(down[i][j], fragment, words[j][2 * step], words[j][2 * step + 1], down[i][j]);
            }
          });
        }
      }
      const SharedAddress features = stage + swizzled(matrix_row, 2 * ptx::warp() + matrix_piece);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t b[4];
        ptx::load_matrices_transposed(b, features + step * 2048);
#pragma unroll 1
        for (int s = 0; s < p.splits; ++s) {
#pragma unroll
          for (int i = 0; i < kGroups; ++i) {
            uint32_t a[4];
            // Piece 2 step + …: the exchange of pieces leaves the order of these two bits to xor.
            ptx::load_matrices(a, (factor_tile + s * kTileBytes<kRanks> + i * 2048) ^ (32u * step));
            ptx::mma<T>(grad[c][i][0], a, b[0], b[1], grad[c][i][0]);
            ptx::mma<T>(grad[c][i][1], a, b[2], b[3], grad[c][i][1]);
          }
        }
      }
    });
    if constexpr (kDown) {
      float* out = p.down_out + int64_t{ptx::block_x()} * p.m * p.ranks;
#pragma unroll
      for (int i = 0; i < kGroups; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int64_t position = token + ptx::warp() * 16 + j * 8 + 2 * t + e % 2;
            const int64_t row = order != nullptr ? ptx::load(order + position) : position;
            const int64_t rank = first_rank + 16 * i + g + e / 2 * 8;
            if (row >= 0 && row < p.m && rank < p.ranks) {
              ptx::store(out + row * p.ranks + rank, down[i][j][e]);
              largest = larger_magnitude(largest, down[i][j][e] * scale);
            }
          }
    }
  }
  ptx::cp_async_wait<0>();
  if constexpr (kDown)
    if (p.largest != nullptr) note_largest(p.largest, largest);

  float* out = p.out + (ptx::block_y() * p.plan.adapters + adapter) * p.ranks * p.features;
#pragma unroll
  for (int c = 0; c < kColumns<kRanks>; ++c)
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t feature = first_feature + c * kChunk + ptx::warp() * 16 + j * 8 + 2 * t;
          const int64_t rank = first_rank + 16 * i + g + half * 8;
          if (feature < p.features && rank < p.ranks)
            ptx::store(reinterpret_cast<Floats2*>(out + rank * p.features + feature),
                       Floats2{grad[c][i][j][2 * half], grad[c][i][j][2 * half + 1]});
        }
}

template <class T, int kRanks>
Status launch_ranks(const LoraGradParams& p, cudaStream_t stream) {
  const bool down = p.down_operand != nullptr;
  static_assert(kChunk == kAdapterTile, "a chunk of tokens is one tile of a plan");
  const Grid grid{ceil_div(p.features, lora_grad_features(kRanks)), p.parts,
                  ceil_div(p.ranks, kRanks) * p.plan.adapters};
  return start(down ? kernel<T, kRanks, true> : kernel<T, kRanks, false>, grid, kThreads,
               lora_grad_shared_bytes(kRanks, p.splits, down), stream, p);
}

template <class T>
Status launch_typed(const LoraGradParams& p, cudaStream_t stream) {
  return p.ranks_per_block == 16   ? launch_ranks<T, 16>(p, stream)
         : p.ranks_per_block == 32 ? launch_ranks<T, 32>(p, stream)
                                   : launch_ranks<T, 64>(p, stream);
}

}  // namespace lora_grad

Status launch_lora_grad(const LoraGradParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? lora_grad::launch_typed<bf16>(p, stream)
                                     : lora_grad::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
