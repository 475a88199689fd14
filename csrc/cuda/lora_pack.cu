// Low-rank factors and activations as 16-bit operands of the tensor cores: padded to whole steps of 16 ranks, and split
// into high and low parts where they come in float32, so that nothing of them is lost.
#include "cuda/device/elements.cuh"
#include "cuda/device/launch.cuh"

namespace qlora::cuda {
namespace lora_pack {

constexpr int kThreads = 256;

template <class T>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) kernel(QLORA_PARAMS LoraPackParams p) {
  const int64_t item = static_cast<int64_t>(ptx::block_x()) * kThreads + ptx::thread();
  if (item >= p.adapters * p.rows * p.padded_r) return;
  const int64_t row = item / p.padded_r, r = item % p.padded_r;  // row: over all adapters
  const int64_t source = row / p.rows * p.adapter_stride + row % p.rows * p.source.row_stride + r * p.source.col_stride;
  float value = 0.0f;
  if (r < p.r) {
    for (int part = 0; part < p.parts; ++part) {
      value += load_element(p.source.data, p.source.dtype, source + part * p.part_stride);
      if (p.low_offset != 0)
        value += load_element(p.source.data, p.source.dtype, source + part * p.part_stride + p.low_offset);
    }
    value *= p.scale;
  }
  T* out = static_cast<T*>(p.out);
  if constexpr (sizeof(T) == 4) {
    ptx::store(&out[item], value);
  } else {
    const T high = from_float<T>(value);
    if (p.split == Split::kNone) {
      ptx::store(&out[item].bits, high.bits);
      return;
    }
    // What rounds to infinity has no low part: inf, not inf - inf.
    const float rest = value - to_float(high);
    const T low = from_float<T>((bits_of(to_float(high)) & 0x7F800000u) == 0x7F800000u ? 0.0f : rest);
    if (p.split == Split::kStacked) {
      ptx::store(&out[item].bits, high.bits);
      ptx::store(&out[p.rows * p.padded_r + item].bits, low.bits);
      return;
    }
    out += row * 3 * p.padded_r + r;
    ptx::store(&out[0].bits, high.bits);
    ptx::store(&out[p.padded_r].bits, p.split == Split::kOperand ? high.bits : low.bits);
    ptx::store(&out[2 * p.padded_r].bits, p.split == Split::kOperand ? low.bits : high.bits);
  }
}

}  // namespace lora_pack

Status launch_lora_pack(const LoraPackParams& p, cudaStream_t stream) {
  using namespace lora_pack;
  const Grid grid{ceil_div(p.adapters * p.rows * p.padded_r, kThreads)};
  const auto kernel_of_type = p.dtype == DType::kBFloat16  ? kernel<bf16>
                              : p.dtype == DType::kFloat16 ? kernel<fp16>
                                                           : kernel<float>;
  return start(kernel_of_type, grid, kThreads, 0, stream, p);
}

}  // namespace qlora::cuda
