// What a thread block needs to know about its tile in a launch for a mixture of experts.
#pragma once

#include <type_traits>

#include "cuda/device/ptx.cuh"
#include "cuda/launch.h"

namespace qlora::cuda {

// The tokens of a launch: all use one adapter; each uses an adapter of its own; or, with a plan, each uses the weight,
// adapter and bias of an expert. In the last mode a tile has positions of the plan instead of tokens.
enum class TokenMode { kOne, kAdapters, kExperts };

// The tile of a block in a launch for experts: a tile of the plan, or a piece if the block takes fewer tokens.
struct ExpertTile {
  int expert;          // kUnusedTile, kOthersTile
  int first_position;  // of the plan
};
template <int kTokens>
QLORA_DEVICE ExpertTile expert_tile(const AdapterPlan& plan, int block) {
  const int tile = kTokens == kAdapterTile ? block : ptx::load(plan.pieces + block);
  if (tile < 0) return {kUnusedTile, 0};
  return {ptx::load(plan.adapter_of_tile + tile * kTokens / kAdapterTile), tile * kTokens};
}
template <int kTokens>
constexpr int64_t expert_tiles(const AdapterPlan& plan) {
  return kTokens == kAdapterTile ? plan.tiles : plan.piece_count;
}

// The weight of the block's expert; without experts the weight of the launch, as it is.
template <bool kExperts>
QLORA_DEVICE auto weight_of(const WeightView& weight, [[maybe_unused]] int expert)
    -> std::conditional_t<kExperts, WeightView, const WeightView&> {
  if constexpr (kExperts)
    return weight_of_stack(weight, expert);
  else
    return weight;
}

}  // namespace qlora::cuda
