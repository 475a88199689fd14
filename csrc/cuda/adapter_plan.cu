// Sorts tokens by adapter, for kernels that process the tokens of one adapter together; each adapter's tokens are
// padded to whole tiles. A thread block counts and places the tokens of one adapter in token order, so the plan is the
// same on every run. Each of its warps takes a part of the tokens.
#include "cuda/device/launch.cuh"
#include "format/common.h"

namespace qlora::cuda {
namespace adapter_plan {

constexpr int kThreads = 32 * kPlanParts;
constexpr int kAtOnce = 8;  // loads in flight in each lane: a warp waits for memory once for 256 tokens

// Whether a token with this number belongs to `adapter`; the last one stands for all numbers that are no adapter's.
QLORA_DEVICE bool is_of(const AdapterPlanParams& p, int64_t number, int64_t adapter) {
  return adapter < p.adapters ? number == adapter : number < 0 || number >= p.adapters;
}

// Calls visit(token, index) for each token of an adapter in the warp's part, in the lane that read it, and returns
// their number.
template <class Visit>
QLORA_DEVICE int for_tokens_of(const AdapterPlanParams& p, int64_t adapter, const Visit& visit) {
  const int64_t part = ceil_div(ceil_div(p.m, kPlanParts), 32) * 32, begin = part * ptx::warp();
  const int64_t end = min_i64(begin + part, p.m);
  int count = 0;
  for (int64_t first = begin; first < end; first += 32 * kAtOnce) {
    int64_t number[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t token = first + 32 * i + ptx::lane();
      number[i] = token < end ? ptx::load(p.adapter_of_token + token) : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t token = first + 32 * i + ptx::lane();
      const bool is_mine = token < end && is_of(p, number[i], adapter);
      const uint32_t lanes = ptx::ballot(is_mine);
      if (is_mine) visit(static_cast<int>(token), count + ptx::popcount(lanes & ((1u << ptx::lane()) - 1u)));
      count += ptx::popcount(lanes);
    }
  }
  return count;
}

// Whether the tokens of `adapter` have positions.
QLORA_DEVICE bool is_placed(const AdapterPlanParams& p, int64_t adapter) {
  return adapter < p.adapters || p.pieces != nullptr;
}

QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) count(QLORA_PARAMS AdapterPlanParams p) {
  const int64_t adapter = ptx::block_x();
  const int tokens = is_placed(p, adapter) ? for_tokens_of(p, adapter, [](int, int) {}) : 0;
  if (ptx::lane() == 0) ptx::store(p.counts + adapter * kPlanParts + ptx::warp(), tokens);
}

QLORA_DEVICE int tiles_of(int tokens, int tile) { return (tokens + tile - 1) / tile; }

// The number of an adapter's tokens in its first `parts` parts.
QLORA_DEVICE int tokens_in(const AdapterPlanParams& p, int64_t adapter, int parts) {
  int tokens = 0;
#pragma unroll
  for (int part = 0; part < kPlanParts; ++part)
    if (part < parts) tokens += ptx::load(p.counts + adapter * kPlanParts + part);
  return tokens;
}

QLORA_DEVICE int sum_of_warp(int value) {
  for (int mask = 16; mask > 0; mask /= 2) value += ptx::shuffle_xor(value, mask);
  return value;
}

// One block for each adapter. One more places the tokens without an adapter, if they have positions, and marks what is
// unused.
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) place(QLORA_PARAMS AdapterPlanParams p) {
  const int64_t adapter = ptx::block_x();
  const bool is_adapter = adapter < p.adapters;
  int first_tile = 0, first_piece = 0;
  for (int64_t a = ptx::lane(); a < adapter; a += 32) {
    const int tokens = tokens_in(p, a, kPlanParts);
    first_tile += tiles_of(tokens, kAdapterTile);
    if (p.pieces != nullptr) first_piece += tiles_of(tokens, p.piece);
  }
  first_tile = sum_of_warp(first_tile), first_piece = sum_of_warp(first_piece);
  if (ptx::thread() == 0) ptx::store(p.first_tile + adapter, first_tile);

  int* order = p.order + int64_t{first_tile} * kAdapterTile;
  int* x_row = p.x_row + int64_t{first_tile} * kAdapterTile;
  if (is_placed(p, adapter)) {
    const int before = tokens_in(p, adapter, ptx::warp());
    for_tokens_of(p, adapter, [&](int token, int i) {
      ptx::store(order + before + i, token);
      if (p.x_row != nullptr) ptx::store(x_row + before + i, token / p.choices);
    });
  }
  const int tokens = tokens_in(p, adapter, kPlanParts), used = tiles_of(tokens, kAdapterTile);
  const int tiles = is_adapter ? used : static_cast<int>(p.tiles) - first_tile;
  for (int i = tokens + ptx::thread(); i < tiles * kAdapterTile; i += kThreads) {
    ptx::store(order + i, -1);
    if (p.x_row != nullptr) ptx::store(x_row + i, -1);
  }
  for (int i = ptx::thread(); i < tiles; i += kThreads)
    ptx::store(p.adapter_of_tile + first_tile + i, is_adapter ? static_cast<int>(adapter)
                                                   : i < used ? kOthersTile
                                                              : kUnusedTile);
  if (p.pieces == nullptr) return;
  const int used_pieces = tiles_of(tokens, p.piece), of_tile = kAdapterTile / p.piece;
  const int pieces = is_adapter ? used_pieces : static_cast<int>(p.piece_count) - first_piece;
  for (int i = ptx::thread(); i < pieces; i += kThreads)
    ptx::store(p.pieces + first_piece + i, i < used_pieces ? of_tile * first_tile + i : -1);
}

}  // namespace adapter_plan

Status launch_adapter_plan(const AdapterPlanParams& p, cudaStream_t stream) {
  using namespace adapter_plan;
  const Status status = start(count, {p.adapters + 1}, kThreads, 0, stream, p);
  if (status.error != nullptr) return status;
  return start(place, {p.adapters + 1}, kThreads, 0, stream, p);
}

}  // namespace qlora::cuda
