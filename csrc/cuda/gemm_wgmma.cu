// Kernel for many tokens on Hopper: y = x Wᵀ + low-rank term + bias by wgmma. Two warpgroups load adjacent rows of W
// into registers and unpack them there as the A operand; x in shared memory is the B operand.
//
// wgmma reads x in memory order, so the bytes of W must move between lanes: lane t of four holds the bytes of
// k = 16t … 16t + 15 and needs byte t of each word of the four lanes. This transposition takes two shuffles per word.
// The tokens of a tile form two halves with separate accumulators. While the tensor cores multiply one half, the sums
// of the other are scaled and added up, and the next chunk is unpacked.
#include "cuda/device/fragments.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/ptx_wgmma.cuh"
#include "cuda/device/results.cuh"
#include "cuda/device/row_reader.cuh"
#include "cuda/device/token_tile.cuh"
#include "cuda/device/unroll.cuh"

namespace qlora::cuda {
namespace gemm_wgmma {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;
constexpr int kStages = 4;  // of x: current chunk, previous chunk, two being copied
constexpr int kPanel = 64;  // chunks whose scales are computed at a time

using Panel = ScalePanel<kWarps, kRows, 8>;
template <int kTokens>
using Tile = TokenTile<kTokens, kStages, kThreads>;
template <int kTokens>
constexpr int kSharedBytes = kPairTableBytes + Tile<kTokens>::kBytes + panel_bytes(kRows, kPanel);

// Gives lane t byte t of the words of the four lanes that share a row.
class ByteTransposition {
 public:
  QLORA_METHOD ByteTransposition()
      : far_((ptx::lane() & 2) == 0 ? 0x5410u : 0x3276u), near_((ptx::lane() & 1) == 0 ? 0x6240u : 0x3715u) {}
  QLORA_METHOD uint32_t of(uint32_t word) const {
    const uint32_t halves = ptx::permute(word, ptx::shuffle_xor(word, 2), far_);
    return ptx::permute(halves, ptx::shuffle_xor(halves, 1), near_);
  }

 private:
  uint32_t far_, near_;
};

// Unpacks a chunk of W into the A operands of four steps.
template <class T>
QLORA_DEVICE void unpack_chunk(const LevelPairs<T>& pairs, const ByteTransposition& bytes, const Words2 (&raw)[2],
                               uint32_t (&fragment)[4][4]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const uint32_t low = bytes.of(raw[row].x), high = bytes.of(raw[row].y);
    unroll<4>([&](auto step) {
      constexpr int s = decltype(step)::value;
      fragment[s][row] = pairs.template at<s>(low);
      fragment[s][2 + row] = pairs.template at<s>(high);
    });
  }
}

// Starts multiplying a chunk with one half of the tokens.
template <class T, int kGroups>
QLORA_DEVICE void multiply(float (&part)[kGroups][4], const uint32_t (&fragment)[4][4], SharedAddress tokens) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step)
    ptx::wgmma<T>(part, fragment[step], ptx::wgmma_operand(tokens + 32 * step), step > 0);
  ptx::wgmma_commit();
}

template <int kHalf, int kGroups, int kAllGroups>
QLORA_DEVICE void add_scaled(const float (&part)[kGroups][4], const float (&scale)[2], float (&sum)[1][kAllGroups][4]) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sum[0][kHalf * kGroups + j][i] = fmaf(scale[i / 2], part[j][i], sum[0][kHalf * kGroups + j][i]);
}

