// Many tokens (m > 16): y = x Wᵀ + low-rank term + bias on the tensor cores, one accumulator. W is decoded from the
// registers it was loaded into, once for each tile of tokens, and never written back; x passes through shared memory in a
// pipeline of cp.async. The low-rank term comes first, as r / 16 more steps of the same product.
#include "cuda/device/fragments.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/levels.h"
#include "cuda/device/token_tile.cuh"

namespace qlora::cuda {
namespace gemm {

constexpr int kWarps = 4;  // one above the other: each decodes rows of its own, for all tokens of the tile
constexpr int kThreads = 32 * kWarps;
constexpr int kPanelChunks = 32;  // scales of 2048 weights a row at a time: whole sectors of their codes

template <int R>
constexpr int kRows = 16 * R * kWarps;

template <int R, int kTokens, int kStages>
constexpr int kSharedBytes = kPairTableBytes + TokenTile<kTokens, kStages, kThreads>::kBytes +
                             kRows<R> * (kPanelChunks | 1) * 4;

// The packed bytes of a lane's 2R rows, a chunk at a time; the next one is on its way while the last one is decoded.
template <int R>
class RowReader {
 public:
  QLORA_METHOD RowReader(const Weight& w, int64_t first_row) {
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
      const int64_t row = min_i64(first_row + ptx::lane() / 4 * 2 * R + i, w.n - 1);
      at_[i] = w.packed + row * (w.k / 2) + ptx::lane() % 4 * 8;
    }
  }
  QLORA_METHOD void next(Words2 (&raw)[2 * R]) {
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
      raw[i] = ptx::load_once(reinterpret_cast<const Words2*>(at_[i]));
      at_[i] += kChunk / 2;
    }
  }

 private:
  const uint8_t* at_[2 * R];
};

// sum = lora_up lora_tᵀ: r / 16 steps, straight from global memory; both matrices are small and come from L2.
template <class T, int R, int kTokens>
QLORA_DEVICE void low_rank_steps(const GemmParams& p, int64_t first_row, int64_t first_token,
                                 float (&sum)[R][kTokens / 8][4]) {
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  const T* up = static_cast<const T*>(p.lora_up) + 4 * t;
  const T* activation = static_cast<const T*>(p.lora_t) + 4 * t;
  for (int r = 0; r < p.r; r += 16) {
    uint32_t fragment[R][4];
#pragma unroll
    for (int f = 0; f < R; ++f) {
      const int64_t row = first_row + 2 * R * g + 2 * f;
      const auto a = ptx::load(reinterpret_cast<const Words2*>(up + min_i64(row, p.weight.n - 1) * p.r + r));
      const auto b = ptx::load(reinterpret_cast<const Words2*>(up + min_i64(row + 1, p.weight.n - 1) * p.r + r));
      fragment[f][0] = a.x;
      fragment[f][1] = b.x;
      fragment[f][2] = a.y;
      fragment[f][3] = b.y;
    }
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const int64_t token = min_i64(first_token + 8 * j + g, p.m - 1);
      const auto b = ptx::load(reinterpret_cast<const Words2*>(activation + token * p.r + r));
#pragma unroll
      for (int f = 0; f < R; ++f) ptx::mma<T>(sum[f][j], fragment[f], b.x, b.y, sum[f][j]);
    }
  }
}

// The low-rank term of one result with the adapter of its token, on the CUDA cores; nan for an adapter that is not there.
template <class T>
QLORA_DEVICE float low_rank_of_adapter(const GemmParams& p, int64_t row, int64_t token, int64_t adapter) {
  if (adapter == -1) return 0.0f;
  if (adapter < -1 || adapter >= p.adapters) return __builtin_nanf("");
  const T* up = static_cast<const T*>(p.lora_up) + (adapter * p.weight.n + row) * p.r;
  const T* activation = static_cast<const T*>(p.lora_t) + token * p.r;
  float sum = 0.0f;
  for (int r = 0; r < p.r; r += 8) {
    const auto a = ptx::load(reinterpret_cast<const Words4*>(up + r));
    const auto b = ptx::load(reinterpret_cast<const Words4*>(activation + r));
    const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum = fmaf(ptx::unpack<T>(as[i], 0), ptx::unpack<T>(bs[i], 0), sum);
      sum = fmaf(ptx::unpack<T>(as[i], 1), ptx::unpack<T>(bs[i], 1), sum);
    }
  }
  return sum;
}

