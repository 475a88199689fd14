// Low-rank factors and activations as 16-bit operands of the tensor cores: padded to whole steps of 16 ranks, and split
// into high and low parts where they come in float32, so that nothing of them is lost.
#include <algorithm>

#include "cuda/device/elements.cuh"
#include "cuda/device/half_range.cuh"
#include "cuda/device/launch.cuh"

namespace qlora::cuda {
namespace lora_pack {

constexpr int kThreads = 256;

// In order; eight loads are on their way together.
QLORA_DEVICE float sum_of_parts(const float* at, int parts, int64_t stride) {
  float sum = 0.0f;
#pragma unroll 8
  for (int part = 0; part < parts; ++part) sum += ptx::load(at + part * stride);
  return sum;
}

template <class T>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) kernel(QLORA_PARAMS LoraPackJobs jobs) {
  const LoraPackParams& p = jobs.job[ptx::block_y()];
  const int64_t item = static_cast<int64_t>(ptx::block_x()) * kThreads + ptx::thread();
  if (item >= p.adapters * p.rows * p.padded_r) return;
  const int64_t row = divide(item, p.padded_r), r = item - row * p.padded_r;  // row: over all adapters
  const int64_t adapter = p.adapters == 1 ? 0 : divide(row, p.rows);
  int64_t source_row = row - adapter * p.rows, source_col = r;
  bool exists = r < p.r;
  float scale = p.scale;
  if (exists && p.adapter_of_token != nullptr) {
    int64_t& token = p.tokens_are_columns ? source_col : source_row;
    if (p.token_order != nullptr) token = ptx::load(p.token_order + token);
    const int64_t of_token = token < 0 ? -1 : ptx::load(p.adapter_of_token + token);
    exists = of_token >= 0 && of_token < p.adapter_count;
    if (exists) scale *= ptx::load(p.scale_of_adapter + of_token);
  }
  const int64_t source =
      adapter * p.adapter_stride + source_row * p.source.row_stride + source_col * p.source.col_stride;
  float value = 0.0f;
  if (exists) {
    value = p.parts == 1 ? load_element(p.source.data, p.source.dtype, source)
                         : sum_of_parts(static_cast<const float*>(p.source.data) + source, p.parts, p.part_stride);
    value *= scale;
    if (p.half_range != HalfRange::kLeave) {
      const float largest = float_of(static_cast<uint32_t>(ptx::load(p.largest)));
      const float factor = to_half_range(largest * p.largest_factor);
      value = p.half_range == HalfRange::kMultiply ? value * factor : value / factor;
    }
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
      out += adapter * p.rows * p.padded_r;
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

Status launch_lora_pack(const LoraPackJobs& jobs, cudaStream_t stream) {
  using namespace lora_pack;
  Grid grid{0, jobs.count};
  const DType dtype = jobs.job[0].dtype;
  for (int i = 0; i < jobs.count; ++i) {
    const LoraPackParams& p = jobs.job[i];
    if (p.dtype != dtype) return {"packs of several dtypes in one launch"};
    if (p.parts > 1 && p.source.dtype != DType::kFloat32) return {"only parts in float32 are added up"};
    grid.x = std::max(grid.x, ceil_div(p.adapters * p.rows * p.padded_r, kThreads));
  }
  const auto kernel_of_type = dtype == DType::kBFloat16  ? kernel<bf16>
                              : dtype == DType::kFloat16 ? kernel<fp16>
                                                         : kernel<float>;
  return start(kernel_of_type, grid, kThreads, 0, stream, jobs);
}

}  // namespace qlora::cuda