template <class T, int kTokens, TokenMode kMode>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 1) kernel(QLORA_PARAMS GemmParams p) {
  if (!ptx::can_run_wgmma()) return;
  constexpr int kGroups = kTokens / 16;  // groups of eight tokens in half of the tile
  constexpr int kHalfBytes = kTokens / 2 * 128;
  const SharedAddress table = ptx::shared_base();
  const SharedAddress stages = table + kPairTableBytes;
  const int block_row = ptx::block_y() * kRows, warp_row = ptx::warp() * 16, first_token = ptx::block_x() * kTokens;
  const int chunks = static_cast<int>(p.weight.k / kChunk);

  Tile<kTokens> tokens(stages, p.x, p.out.m, p.weight.k, p.weight.k, first_token);
  const auto fetch = [&] { tokens.fetch(); };
  start_pipeline<kStages - 1>(fetch);
  RowReader<1, 1> rows(p.weight, block_row + warp_row, 0);
  Words2 raw[2][2];  // bytes of the next two chunks to unpack, one of even and one of odd index
  rows.next(raw[0]);
  raw[1][0] = raw[0][0], raw[1][1] = raw[0][1];
  if (chunks > 1) rows.next(raw[1]);
  const Panel panel(stages + Tile<kTokens>::kBytes, kPanel);
  LevelPairs<T>::template fill<kThreads>(table, p.weight.quant_type, p.level_multiplier);
  ptx::sync_threads();
  const LevelPairs<T> pairs(table);
  const ByteTransposition bytes;

  float sum[1][2 * kGroups][4] = {};
  float first_half[kGroups][4], second_half[kGroups][4];
  float scale[2], next_scale[2];
  uint32_t fragment[2][4][4];
  unpack_chunk(pairs, bytes, raw[0], fragment[0]);
  if (chunks > 2) rows.next(raw[0]);

  // Waits for the tokens of a chunk, starts copying those of a later one, and returns the address of the stage.
  const auto start_chunk = [&](int chunk) {
    ptx::cp_async_wait<kStages - 3>();
    ptx::fence_shared_for_wgmma();
    ptx::sync_threads();
    fetch();  // into the stage of two chunks before, whose products all warps have waited for
    ptx::cp_async_commit();
    return stages + chunk % kStages * Tile<kTokens>::kStageBytes;
  };
  const auto load_scale = [&](int chunk, float (&scale)[2]) {
    const SharedAddress at = panel.address(warp_row + ptx::lane() / 4 * 2, chunk % kPanel);
    scale[0] = ptx::load_shared<float>(at);
    scale[1] = ptx::load_shared<float>(at + panel.pitch() * 4);
  };
  for (int chunk = 0; chunk < chunks; chunk += 2) {
    const SharedAddress stage = start_chunk(chunk);
    if (chunk % kPanel == 0) {
      const int count = chunks - chunk < kPanel ? chunks - chunk : kPanel;
      panel.fill(p.weight, WarpScales(p.weight), block_row, chunk, count, p.level_factor);
      ptx::sync_threads();
    }
    load_scale(chunk, scale);
    multiply<T>(first_half, fragment[0], stage);
    multiply<T>(second_half, fragment[0], stage + kHalfBytes);
    unpack_chunk(pairs, bytes, raw[1], fragment[1]);
    if (chunk + 3 < chunks) rows.next(raw[1]);
    ptx::wgmma_wait<1>(first_half);
    add_scaled<0>(first_half, scale, sum);
    if (chunk + 1 == chunks) {
      ptx::wgmma_wait<0>(second_half);
      add_scaled<1>(second_half, scale, sum);
      break;
    }
    const SharedAddress next_stage = start_chunk(chunk + 1);
    load_scale(chunk + 1, next_scale);
    multiply<T>(first_half, fragment[1], next_stage);
    ptx::wgmma_wait<1>(second_half);
    add_scaled<1>(second_half, scale, sum);
    multiply<T>(second_half, fragment[1], next_stage + kHalfBytes);
    unpack_chunk(pairs, bytes, raw[0], fragment[0]);
    if (chunk + 4 < chunks) rows.next(raw[0]);
    ptx::wgmma_wait<1>(first_half);
    add_scaled<0>(first_half, next_scale, sum);
    ptx::wgmma_wait<0>(second_half);
    add_scaled<1>(second_half, next_scale, sum);
  }
  ptx::cp_async_wait<0>();
  if constexpr (kMode == TokenMode::kAdapters)
    low_rank_steps_of_adapters<T, 1, kTokens>(p.out, block_row + warp_row, first_token, sum);
  else
    low_rank_steps<T, 1, kTokens>(p.out, block_row + warp_row, first_token, sum);
  store_results<T, 1, kTokens, kMode>(p.out, block_row + warp_row, first_token, sum);
}

template <class T, int kTokens>
Status launch_tokens(const GemmParams& p, cudaStream_t stream) {
  const Grid grid{ceil_div(p.out.m, kTokens), ceil_div(p.weight.n, kRows)};
  const auto kernel_of_call = p.out.adapter_of_token != nullptr ? kernel<T, kTokens, TokenMode::kAdapters>
                                                                : kernel<T, kTokens, TokenMode::kOne>;
  return start(kernel_of_call, grid, kThreads, kSharedBytes<kTokens>, stream, p);
}

template <class T>
Status launch_typed(const GemmParams& p, cudaStream_t stream) {
  return p.tile == GemmTile::k128x128Wgmma ? launch_tokens<T, 128>(p, stream) : launch_tokens<T, 64>(p, stream);
}

}  // namespace gemm_wgmma

Status launch_gemm_wgmma(const GemmParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? gemm_wgmma::launch_typed<bf16>(p, stream)
                                     : gemm_wgmma::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