// Stores a lane's results: 2R rows side by side for each of its tokens, so that a warp fills sectors.
template <class T, int R, int kTokens, bool kMulti>
QLORA_DEVICE void store_results(const GemmParams& p, int64_t first_row, int64_t first_token,
                                const float (&sum)[R][kTokens / 8][4]) {
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  const int64_t row = first_row + 2 * R * g;
  float bias[2 * R];
#pragma unroll
  for (int i = 0; i < 2 * R; ++i)
    bias[i] = p.bias != nullptr && row + i < p.weight.n ? load_element(p.bias, p.bias_dtype, row + i) : 0.0f;
  const bool side_by_side = p.weight.n % (2 * R) == 0 && row < p.weight.n;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = first_token + 8 * j + 2 * t + i;
      if (token >= p.m) continue;
      float value[2 * R];
#pragma unroll
      for (int f = 0; f < R; ++f) {
        value[2 * f] = sum[f][j][i] + bias[2 * f];
        value[2 * f + 1] = sum[f][j][2 + i] + bias[2 * f + 1];
      }
      if constexpr (kMulti) {
        const int64_t adapter = ptx::load(p.adapter_of_token + token);
        for (int e = 0; e < 2 * R; ++e)
          if (row + e < p.weight.n) value[e] += low_rank_of_adapter<T>(p, row + e, token, adapter);
      }
      T* y = static_cast<T*>(p.y) + token * p.weight.n + row;
      if (side_by_side) {
        if constexpr (R == 1)
          ptx::store(reinterpret_cast<uint32_t*>(y), ptx::pack<T>(value[0], value[1]));
        else
          ptx::store(reinterpret_cast<Words2*>(y),
                     Words2{ptx::pack<T>(value[0], value[1]), ptx::pack<T>(value[2], value[3])});
      } else {
#pragma unroll
        for (int e = 0; e < 2 * R; ++e)
          if (row + e < p.weight.n) ptx::store(&y[e].bits, from_float<T>(value[e]).bits);
      }
    }
}

