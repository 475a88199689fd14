// Gradient of the input on Hopper: dx = dy W + low-rank term by wgmma. As in gemm_dx.cu, scales are applied to the
// operand: weights are unpacked to float32, scaled and rounded once. Two warpgroups with adjacent in features hold the
// A operand in registers; dy in shared memory is the B operand.
//
// In features 2g and 2g + 1 of a warp's sixteen are rows g and g + 8 of the operand, because one byte of a row of W
// holds both. The sums stay in the accumulators from the first chunk to the last. While the tensor cores multiply one
// chunk, the next is unpacked.
#include "cuda/device/launch.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/ptx_wgmma.cuh"
#include "cuda/device/results.cuh"
#include "cuda/device/scales.cuh"
#include "cuda/device/token_tile.cuh"
#include "cuda/device/unroll.cuh"

namespace qlora::cuda {
namespace gemm_dx_wgmma {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kFeatures = 16 * kWarps;  // in features of a block
constexpr int kChunk = 64;              // out features at a time
constexpr int kStages = 5;              // previous chunk, current chunk, chunk being unpacked, two being copied
constexpr int kRowBytes = kFeatures / 2, kWeightStageBytes = kChunk * kRowBytes;
constexpr int kPieces = kRowBytes / 16;  // pieces of a row
constexpr int kScaleStageBytes = kPieces * kChunk * 4;

template <int kTokens>
using Tile = TokenTile<kTokens, kStages, kThreads>;
template <int kTokens>
constexpr int kSharedBytes =
    kPairTableBytes + Tile<kTokens>::kBytes + kStages * kWeightStageBytes + 2 * kScaleStageBytes;

// The index of the stage after `stage` in the ring.
QLORA_DEVICE int stage_behind(int stage) { return stage + 1 == kStages ? 0 : stage + 1; }

// The packed bytes of a chunk, 16 per thread, and its scales: one per row and 32 in features, which is one per thread.
// Scales are loaded one chunk before they are stored.
class WeightTile {
 public:
  QLORA_METHOD WeightTile(SharedAddress weights, SharedAddress scales, const WeightView& w, int64_t first_feature)
      : weights_(weights), scales_(scales) {
    const int piece = ptx::thread() % kPieces;
    inside_ = first_feature + piece * 32 < w.k;
    from_ = w.packed + (int64_t{ptx::thread() / kPieces} * w.k + first_feature) / 2 + piece * 16;
    to_ = at(ptx::thread() / kPieces, piece);
    scale_feature_ = static_cast<int>(min_i64(first_feature + ptx::thread() / kChunk * 32, w.k - 32));
  }

  // Starts copying the next chunk, if there is one; bytes outside W are zero.
  QLORA_METHOD void fetch(const WeightView& w) {
    const SharedAddress to = weights_ + filled_ * kWeightStageBytes + to_;
    if (inside_ && next_row_ + ptx::thread() / kPieces < w.n)
      ptx::cp_async_16(to, from_);
    else if (next_row_ < w.n)
      ptx::store_shared(to, Words4{0, 0, 0, 0});
    from_ += kChunk / 2 * w.k;
    next_row_ += kChunk;
    filled_ = stage_behind(filled_);
  }

  QLORA_METHOD void load_scale(const WeightView& w, const WarpScales& scales, int chunk) {
    const int64_t row = min_i64(int64_t{chunk} * kChunk + ptx::thread() % kChunk, w.n - 1);
    raw_ = scales.load(w, (row * w.k + scale_feature_) >> w.block_shift);
  }
  QLORA_METHOD void store_scale(const WarpScales& scales, int buffer) const {
    ptx::store_shared(scales_ + buffer * kScaleStageBytes + ptx::thread() * 4, scales.value(raw_));
  }

  // Unpacks the A operand for step kStep of the chunk in `stage`, with the scales in `buffer`.
  template <class T, int kStep>
  QLORA_METHOD void unpack(const ValuePairs& pairs, int stage, int buffer, uint32_t (&fragment)[4]) const {
    const int g = ptx::lane() / 4, t = ptx::lane() % 4;
    const SharedAddress tile = weights_ + stage * kWeightStageBytes + ptx::warp() % 2 * 8 + g;
    const SharedAddress scale_at =
        scales_ + buffer * kScaleStageBytes + (ptx::warp() / 2 * kChunk + 16 * kStep + 2 * t) * 4;
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      const auto scale = ptx::load_shared<Floats2>(scale_at + eight * 32);
      const int row = 16 * kStep + 8 * eight + 2 * t;
      const auto first = pairs.at<0>(ptx::load_shared<uint8_t>(tile + at(row, ptx::warp() / 2)));
      const auto second = pairs.at<0>(ptx::load_shared<uint8_t>(tile + at(row + 1, ptx::warp() / 2)));
      fragment[2 * eight] = ptx::pack<T>(first.x * scale.x, second.x * scale.y);
      fragment[2 * eight + 1] = ptx::pack<T>(first.y * scale.x, second.y * scale.y);
    }
  }

 private:
  // The order of pieces varies from pair of rows to pair of rows, so that the four pairs that a warp reads together lie
  // in different banks.
  static QLORA_METHOD int at(int row, int piece) { return row * kRowBytes + (piece ^ (row / 2 % kPieces)) * 16; }

