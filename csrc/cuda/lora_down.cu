// The low-rank down projection on the tensor cores: few columns, a long reduction. Sixteen ranks are the rows of a
// product whose columns are tokens; the reduction is cut into stretches that blocks take side by side, whose sums the
// next kernel adds up in a fixed order.
#include "cuda/device/launch.cuh"
#include "cuda/device/token_tile.cuh"

namespace qlora::cuda {
namespace lora_down {

constexpr int kThreads = 128;
constexpr int kRanks = 16;
constexpr int kTokens = 64;
constexpr int kStages = 3;
using Ranks = TokenTile<kRanks, kStages, kThreads>;
using Tokens = TokenTile<kTokens, kStages, kThreads>;
constexpr int kSharedBytes = Ranks::kBytes + Tokens::kBytes;
constexpr int kGroups = kTokens / 8 / (kThreads / 32);  // of eight tokens, for each warp

template <class T>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) kernel(QLORA_PARAMS LoraDownParams p) {
  const int64_t first_token = static_cast<int64_t>(ptx::block_x()) * kTokens;
  const int64_t first_rank = static_cast<int64_t>(ptx::block_y()) * kRanks;
  // Whole chunks of 64 for each part, the last one takes what is left.
  const int64_t chunks = ceil_div(p.elems, 64), begin = chunks * ptx::block_z() / p.parts,
                end = chunks * (ptx::block_z() + 1) / p.parts;
  const int64_t elems = min_i64(end * 64, p.elems) - begin * 64;
  const T* operand = static_cast<const T*>(p.operand) + begin * 64;
  const T* x = static_cast<const T*>(p.x) + begin * 64;

  Ranks ranks(ptx::shared_base(), operand, p.rows, p.elems, elems, first_rank);
  Tokens tokens(ptx::shared_base() + Ranks::kBytes, x, p.m, p.elems, elems, first_token);
  const auto fetch = [&] {
    ranks.fetch();
    tokens.fetch();
  };
  start_pipeline<kStages>(fetch);

  float sum[kGroups][4] = {};
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    advance_pipeline<kStages>(fetch);
    uint32_t a[8], b[8];  // ranks g and g + 8
    const auto rank_place = ranks.place(ranks.current());
    Ranks::fragment<0>(rank_place, a);
    Ranks::fragment<1>(rank_place, b);
    const auto place = tokens.place(tokens.current() + ptx::warp() * kGroups * 1024);
    unroll<kGroups>([&](auto group) {
      constexpr int j = decltype(group)::value;
      uint32_t x_words[8];
      Tokens::fragment<j>(place, x_words);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t fragment[4] = {a[2 * s], b[2 * s], a[2 * s + 1], b[2 * s + 1]};
        ptx::mma<T>(sum[j], fragment, x_words[2 * s], x_words[2 * s + 1], sum[j]);
      }
    });
  }
  ptx::cp_async_wait<0>();

  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
#pragma unroll
  for (int j = 0; j < kGroups; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = first_token + (ptx::warp() * kGroups + j) * 8 + 2 * t + i % 2;
      const int64_t rank = first_rank + g + (i / 2) * 8;
      if (token < p.m && rank < p.rows) ptx::store(p.out + (ptx::block_z() * p.m + token) * p.rows + rank, sum[j][i]);
    }
}

}  // namespace lora_down

Status launch_lora_down(const LoraDownParams& p, cudaStream_t stream) {
  using namespace lora_down;
  const Grid grid{ceil_div(p.m, kTokens), ceil_div(p.rows, kRanks), p.parts};
  return p.dtype == DType::kBFloat16 ? start(kernel<bf16>, grid, kThreads, kSharedBytes, stream, p)
                                     : start(kernel<fp16>, grid, kThreads, kSharedBytes, stream, p);
}

}  // namespace qlora::cuda
