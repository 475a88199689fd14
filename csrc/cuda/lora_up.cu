// The low-rank up projection alone, on the tensor cores: the gradient of lora_x, which has no base product to be added
// to.
#include "cuda/device/launch.cuh"
#include "cuda/device/results.cuh"

namespace qlora::cuda {
namespace lora_up {

constexpr int kThreads = 128;
constexpr int kRows = 2 * 16 * kThreads / 32;  // of a block; two fragments a warp
constexpr int kTokens = 64;

template <class T>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 3) kernel(QLORA_PARAMS LoraUpParams p) {
  if (!ptx::can_run<T>(0)) return;
  const int first_row = ptx::block_y() * kRows + ptx::warp() * 32, first_token = ptx::block_x() * kTokens;
  float sum[2][kTokens / 8][4] = {};
  low_rank_steps<T, 2, kTokens>(p.out, first_row, first_token, sum);
  store_results<T, 2, kTokens, false>(p.out, first_row, first_token, sum);
}

}  // namespace lora_up

Status launch_lora_up(const LoraUpParams& p, cudaStream_t stream) {
  using namespace lora_up;
  const Grid grid{ceil_div(p.out.m, kTokens), ceil_div(p.out.rows, kRows)};
  return p.dtype == DType::kBFloat16 ? start(kernel<bf16>, grid, kThreads, 0, stream, p)
                                     : start(kernel<fp16>, grid, kThreads, 0, stream, p);
}

}  // namespace qlora::cuda