  SharedAddress weights_, scales_;
  int to_, scale_feature_, filled_ = 0;
  int64_t next_row_ = 0;
  bool inside_;
  const uint8_t* from_;
  RawScale raw_ = {};
};

template <class T>
QLORA_DEVICE void unpack_chunk(const WeightTile& weights, const ValuePairs& pairs, int stage, int buffer,
                               uint32_t (&fragment)[4][4]) {
  unroll<4>([&](auto step) {
    weights.unpack<T, decltype(step)::value>(pairs, stage, buffer, fragment[decltype(step)::value]);
  });
}

template <class T, int kTokens, TokenMode kMode>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 1) kernel(QLORA_PARAMS GemmDxParams p) {
  if (!ptx::can_run_wgmma()) return;
  constexpr int kGroups = kTokens / 16;  // groups of eight tokens in half of the tile
  const SharedAddress table = ptx::shared_base(), stages = table + kPairTableBytes;
  const SharedAddress weight_stages = stages + Tile<kTokens>::kBytes;
  const int block_feature = ptx::block_y() * kFeatures, first_token = ptx::block_x() * kTokens;
  const int first_feature = block_feature + ptx::warp() * 16;
  const int chunks = static_cast<int>(ceil_div(p.weight.n, kChunk));

  Tile<kTokens> tokens(stages, p.dy, p.out.m, p.weight.n, p.weight.n, first_token);
  WeightTile weights(weight_stages, weight_stages + kStages * kWeightStageBytes, p.weight, block_feature);
  const auto fetch = [&] {
    tokens.fetch();
    weights.fetch(p.weight);
  };
  start_pipeline<kStages - 1>(fetch);
  const WarpScales scales(p.weight);
  weights.load_scale(p.weight, scales, 0);
  ValuePairs::fill<kThreads>(table, p.weight.quant_type);
  weights.store_scale(scales, 0);
  weights.load_scale(p.weight, scales, 1);
  ptx::cp_async_wait<kStages - 3>();
  ptx::sync_threads();
  const ValuePairs pairs(table);

  float halves[2][kGroups][4] = {};
  uint32_t fragment[2][4][4];
  unpack_chunk<T>(weights, pairs, 0, 0, fragment[0]);
  int stage = 0;

  // Multiplies a chunk and unpacks the next one, whose bytes have also arrived.
  const auto do_chunk = [&](int chunk, auto parity) {
    constexpr int kNow = decltype(parity)::value, kNext = 1 - kNow;
    weights.store_scale(scales, kNext);
    ptx::cp_async_wait<kStages - 4>();
    ptx::fence_shared_for_wgmma();
    ptx::sync_threads();
    fetch();  // into the stage of two chunks before, whose products all warps have waited for
    ptx::cp_async_commit();
    weights.load_scale(p.weight, scales, chunk + 2);
    const SharedAddress here = stages + stage * Tile<kTokens>::kStageBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::wgmma<T>(halves[half], fragment[kNow][step],
                      ptx::wgmma_operand(here + half * (kTokens / 2 * 128) + 32 * step), true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    stage = stage_behind(stage);
    if (chunk + 1 < chunks) unpack_chunk<T>(weights, pairs, stage, kNext, fragment[kNext]);
  };
  for (int chunk = 0; chunk < chunks; chunk += 2) {
    do_chunk(chunk, Index<0>{});
    if (chunk + 1 < chunks) do_chunk(chunk + 1, Index<1>{});
  }
  ptx::wgmma_wait<0>(halves[0]);
  ptx::wgmma_wait<0>(halves[1]);
  ptx::cp_async_wait<0>();

  float sum[1][2 * kGroups][4];
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[0][half * kGroups + j][i] = halves[half][j][i];
  if constexpr (kMode == TokenMode::kAdapters)
    low_rank_steps_of_adapters<T, 1, kTokens>(p.out, first_feature, first_token, sum);
  else
    low_rank_steps<T, 1, kTokens>(p.out, first_feature, first_token, sum);
  store_results<T, 1, kTokens, kMode>(p.out, first_feature, first_token, sum);
}

template <class T, int kTokens>
Status launch_tokens(const GemmDxParams& p, cudaStream_t stream) {
  const Grid grid{ceil_div(p.out.m, kTokens), ceil_div(p.weight.k, kFeatures)};
  const auto kernel_of_call = p.out.adapter_of_token != nullptr ? kernel<T, kTokens, TokenMode::kAdapters>
                                                                : kernel<T, kTokens, TokenMode::kOne>;
  return start(kernel_of_call, grid, kThreads, kSharedBytes<kTokens>, stream, p);
}

template <class T>
Status launch_typed(const GemmDxParams& p, cudaStream_t stream) {
  return p.tile == GemmTile::k128x128Wgmma ? launch_tokens<T, 128>(p, stream) : launch_tokens<T, 64>(p, stream);
}

}  // namespace gemm_dx_wgmma

Status launch_gemm_dx_wgmma(const GemmDxParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? gemm_dx_wgmma::launch_typed<bf16>(p, stream)
                                     : gemm_dx_wgmma::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