template <class T, int R, int kTokens, int kStages, bool kMulti>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 2) kernel(QLORA_PARAMS GemmParams p) {
  using Tile = TokenTile<kTokens, kStages, kThreads>;
  const SharedAddress table = ptx::shared_base();
  const int64_t block_row = static_cast<int64_t>(ptx::block_y()) * kRows<R>;
  const int64_t first_row = block_row + ptx::warp() * 16 * R;
  const int64_t first_token = static_cast<int64_t>(ptx::block_x()) * kTokens;
  const int chunks = static_cast<int>(p.weight.k / kChunk);
  const int g = ptx::lane() / 4;

  Tile tokens(table + kPairTableBytes, p.x, p.m, p.weight.k, first_token, chunks);
  RowReader<R> rows(p.weight, first_row);
  Words2 next_raw[2 * R];
  rows.next(next_raw);
  LevelPairs<T>::template fill<kThreads>(table, p.weight.quant_type, p.level_multiplier);
  const LevelPairs<T> pairs(table);
  const WarpScales scales(p.weight);
  const ScalePanel panel(table + kPairTableBytes + Tile::kBytes, kPanelChunks);

  float sum[R][kTokens / 8][4] = {};
  if constexpr (!kMulti) low_rank_steps<T, R, kTokens>(p, first_row, first_token, sum);

  for (int chunk = 0; chunk < chunks; ++chunk) {
    const SharedAddress here = tokens.next();
    if (chunk % kPanelChunks == 0) {  // behind the barrier of next(): nobody reads the scales before
      const int count = chunks - chunk < kPanelChunks ? chunks - chunk : kPanelChunks;
      panel.fill<kWarps>(p.weight, scales, block_row, kRows<R>, chunk, count, p.level_factor);
      ptx::sync_threads();
    }
    Words2 raw[2 * R];
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) raw[i] = next_raw[i];
    if (chunk + 1 < chunks) rows.next(next_raw);

    uint32_t fragment[R][4][4];
    float scale[2 * R];
    const SharedAddress scale_at = panel.address(ptx::warp() * 16 * R + 2 * R * g, chunk % kPanelChunks);
#pragma unroll
    for (int f = 0; f < R; ++f) {
      decode_step<T, 0>(pairs, raw[2 * f], raw[2 * f + 1], fragment[f][0]);
      decode_step<T, 1>(pairs, raw[2 * f], raw[2 * f + 1], fragment[f][1]);
      decode_step<T, 2>(pairs, raw[2 * f], raw[2 * f + 1], fragment[f][2]);
      decode_step<T, 3>(pairs, raw[2 * f], raw[2 * f + 1], fragment[f][3]);
      scale[2 * f] = ptx::load_shared<float>(scale_at + 2 * f * panel.pitch() * 4);
      scale[2 * f + 1] = ptx::load_shared<float>(scale_at + (2 * f + 1) * panel.pitch() * 4);
    }
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      uint32_t x[8];
      tokens.fragment(here, j, x);
#pragma unroll
      for (int f = 0; f < R; ++f) {
        const float none[4] = {};
        float part[4];
        ptx::mma<T>(part, fragment[f][0], x[0], x[1], none);
        ptx::mma<T>(part, fragment[f][1], x[2], x[3], part);
        ptx::mma<T>(part, fragment[f][2], x[4], x[5], part);
        ptx::mma<T>(part, fragment[f][3], x[6], x[7], part);
        sum[f][j][0] = fmaf(scale[2 * f], part[0], sum[f][j][0]);
        sum[f][j][1] = fmaf(scale[2 * f], part[1], sum[f][j][1]);
        sum[f][j][2] = fmaf(scale[2 * f + 1], part[2], sum[f][j][2]);
        sum[f][j][3] = fmaf(scale[2 * f + 1], part[3], sum[f][j][3]);
      }
    }
  }
  ptx::cp_async_wait<0>();
  store_results<T, R, kTokens, kMulti>(p, first_row, first_token, sum);
}

template <class T, int R, int kTokens, int kStages>
Status launch_tile(const GemmParams& p, cudaStream_t stream) {
  const Grid grid{ceil_div(p.m, kTokens), ceil_div(p.weight.n, kRows<R>)};
  const auto kernel_of_call = p.adapter_of_token != nullptr ? kernel<T, R, kTokens, kStages, true> : kernel<T, R, kTokens, kStages, false>;
  return start(kernel_of_call, grid, kThreads, kSharedBytes<R, kTokens, kStages>, stream, p);
}

template <class T>
Status launch_typed(const GemmParams& p, cudaStream_t stream) {
  switch (p.tile) {
    case GemmTile::k128x128:
      return launch_tile<T, 2, 128, 2>(p, stream);
    case GemmTile::k64x64:
      return launch_tile<T, 1, 64, 3>(p, stream);
    default:  // the 64 KiB of Turing's shared memory leave room for two stages
      return launch_tile<T, 1, 64, 2>(p, stream);
  }
}

}  // namespace gemm

Status launch_gemm(GemmParams p, cudaStream_t stream) {
  p.level_multiplier = level_multiplier(static_cast<QuantType>(p.weight.quant_type), p.dtype);
  p.level_factor = 1.0f / p.level_multiplier;
  return p.dtype == DType::kBFloat16 ? gemm::launch_typed<bf16>(p, stream) : gemm::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
