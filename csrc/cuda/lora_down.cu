// The low-rank down projection on the tensor cores: few columns, a long reduction. Sixteen ranks are the rows of a
// product whose columns are tokens; the reduction is cut into stretches that blocks take side by side, whose sums the
// next kernel adds up in a fixed order.
#include "cuda/device/half_range.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/token_tile.cuh"

namespace qlora::cuda {
namespace lora_down {

constexpr int kThreads = 128;
constexpr int kRanks = 16;
constexpr int kTokens = 64;
constexpr int kStages = 3;
constexpr int kRankBytes = kRanks * 128, kTokenBytes = kTokens * 128;
constexpr int kGroups = kTokens / 8 / (kThreads / 32);  // of eight tokens, for each warp

template <class T, int kSplits>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) kernel(QLORA_PARAMS LoraDownParams p) {
  if (!ptx::can_run<T>(0)) return;
  constexpr int kStageBytes = kTokenBytes + kSplits * kRankBytes;
  const int64_t first_token = static_cast<int64_t>(ptx::block_x()) * kTokens;
  const int64_t first_rank = static_cast<int64_t>(ptx::block_y()) * kRanks;
  // Whole chunks of 64 for each part, the last one takes what is left.
  const int64_t chunks = ceil_div(p.elems, 64), begin = chunks * ptx::block_z() / p.parts,
                end = chunks * (ptx::block_z() + 1) / p.parts;
  const T* operand = static_cast<const T*>(p.operand);
  const T* x = static_cast<const T*>(p.x);
  float scale = 1.0f;  // only to know how large the scaled result is
  if (p.plan.order != nullptr) {
    const int adapter = ptx::load(p.plan.adapter_of_tile + ptx::block_x());
    if (adapter < 0) return;
    operand += adapter * (kSplits * p.rows * p.elems);
    scale = ptx::load(p.plan.scale_of_adapter + adapter);
  }
  TokenRows<kTokens, kThreads> rows;
  rows.set(p.plan.order, p.m, first_token);

  SharedAddress stage = ptx::shared_base();  // filled next; behind fetch(), the one to be read
  int64_t next = begin;
  const auto fetch = [&] {
    if (next < end) {
      rows.fetch(stage, x, p.elems, next * 64);
#pragma unroll
      for (int s = 0; s < kSplits; ++s)
        fetch_rows<kRanks, kThreads>(stage + kTokenBytes + s * kRankBytes, operand + s * p.rows * p.elems, p.rows,
                                     p.elems, first_rank, next * 64);
    }
    ++next;
    stage =
        stage + kStageBytes == ptx::shared_base() + kStages * kStageBytes ? ptx::shared_base() : stage + kStageBytes;
  };
  start_pipeline<kStages>(fetch);

  float sum[kGroups][4] = {};
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    advance_pipeline<kStages>(fetch);
    uint32_t words[kGroups][8];
    const Place tokens = place_in(stage + ptx::warp() * kGroups * 1024);
    unroll<kGroups>([&](auto group) { load_fragment<decltype(group)::value>(tokens, words[decltype(group)::value]); });
#pragma unroll
    for (int s = 0; s < kSplits; ++s) {
      uint32_t a[8], b[8];  // ranks g and g + 8
      const Place ranks = place_in(stage + kTokenBytes + s * kRankBytes);
      load_fragment<0>(ranks, a);
      load_fragment<1>(ranks, b);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint32_t fragment[4] = {a[2 * step], b[2 * step], a[2 * step + 1], b[2 * step + 1]};
#pragma unroll
        for (int j = 0; j < kGroups; ++j)
          ptx::mma<T>(sum[j], fragment, words[j][2 * step], words[j][2 * step + 1], sum[j]);
      }
    }
  }
  ptx::cp_async_wait<0>();

  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kGroups; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t position = first_token + (ptx::warp() * kGroups + j) * 8 + 2 * t + i % 2;
      const int64_t token = p.plan.order != nullptr ? ptx::load(p.plan.order + position) : position;
      const int64_t rank = first_rank + g + (i / 2) * 8;
      if (token >= 0 && token < p.m && rank < p.rows) {
        ptx::store(p.out + (ptx::block_z() * p.m + token) * p.rows + rank, sum[j][i]);
        largest = larger_magnitude(largest, sum[j][i] * scale);
      }
    }
  if (p.largest != nullptr) note_largest(p.largest, largest);
}

template <class T>
Status launch_typed(const LoraDownParams& p, cudaStream_t stream) {
  static_assert(kTokens == kAdapterTile, "a block takes one tile of a plan");
  const int64_t tiles = p.plan.order != nullptr ? p.plan.tiles : ceil_div(p.m, kTokens);
  const Grid grid{tiles, ceil_div(p.rows, kRanks), p.parts};
  const int shared_bytes = kStages * (kTokenBytes + p.splits * kRankBytes);
  return start(p.splits == 2 ? kernel<T, 2> : kernel<T, 1>, grid, kThreads, shared_bytes, stream, p);
}

}  // namespace lora_down

Status launch_lora_down(const LoraDownParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? lora_down::launch_typed<bf16>(p, stream)
                                     : lora_down::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
