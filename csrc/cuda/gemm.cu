// Many tokens (m > 16): y = x Wᵀ + low-rank term + bias on the tensor cores, one accumulator. W is decoded from the
// registers it was loaded into, once for each tile of tokens, and never written back; x passes through shared memory in
// a pipeline of cp.async. The low-rank term comes last, as r / 16 more steps of the same product: before the
// others its loads would compete with theirs for registers.
#include <type_traits>

#include "cuda/device/fragments.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/levels.h"
#include "cuda/device/results.cuh"
#include "cuda/device/token_tile.cuh"
#include "cuda/device/unroll.cuh"

namespace qlora::cuda {
namespace gemm {

constexpr int kWarps = 4;  // one above the other: each decodes rows of its own, for all tokens of the tile
constexpr int kThreads = 32 * kWarps;
constexpr int kPanelChunks = 32;  // scales of 2048 weights a row at a time: whole sectors of their codes

template <int R>
constexpr int kRows = 16 * R * kWarps;

template <int R, int kTokens, int kStages>
constexpr int kSharedBytes =
    kPairTableBytes + TokenTile<kTokens, kStages, kThreads>::kBytes + kRows<R> * (kPanelChunks | 1) * 4;

// The packed bytes of a lane's 2R rows, a chunk at a time.
template <int R>
class RowReader {
 public:
  QLORA_METHOD RowReader(const Weight& w, int64_t first_row) {
    const int64_t row = min_i64(first_row + ptx::lane() / 4 * 2 * R, w.n - 1);
    at_ = w.packed + row * (w.k / 2) + ptx::lane() % 4 * 8;
    row_bytes_ = static_cast<int>(w.k / 2);
    last_ = static_cast<int>(min_i64(2 * R - 1, w.n - 1 - row));  // rows beyond the last one are the last one
  }
  QLORA_METHOD void next(Words2 (&raw)[2 * R]) {
    const uint8_t* row = at_;
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
      raw[i] = ptx::load_once(reinterpret_cast<const Words2*>(row));
      row += i < last_ ? row_bytes_ : 0;
    }
    at_ += kChunk / 2;
  }

 private:
  const uint8_t* at_;
  int row_bytes_, last_;
};

template <class T, int R, int kTokens, int kStages, bool kMulti>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 2) kernel(QLORA_PARAMS GemmParams p) {
  if (!ptx::can_run<T>(kSharedBytes<R, kTokens, kStages>)) return;
  using Tile = TokenTile<kTokens, kStages, kThreads>;
  const SharedAddress table = ptx::shared_base();
  const int block_row = ptx::block_y() * kRows<R>;  // 32 bits hold a row and a token, not an element
  const int first_row = block_row + ptx::warp() * 16 * R;
  const int first_token = ptx::block_x() * kTokens;
  const int chunks = static_cast<int>(p.weight.k / kChunk);
  const int g = ptx::lane() / 4;

  Tile tokens(table + kPairTableBytes, p.x, p.out.m, p.weight.k, p.weight.k, first_token);
  const auto fetch = [&] { tokens.fetch(); };
  start_pipeline<kStages>(fetch);
  RowReader<R> rows(p.weight, first_row);
  Words2 raw[2 * R];
  rows.next(raw);
  LevelPairs<T>::template fill<kThreads>(table, p.weight.quant_type, p.level_multiplier);
  const LevelPairs<T> pairs(table);
  const ScalePanel panel(table + kPairTableBytes + Tile::kBytes, kPanelChunks);

  float sum[R][kTokens / 8][4] = {};

  for (int chunk = 0; chunk < chunks; ++chunk) {
    advance_pipeline<kStages>(fetch);
    if (chunk % kPanelChunks == 0) {  // behind the pipeline's barrier: nobody reads the scales before
      const int count = chunks - chunk < kPanelChunks ? chunks - chunk : kPanelChunks;
      const WarpScales scales(p.weight);      // here, not above: five registers that the products need
      constexpr int kBatch = R == 2 ? 1 : 4;  // the large tile has no register left
      panel.fill<kWarps, kBatch>(p.weight, scales, block_row, kRows<R>, chunk, count, p.level_factor);
      ptx::sync_threads();
    }
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
    const auto place = place_in(tokens.current());
    unroll<kTokens / 8>([&](auto group) {
      constexpr int j = decltype(group)::value;
      // The next bytes: not earlier, for want of registers, and early enough to arrive behind the other half.
      if constexpr (j == kTokens / 16)
        if (chunk + 1 < chunks) rows.next(raw);
      // Keeps the compiler from loading all of x at once, which would spill.
      if constexpr (R == 2 && j % 4 == 0) ptx::sync_warp();
      uint32_t x[8];
      load_fragment<j>(place, x);
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
    });
  }
  ptx::cp_async_wait<0>();
  if constexpr (kMulti)
    low_rank_steps_of_adapters<T, R, kTokens>(p.out, first_row, first_token, sum);
  else
    low_rank_steps<T, R, kTokens>(p.out, first_row, first_token, sum);
  store_results<T, R, kTokens, kMulti>(p.out, first_row, first_token, sum);
}

template <class T, int R, int kTokens, int kStages>
Status launch_tile(const GemmParams& p, cudaStream_t stream) {
  const Grid grid{ceil_div(p.out.m, kTokens), ceil_div(p.weight.n, kRows<R>)};
  const auto kernel_of_call =
      p.out.adapter_of_token != nullptr ? kernel<T, R, kTokens, kStages, true> : kernel<T, R, kTokens, kStages, false>;
  return start(kernel_of_call, grid, kThreads, kSharedBytes<R, kTokens, kStages>, stream, p);
}

template <class T>
Status launch_typed(const GemmParams& p, cudaStream_t stream) {
  switch (p.tile) {
    case GemmTile::k128x128:
      return launch_tile<T, 2, 128, 2>(p, stream);
    case GemmTile::k64x128:
      return launch_tile<T, 1, 128, 2>(p, stream);
    case GemmTile::k64x64:
      return launch_tile<T, 1, 64, 3>(p, stream);
    default:  // the 64 KiB of Turing's shared memory leave room for two stages; it has no bfloat16
      if constexpr (std::is_same_v<T, fp16>) return launch_tile<T, 1, 64, 2>(p, stream);
      return {"bfloat16 needs more shared memory than this GPU has"};
  }
}

}  // namespace gemm

Status launch_gemm(GemmParams p, cudaStream_t stream) {
  p.level_multiplier = level_multiplier(static_cast<QuantType>(p.weight.quant_type), p.dtype);
  p.level_factor = 1.0f / p.level_multiplier;
  return p.dtype == DType::kBFloat16 ? gemm::launch_typed<bf16>(p, stream) : gemm::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
