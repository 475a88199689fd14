// Sorts tokens by adapter, for kernels that process the tokens of one adapter together; each adapter's tokens are
// padded to whole tiles. One warp counts and places the tokens of one adapter in token order, so the plan is the same
// on every run.
#include "cuda/device/launch.cuh"
#include "format/common.h"

namespace qlora::cuda {
namespace adapter_plan {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// Calls visit(token, index) for each token of an adapter, in the lane that read it, and returns their number.
template <class Visit>
QLORA_DEVICE int for_tokens_of(const AdapterPlanParams& p, int64_t adapter, const Visit& visit) {
  int count = 0;
  for (int64_t first = 0; first < p.m; first += 32) {
    const int64_t token = first + ptx::lane();
    const bool is_mine = token < p.m && ptx::load(p.adapter_of_token + token) == adapter;
    const uint32_t lanes = ptx::ballot(is_mine);
    if (is_mine) visit(static_cast<int>(token), count + ptx::popcount(lanes & ((1u << ptx::lane()) - 1u)));
    count += ptx::popcount(lanes);
  }
  return count;
}

QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) count(QLORA_PARAMS AdapterPlanParams p) {
  const int64_t adapter = ptx::block_x() * int64_t{kWarps} + ptx::warp();
  if (adapter >= p.adapters) return;
  const int tokens = for_tokens_of(p, adapter, [](int, int) {});
  if (ptx::lane() == 0) ptx::store(p.counts + adapter, tokens);
}

QLORA_DEVICE int tiles_of(int tokens) { return (tokens + kAdapterTile - 1) / kAdapterTile; }

// One warp per adapter, plus one warp that marks the unused tiles.
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) place(QLORA_PARAMS AdapterPlanParams p) {
  const int64_t adapter = ptx::block_x() * int64_t{kWarps} + ptx::warp();
  if (adapter > p.adapters) return;
  int first_tile = 0;
  for (int64_t a = ptx::lane(); a < adapter; a += 32) first_tile += tiles_of(ptx::load(p.counts + a));
  for (int mask = 16; mask > 0; mask /= 2) first_tile += ptx::shuffle_xor(first_tile, mask);
  if (ptx::lane() == 0) ptx::store(p.first_tile + adapter, first_tile);

  const bool is_adapter = adapter < p.adapters;
  int* order = p.order + int64_t{first_tile} * kAdapterTile;
  const int tokens =
      is_adapter ? for_tokens_of(p, adapter, [&](int token, int i) { ptx::store(order + i, token); }) : 0;
  const int tiles = is_adapter ? tiles_of(tokens) : static_cast<int>(p.tiles) - first_tile;
  for (int i = tokens + ptx::lane(); i < tiles * kAdapterTile; i += 32) ptx::store(order + i, -1);
  for (int i = ptx::lane(); i < tiles; i += 32)
    ptx::store(p.adapter_of_tile + first_tile + i, is_adapter ? static_cast<int>(adapter) : -1);
}

}  // namespace adapter_plan

Status launch_adapter_plan(const AdapterPlanParams& p, cudaStream_t stream) {
  using namespace adapter_plan;
  const Status status = start(count, {ceil_div(p.adapters, kWarps)}, kThreads, 0, stream, p);
  if (status.error != nullptr) return status;
  return start(place, {ceil_div(p.adapters + 1, kWarps)}, kThreads, 0, stream, p);
}

}  // namespace qlora::cuda
