// The low-rank up projection without a base product, on the tensor cores: the gradient of lora_x, and the term to which
// the vendor's GEMM adds its product.
#include "cuda/device/launch.cuh"
#include "cuda/device/results.cuh"

namespace qlora::cuda {
namespace lora_up {

constexpr int kThreads = 128;
constexpr int kRows = 2 * 16 * kThreads / 32;  // rows of a block; two fragments per warp
constexpr int kTokens = 64;

template <class T, TokenMode kMode>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, kMode == TokenMode::kAdapters ? 2 : 3) kernel(QLORA_PARAMS LoraUpParams p) {
  if (!ptx::can_run<T>(0)) return;
  const int first_row = ptx::block_y() * kRows + ptx::warp() * 32, first_token = ptx::block_x() * kTokens;
  float sum[2][kTokens / 8][4] = {};
  if constexpr (kMode == TokenMode::kAdapters)
    low_rank_steps_of_adapters<T, 2, kTokens>(p.out, first_row, first_token, sum);
  else
    low_rank_steps<T, 2, kTokens>(p.out, first_row, first_token, sum);
  store_results<T, 2, kTokens, kMode>(p.out, first_row, first_token, sum);
}

template <class T>
Status launch_typed(const LoraUpParams& p, cudaStream_t stream) {
  const Grid grid{ceil_div(p.out.m, kTokens), ceil_div(p.out.rows, kRows)};
  return start(p.out.adapter_of_token != nullptr ? kernel<T, TokenMode::kAdapters> : kernel<T, TokenMode::kOne>, grid,
               kThreads, 0, stream, p);
}

}  // namespace lora_up

Status launch_lora_up(const LoraUpParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? lora_up::launch_typed<bf16>(p, stream) : lora_up::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
