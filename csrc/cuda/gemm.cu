// Kernel for many tokens (m > 32): y = x Wᵀ + low-rank term + bias on the tensor cores in one accumulator. W is loaded
// into registers, unpacked there once per tile of tokens and never written back. x passes through shared memory in a
// cp.async pipeline. The low-rank term comes last, as r / 16 more steps of the same product, so that its loads do not
// compete for registers with those of W.
#include <type_traits>

#include "cuda/device/fragments.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/results.cuh"
#include "cuda/device/row_reader.cuh"
#include "cuda/device/token_tile.cuh"
#include "cuda/device/unroll.cuh"

namespace qlora::cuda {
namespace gemm {

// Each warp of a group unpacks its own 16R rows and multiplies them with all tokens of the tile. A group takes every
// kGroups-th chunk. All groups together compute the scales of kPanel chunks per row at a time.
template <int kFragments, int kWarpsOfGroup, int kTokensOfTile, int kStagesOfX, int kGroupsOfBlock, int kPanelChunks,
          int kScaleBatch>
struct Shape {
  static constexpr int R = kFragments, kWarps = kWarpsOfGroup, kTokens = kTokensOfTile, kStages = kStagesOfX;
  static constexpr int kGroups = kGroupsOfBlock, kPanel = kPanelChunks;
  static constexpr int kThreads = 32 * kWarps, kBlockThreads = kThreads * kGroups, kRows = 16 * R * kWarps;
  using Tile = TokenTile<kTokens, kStages, kThreads, kGroups>;
  using Gathered = GatheredTile<kTokens, kStages, kThreads, kGroups>;
  using Group = Groups<kGroups, kThreads>;
  using Panel = ScalePanel<kWarps * kGroups, kRows, kScaleBatch>;
  static constexpr int kTokenBytes = kGroups * Tile::kBytes;
  static constexpr int kSharedBytes = kPairTableBytes + kTokenBytes + panel_bytes(kRows, kPanel);
  static_assert(kPanel % kGroups == 0, "a panel gives every group as many chunks");
  static_assert(Group::sum_bytes(R* kTokens / 2) <= kPairTableBytes + kTokenBytes, "the groups' sums find room");
};

template <class T, class S, TokenMode kMode>
QLORA_KERNEL void QLORA_BOUNDS(S::kBlockThreads, S::kGroups == 1 ? 2 : 1) kernel(QLORA_PARAMS GemmParams p) {
  if (!ptx::can_run<T>(S::kSharedBytes)) return;
  constexpr int R = S::R, kTokens = S::kTokens, kStages = S::kStages, kGroups = S::kGroups;
  using Group = typename S::Group;
  const SharedAddress table = ptx::shared_base();
  const int block_row = ptx::block_y() * S::kRows;  // 32 bits are enough for rows and tokens, but not for elements
  const int warp_row = Group::warp() * 16 * R, first_row = block_row + warp_row;
  int first_token = ptx::block_x() * kTokens, expert = 0;
  if constexpr (kMode == TokenMode::kExperts) {
    const ExpertTile tile = expert_tile<kTokens>(p.out.plan, ptx::block_x());
    if (tile.expert == kOthersTile)
      store_zeros<T, kTokens, S::kBlockThreads>(p.out, block_row, S::kRows, tile.first_position);
    if (tile.expert < 0) return;
    first_token = tile.first_position;
    expert = tile.expert;
  }
  const auto& weight = weight_of<kMode == TokenMode::kExperts>(p.weight, expert);
  const int chunks = static_cast<int>(weight.k / kChunk);
  const int g = ptx::lane() / 4;

  const typename S::Panel panel(table + kPairTableBytes + S::kTokenBytes, S::kPanel);
  auto tokens = [&] {
    const SharedAddress base = table + kPairTableBytes + Group::index() * S::Tile::kBytes;
    if constexpr (kMode == TokenMode::kExperts)
      return typename S::Gathered(base, p.x, p.out.plan.x_row + first_token, weight.k);
    else
      return typename S::Tile(base, p.x, p.out.m, weight.k, weight.k, first_token);
  }();
  const auto fetch = [&] { tokens.fetch(); };
  start_pipeline<kStages>(fetch);
  RowReader<R, kGroups> rows(weight, first_row, Group::index());
  Words2 raw[2 * R];
  if (Group::index() < chunks) rows.next(raw);
  LevelPairs<T>::template fill<S::kBlockThreads>(table, weight.quant_type, p.level_multiplier);
  const LevelPairs<T> pairs(table);

  float sum[R][kTokens / 8][4] = {};

  for (int first = 0; first < chunks; first += S::kPanel) {
    const int count = chunks - first < S::kPanel ? chunks - first : S::kPanel;
    if (first > 0) ptx::sync_threads();  // all warps have finished with the previous scales
    if constexpr (kMode == TokenMode::kExperts) expert = expert_tile<kTokens>(p.out.plan, ptx::block_x()).expert;
    const auto& of_panel = weight_of<kMode == TokenMode::kExperts>(p.weight, expert);
    panel.fill(of_panel, WarpScales(of_panel), block_row, first, count, p.level_factor);
    ptx::sync_threads();
    for (int in_panel = Group::index(); in_panel < count; in_panel += kGroups) {
      advance_pipeline<kStages, Group>(fetch);
      uint32_t fragment[R][4][4];
      float scale[2 * R];
      const SharedAddress scale_at = panel.address(warp_row + 2 * R * g, in_panel);
#pragma unroll
      for (int f = 0; f < R; ++f) {
        unpack_step<T, 0>(pairs, raw[2 * f], raw[2 * f + 1], fragment[f][0]);
        unpack_step<T, 1>(pairs, raw[2 * f], raw[2 * f + 1], fragment[f][1]);
        unpack_step<T, 2>(pairs, raw[2 * f], raw[2 * f + 1], fragment[f][2]);
        unpack_step<T, 3>(pairs, raw[2 * f], raw[2 * f + 1], fragment[f][3]);
        scale[2 * f] = ptx::load_shared<float>(scale_at + 2 * f * panel.pitch() * 4);
        scale[2 * f + 1] = ptx::load_shared<float>(scale_at + (2 * f + 1) * panel.pitch() * 4);
      }
      const auto place = place_in(tokens.current());
      unroll<kTokens / 8>([&](auto group) {
        constexpr int j = decltype(group)::value;
        // Loads the next bytes of W halfway: earlier would need too many registers; the other half hides the latency.
        if constexpr (j == kTokens / 16)
          if (first + in_panel + kGroups < chunks) rows.next(raw);
        // Keeps the compiler from loading all of x at once, which would spill registers.
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
  }
  ptx::cp_async_wait<0>();
  if (!Group::add_up(table, sum)) return;
  if constexpr (kMode == TokenMode::kExperts) {  // read again, because the loop has no registers for it
    const ExpertTile tile = expert_tile<kTokens>(p.out.plan, ptx::block_x());
    first_token = tile.first_position;
    expert = tile.expert;
  }
  if constexpr (kMode == TokenMode::kAdapters)
    low_rank_steps_of_adapters<T, R, kTokens>(p.out, first_row, first_token, sum);
  else
    low_rank_steps<T, R, kTokens, kMode>(p.out, first_row, first_token, sum, expert);
  store_results<T, R, kTokens, kMode>(p.out, first_row, first_token, sum, expert);
}

template <class T, class S>
Status launch_shape(const GemmParams& p, cudaStream_t stream) {
  const bool experts = p.out.plan.order != nullptr;
  const Grid grid{experts ? expert_tiles<S::kTokens>(p.out.plan) : ceil_div(p.out.m, S::kTokens),
                  ceil_div(p.weight.n, S::kRows)};
  const auto kernel_of_call = experts                             ? kernel<T, S, TokenMode::kExperts>
                              : p.out.adapter_of_token != nullptr ? kernel<T, S, TokenMode::kAdapters>
                                                                  : kernel<T, S, TokenMode::kOne>;
  return start(kernel_of_call, grid, S::kBlockThreads, S::kSharedBytes, stream, p);
}

template <class T>
Status launch_typed(const GemmParams& p, cudaStream_t stream) {
  switch (p.tile) {
    case GemmTile::k128x64:
      return launch_shape<T, Shape<2, 4, 64, 2, 2, 64, 8>>(p, stream);
    case GemmTile::k64x64:
      return launch_shape<T, Shape<2, 2, 64, 3, 4, 64, 8>>(p, stream);
    case GemmTile::k64x32:
      return launch_shape<T, Shape<2, 2, 32, 3, 8, 64, 8>>(p, stream);
    case GemmTile::k128x64Wgmma:
    case GemmTile::k128x128Wgmma:
      return launch_gemm_wgmma(p, stream);
    case GemmTile::k64x32Small:
      return launch_shape<T, Shape<2, 2, 32, 3, 4, 64, 8>>(p, stream);
    default:  // Turing: 64 KiB of shared memory have room for two stages; no bfloat16
      if constexpr (std::is_same_v<T, fp16>) return launch_shape<T, Shape<1, 4, 64, 2, 1, 32, 4>>(p, stream);
      return {"bfloat16 needs more shared memory than this GPU has"};
  }
}

}  // namespace gemm

Status launch_gemm(GemmParams p, cudaStream_t stream) {
  p.level_multiplier = level_multiplier(p.weight.quant_type, p.dtype);
  p.level_factor = 1.0f / p.level_multiplier;
  return p.dtype == DType::kBFloat16 ? gemm::launch_typed<bf16>(p, stream) : gemm::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
